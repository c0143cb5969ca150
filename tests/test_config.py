import subprocess
import sys
from dataclasses import replace

import pytest

from trimtab.grpo.config import ColdStart, Config, Domain, LossSettings, Rollout
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
        (lambda: Domain(task="x:y", prompts=0), "prompts must be at least 1"),
        (lambda: Domain(task="x:y", length_soft=9, length_hard=9), "length_soft must lie"),
        (lambda: Rollout(actors=0), "actors must be at least 1"),
        (lambda: ColdStart(vocab_size=100), "vocab_size must be at least"),
        (lambda: Domain(task="nowhere:Task").load_task(), "import path"),
        (lambda: Domain(task="json:Nothing").load_task(), "import path"),
        (lambda: find_recipe("nonsense"), "no recipe named 'nonsense'"),
        (lambda: find_recipe("missing.py:f"), "does not exist"),
    ],
)
def test_an_impossible_value_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_users_recipe_file_is_found(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from trimtab.grpo.recipes import quickstart as longer\n")
    assert find_recipe(f"{file}:longer")() == find_recipe("quickstart")()
    with pytest.raises(ValueError, match="no function named 'shorter'"):
        find_recipe(f"{file}:shorter")


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run"):
        Config.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"steps": "many"}')
    with pytest.raises(ValueError, match="not a configuration of this version"):
        Config.load(tmp_path / "config.json")


def test_configuration_and_recipes_import_no_torch():
    code = "import sys, trimtab.grpo.recipes, trimtab.grpo.cli; assert not {'torch', 'ray', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
