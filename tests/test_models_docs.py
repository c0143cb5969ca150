"""The page on models: its code runs, its commands are commands, its tables are what the code says."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import tyro
from accelerate import Accelerator
from safetensors.torch import load_file
from test_ledger import H100, QWEN, settings
from test_lora import DENSE, LORA
from test_rollout_template_forms import MODES
from test_trainer import CONFIG
from tiny import save_tiny

from trimtab.grpo.config import Config, load
from trimtab.grpo.cost.ledger import choose
from trimtab.grpo.policy.families import ARCHITECTURES
from trimtab.grpo.policy.lora import adapt
from trimtab.grpo.policy.policy import load_policy
from trimtab.grpo.recipes import find_recipe
from trimtab.grpo.trainer import Trainer
from trimtab.rollout.formats.syntax import PRESETS

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^    trimtab (.+)$", PAGE, re.MULTILINE)
TABLES = [
    [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if "---" not in row]
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
]
FAMILIES, TEMPLATES, FITS = TABLES
NAME = re.compile(r"`(\w+ForCausalLM)`")


@pytest.fixture(scope="module", autouse=True)
def processes_of_this_file() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_recipe_and_the_syntax_of_the_page_are_what_its_commands_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("\n\n".join(BLOCKS[:2]))
    trains = [shlex.split(command)[1:] for command in COMMANDS if command.startswith("train")]
    assert len(trains) >= 4
    for target, *options in trains:
        words = [option for option in options if option != "--check"]
        config = tyro.cli(Config, default=find_recipe(target)(), args=words)
        assert not config.syntax or load(config.syntax).call_open == "[CALL]"
    with pytest.raises(ValueError, match="a name and a JSON object"):
        load("mine.py:CALLS").split("[CALL]count [1][/CALL]", {})
    with pytest.raises(ValueError):
        load("mine.py:CALLS").split("[CALL]count[/CALL]", {})


def test_peft_loads_an_adapter_as_the_page_says_and_merges_it_as_the_trainer_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("BASE", "Qwen2ForCausalLM")
    trainer = Trainer(CONFIG, adapt(load_policy(Path("BASE")), **LORA), None, Accelerator(cpu=True))
    trainer.train_on(DENSE, step=0)
    checkpoint = Path("runs/NAME/checkpoints/step-00050")
    checkpoint.mkdir(parents=True)
    trainer.save(checkpoint)
    trainer.save_merged(Path("ours"))
    exec(compile(BLOCKS[2], "docs/models.md", "exec"), {})
    theirs, ours, base = (load_file(f"{folder}/model.safetensors") for folder in ("merged", "ours", "BASE"))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-6)
    assert any(not torch.equal(weight, base[name]) for name, weight in ours.items())


def test_every_supported_family_stands_in_the_table():
    assert {name for row in FAMILIES for name in NAME.findall(row[0])} == set(ARCHITECTURES)


def test_the_table_of_templates_is_what_the_templates_can_do():
    modes = TEMPLATES[0][2:]
    found = {
        name: [mode for mode, cell in zip(modes, row[2:], strict=True) if cell]
        for row in TEMPLATES[1:]
        for name in row[0].split(", ")
    }
    assert found == {name: played.split() for name, played in MODES.items()}


def test_every_preset_is_named():
    named = re.search(r"a preset \((.*?)\)", PAGE, re.DOTALL)[1]
    assert re.findall(r"`(.+?)`", named) == list(PRESETS)


@pytest.mark.parametrize("row", FITS[1:], ids=lambda row: row[0])
def test_the_table_of_what_fits_is_the_ledgers(row):
    shape = QWEN[row[0].rpartition("-")[2]]
    for options, said in zip(FITS[0][1:], row[1:], strict=True):
        words = options.strip("`").split() if options.startswith("`") else []
        config = tyro.cli(Config, default=settings(), args=words)
        try:
            plan = choose(config, shape, H100)
            found = f"{'asleep' if plan.sleep else 'awake'}, {plan.windows}"
        except ValueError:
            found = "refused"
        assert found == said, options
