"""Pipelines: stages in order, skipped once done, gone on with after a kill, refused if they had other inputs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_supervised import write_texts
from tiny import save_tiny

from trimtab.grpo.config import Domain
from trimtab.grpo.pipeline import Pipeline, references, resolved, signature
from trimtab.grpo.recipes import PIPELINES
from trimtab.grpo.stages.config import Distillation, Supervised
from trimtab.grpo.start import load_settings

TRIMTAB = [sys.executable, "-c", "import sys; from trimtab.grpo.commands.cli import main; sys.exit(main())"]
RECIPE = """
from dataclasses import replace
from trimtab.grpo.pipeline import Pipeline
from trimtab.grpo.stages.config import Conversion, Indexer, Supervised

def stages():
    base = Supervised(model="dense", data=("texts.jsonl",), tokens_per_step=300, held_out=4, lr=1e-3, steps=STEPS)
    return Pipeline(stages={
        "continued": replace(base, save_every=2),
        "convert": Conversion(
            model="stage:continued", indexer=Indexer(index_topk=16, index_n_heads=4, index_head_dim=16)
        ),
        "warm_up": replace(base, model="stage:convert", dense_attention=True, learns="indexer", steps=4),
    })
"""


def pipeline(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*TRIMTAB, "pipeline", "mine.py:stages", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


def furnish(home: Path) -> Path:
    save_tiny(home / "dense", "DeepseekV3ForCausalLM")
    write_texts(home / "texts.jsonl")
    (home / "mine.py").write_text(RECIPE.replace("STEPS", "6"))
    return home


@pytest.fixture
def home(tmp_path) -> Path:
    return furnish(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A pipeline that nobody disturbs."""
    home = furnish(tmp_path_factory.mktemp("whole"))
    done = pipeline(cwd=home)
    assert done.returncode == 0, done.stderr
    return home / "runs" / "mine"


def weights(folder: Path) -> dict:
    (newest,) = sorted((folder / "checkpoints").iterdir())[-1:]
    return load_file(newest / "model.safetensors")


def test_stages_run_in_order_once_and_what_changed_is_refused(home):
    done = pipeline(cwd=home)
    assert done.returncode == 0, done.stderr
    state = json.loads((home / "runs" / "mine" / "pipeline.json").read_text())
    assert list(state) == ["continued", "convert", "warm_up"]
    assert state["warm_up"]["tokens"] > 4 * 300 and state["convert"]["tokens"] is None
    before, after = state["continued"]["figures"]["loss"]
    assert after < before and all(name in done.stdout for name in state)
    moments = {file: file.stat().st_mtime_ns for file in home.rglob("*.safetensors")}

    again = pipeline(cwd=home)
    assert again.returncode == 0 and "step 1/" not in again.stdout
    assert {file: file.stat().st_mtime_ns for file in home.rglob("*.safetensors")} == moments

    (home / "mine.py").write_text(RECIPE.replace("STEPS", "7"))
    refused = pipeline(cwd=home)
    assert refused.returncode == 2
    assert "stage continued was made with steps = 6, and the recipe now says 7: take another --out" in refused.stderr
    (home / "mine.py").write_text(RECIPE.replace("STEPS", "6"))
    write_texts(home / "texts.jsonl", rows=41)
    refused = pipeline(cwd=home)
    assert refused.returncode == 2 and "was made of another texts.jsonl than is there now" in refused.stderr
    write_texts(home / "texts.jsonl")
    with (home / "runs/mine/convert/model-indexer.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    refused = pipeline(cwd=home)
    assert refused.returncode == 2 and "stage warm_up was made of another stage:convert" in refused.stderr


@pytest.mark.parametrize("cut", ["continued", "warm_up"])
def test_a_pipeline_that_is_killed_goes_on_to_the_same_weights_and_leaves_nobody_behind(home, whole, cut):
    begun = subprocess.Popen(
        [*TRIMTAB, "pipeline", "mine.py:stages", "--out", "cut"],
        cwd=home,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics, deadline = home / "cut" / cut / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_bytes().splitlines()) >= 2):
        assert time.monotonic() < deadline and begun.poll() is None
        time.sleep(0.01)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    deadline = time.monotonic() + 60
    while any("cut" in words and "train" in words for words in commands(home)):
        assert time.monotonic() < deadline, "the stage lives on without its pipeline"
        time.sleep(0.05)
    done = pipeline("--out", "cut", cwd=home)
    assert done.returncode == 0, done.stderr
    for name in ("continued", "warm_up"):
        one, other = weights(whole / name), weights(home / "cut" / name)
        assert all((one[key] == other[key]).all() for key in one)


