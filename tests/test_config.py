import subprocess
import sys
from dataclasses import replace

import pytest

from trimtab.grpo.config import ColdStart, Config, Domain, Lora, LossSettings, Rollout, load
from trimtab.grpo.recipes import RECIPES, find_recipe
from trimtab.rollout.types import Sampling


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_survives_being_saved_and_loaded(name, tmp_path):
    config = replace(find_recipe(name)(), seed=7)
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(domains={}), "domains is empty"),
        (lambda: replace(find_recipe("quickstart")(), group_size=1), "group_size must be at least 2"),
        (lambda: replace(find_recipe("quickstart")(), lr=0.0), "lr must be above 0"),
        (lambda: replace(find_recipe("quickstart")(), steps=0), "steps must be at least 1"),
        (lambda: Sampling(temperature=0.0), "temperature must lie in"),
        (lambda: Sampling(top_p=0.0), "top_p must lie in"),
        (lambda: Sampling(top_p=1.2), "top_p must lie in"),
        (lambda: Sampling(top_k=0), "top_k must be at least 1"),
        (lambda: Sampling(temperature=float("nan")), "temperature"),
        (lambda: LossSettings(delta=-0.1), "delta must be"),
        (lambda: LossSettings(beta=-1.0), "beta must be"),
        (lambda: LossSettings(clip_low=0.0), "clip_low must"),
        (lambda: Domain(task="x:y", prompts=-1), "prompts must be 0"),
        (lambda: Config(domains={"a": Domain(task="x:y", prompts=0)}), "no domain trains"),
        (lambda: Domain(task="x:y", length_soft=9, length_hard=9), "length_soft must lie"),
        (lambda: Lora(rank=-1), "lora.rank must be"),
        (lambda: Lora(targets=()), "lora.targets is empty"),
        (lambda: Domain(task="x:y", max_turns=0), "max_turns must be at least 1"),
        (lambda: Domain(task="x:y", process_rewards={"length": "x:y"}), "'length' is the length penalty's"),
        (lambda: Domain(task="x:y", group_rewards={"a": "x:y"}, process_rewards={"a": "x:y"}), "'a' is a group's and"),
        (lambda: Domain(task="x:y", group_rewards={"a": "math:nothing"}).load_group_rewards(), "import path"),
        (lambda: Domain(task="x:y", process_rewards={"a": "math"}).load_process_rewards(), "import path"),
        (lambda: Rollout(actors=0), "actors must be at least 1"),
        (lambda: ColdStart(vocab_size=100), "vocab_size must be at least"),
        (lambda: Domain(task="nowhere:Task").load_task(), "import path"),
        (lambda: Domain(task="json:Nothing").load_task(), "import path"),
        (lambda: find_recipe("nonsense"), "no recipe named 'nonsense'"),
        (lambda: find_recipe("missing.py:f"), "both must exist; got 'missing.py:f'"),
    ],
)
def test_an_impossible_value_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_users_recipe_file_is_found(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from trimtab.grpo.recipes import quickstart as longer\n")
    assert find_recipe(f"{file}:longer")() == find_recipe("quickstart")()
    with pytest.raises(ValueError, match="has no attribute 'shorter'"):
        find_recipe(f"{file}:shorter")


def test_a_task_and_its_rewards_may_lie_in_a_file_which_is_run_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "runs = []\n"
        "@dataclass\n"
        "class Task:\n"
        "    judge: object = None\n"
        "def rank(answers): return [0.0]\n"
    )
    domain = Domain(task=f"{file}:Task", group_rewards={"rank": f"{file}:rank"})
    load(f"{file}:runs").append("once")
    task = domain.load_task(judge=1, other=2)
    assert (type(task), task.judge) == (load(f"{file}:Task"), 1) and load(f"{file}:runs") == ["once"]
    assert domain.load_group_rewards() == {"rank": load(f"{file}:rank")} and domain.load_process_rewards() == {}


@pytest.mark.parametrize(
    "path", ["", "math", "math:", ":sqrt", "nowhere:x", "math:nothing", "missing.py:f", "config.py:"]
)
def test_an_import_path_that_leads_nowhere_is_told(path):
    with pytest.raises(ValueError, match=f"import path is module:name or path/to/file.py:name.*got {path!r}"):
        load(path)


def test_what_breaks_inside_a_users_file_is_not_hidden_and_can_be_mended(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("f = 1 / 0")
    with pytest.raises(ZeroDivisionError):
        load(f"{file}:f")
    file.write_text("f = 2  # of another size, so that no cached bytecode is taken for it")
    assert load(f"{file}:f") == 2


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run"):
        Config.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"steps": "many"}')
    with pytest.raises(ValueError, match="not a configuration of this version"):
        Config.load(tmp_path / "config.json")


def test_configuration_and_recipes_import_no_torch():
    code = "import sys, trimtab.grpo.recipes, trimtab.grpo.commands.cli"
    code += "; assert not {'torch', 'ray', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
