"""Every example runs as README says, and its recipe is one that `trimtab train` takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.grpo.config import Config
from trimtab.grpo.recipes import find_recipe
from trimtab.grpo.sampling.mixture import load_tasks
from trimtab.grpo.setup.resolve import resolve
from trimtab.rewards.sandbox import isolation, mechanism

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"), key=lambda path: path.name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(path, tmp_path):
    assert len(path.read_text().splitlines()) < 80
    if path.stem == "interpreter_maths" and not mechanism().namespaces:
        pytest.skip(isolation())
    done = subprocess.run(
        [sys.executable, path],
        cwd=tmp_path,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "def recipe" not in path.read_text() or "reward " in done.stdout


@pytest.mark.parametrize("path", [path for path in EXAMPLES if "def recipe" in path.read_text()], ids=lambda p: p.stem)
def test_the_recipe_of_an_example_can_be_trained(path):
    config = find_recipe(f"{path}:recipe")()
    assert isinstance(config, Config)
    assert load_tasks(resolve(config, {}, gpu=False), judge=None, grade=None).keys() == config.domains.keys()
