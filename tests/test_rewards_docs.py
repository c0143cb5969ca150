import re
from pathlib import Path

GUIDE = Path(__file__).parent.parent / "docs" / "rewards.md"


def test_the_python_of_the_guide_runs_from_top_to_bottom():
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
