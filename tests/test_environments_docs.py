import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs" / "environments.md"


def test_the_code_of_the_page_on_environments_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 4
    names: dict = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