def test_a_kill_between_a_stage_and_its_entry_costs_nothing(home):
    """What was made whole is taken; a folder in which nothing was written yet begins anew."""
    state_file = home / "runs" / "mine" / "pipeline.json"
    assert pipeline(cwd=home).returncode == 0
    state = json.loads(state_file.read_text())
    made = (home / "runs/mine/convert/model-indexer.safetensors").stat().st_mtime_ns
    for name in ("convert", "warm_up"):
        del state[name]["output"]
    state_file.write_text(json.dumps(state))
    shutil.rmtree(home / "runs/mine/warm_up")
    (home / "runs/mine/warm_up/checkpoints").mkdir(parents=True)
    done = pipeline(cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "runs/mine/convert/model-indexer.safetensors").stat().st_mtime_ns == made
    assert "output" in json.loads(state_file.read_text())["warm_up"]


def commands(home: Path) -> list[str]:
    """Command lines of processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")) == home:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_ctrl_c_saves_the_stage_and_the_same_command_goes_on(home):
    begun = subprocess.Popen(
        [*TRIMTAB, "pipeline", "mine.py:stages"],
        cwd=home,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics, deadline = home / "runs/mine/continued/metrics.jsonl", time.monotonic() + 120
    while not metrics.is_file():
        assert time.monotonic() < deadline and begun.poll() is None
        time.sleep(0.01)
    os.killpg(begun.pid, signal.SIGINT)
    said, _ = begun.communicate(timeout=60)
    assert begun.returncode == 130 and "stage continued ended with code 130" in said
    assert pipeline(cwd=home).returncode == 0


def test_a_reference_becomes_the_output_it_names_wherever_it_stands():
    settings = Distillation(domains={"a": Domain(task="x:y", teacher="stage:rl")})
    assert list(references(settings)) == [("domains.a.teacher", "rl")]
    assert resolved(settings, {"rl": Path("runs/rl")}).domains["a"].teacher == "runs/rl"
    supervised = Supervised(model="stage:one", data=("a.jsonl", "stage:two"))
    found = resolved(supervised, {"one": Path("1"), "two": Path("2")})
    assert (found.model, found.data) == ("1", ("a.jsonl", "2"))


@pytest.mark.parametrize("name", PIPELINES)
def test_settings_of_every_stage_survive_their_file(name, tmp_path):
    for stage, settings in PIPELINES[name]().stages.items():
        (tmp_path / f"{stage}.json").write_text(settings.to_json())
        assert load_settings(tmp_path / f"{stage}.json") == settings


def test_a_signature_tells_contents_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = signature(tmp_path / "a")
    (tmp_path / "a" / "x").write_text("2")
    second = signature(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert len({first, second, signature(tmp_path / "a")}) == 3


def test_a_pipeline_of_nonsense_is_refused_when_it_is_made():
    one = Supervised(model="m", data=("d",))
    with pytest.raises(ValueError, match="at least one stage"):
        Pipeline(stages={})
    with pytest.raises(ValueError, match=r"stage b: model is stage:c, no earlier stage \(earlier are a\)"):
        Pipeline(stages={"a": one, "b": Supervised(model="stage:c"), "c": one})
    with pytest.raises(ValueError, match=r"stage '\.\./x': a name has letters"):
        Pipeline(stages={"../x": one})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("{'a': Supervised(model='none', data=('texts.jsonl',))}", "stage a: no checkpoint at none"),
        ("{'a': Supervised(model='dense', data=('no.jsonl',))}", "stage a: no.jsonl: no such file"),
        ("{'a': Supervised(model='dense')}", "stage a: data is empty"),
        ("{'a': Supervised(data=('texts.jsonl',))}", "stage a: model is empty"),
        ("{'a': Config(model='dense', domains={'b': Domain(task='no:no')})}", "stage a: an import path is module:name"),
        ("{'a': Distillation(domains={'b': Domain(task='json:loads')})}", "stage a: domain b has no specialist"),
    ],
)
def test_what_is_missing_is_told_before_the_first_stage(home, stages, message):
    imports = "from trimtab.grpo.config import Config, Domain\nfrom trimtab.grpo.stages.config import *\n"
    text = f"{imports}from trimtab.grpo.pipeline import Pipeline\ndef stages():\n    return Pipeline(stages={stages})\n"
    (home / "mine.py").write_text(text)
    done = pipeline(cwd=home)
    assert done.returncode == 2 and message in done.stderr
    assert not (home / "runs").exists()


def test_a_stage_that_fails_ends_the_pipeline_with_its_code(home):
    (home / "mine.py").write_text(RECIPE.replace("STEPS", "6").replace("held_out=4", "held_out=4000"))
    done = pipeline(cwd=home)
    assert done.returncode == 2 and "stage continued ended with code 2" in done.stdout
    assert "4000 of them are held out" in " ".join(done.stderr.split())


def test_an_index_topk_beyond_the_context_is_refused_before_the_first_stage(home):
    (home / "mine.py").write_text(RECIPE.replace("STEPS", "6").replace("index_topk=16", "index_topk=512"))
    done = pipeline(cwd=home)
    assert done.returncode == 2 and "index_topk is 512 and a sequence has 512 tokens at most" in done.stderr
    assert not (home / "runs").exists()
