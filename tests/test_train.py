"""The main loop on real engines: a short cold start, a few steps, then a kill and a resume."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.environments.json_lines import read_json_lines
from trimtab.grpo.config import Config
from trimtab.grpo.recipes import quickstart
from trimtab.grpo.runs.folder import RunFolder
from trimtab.grpo.train import prepare

STEPS = 3
PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
TRIMTAB = [sys.executable, "-c", "import sys; from trimtab.grpo.commands.cli import main; sys.exit(main())"]


def short() -> Config:
    """The quickstart in small: enough cold start for well-formed answers, and every domain in every step."""
    config = quickstart()
    return replace(
        config,
        domains={name: replace(domain, prompts=3) for name, domain in config.domains.items()},
        cold_start=replace(config.cold_start, steps=80),
        sampling=replace(config.sampling, max_tokens=48),
        group_size=4,
        minibatches=2,
        steps=STEPS,
        save_every=1,
        held_out=3,
    )


def documented() -> re.Pattern[str]:
    """The names in the first column of the tables of the page on metrics."""
    cells = " ".join(re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE))
    names = "|".join(map(re.escape, re.findall(r"`(.+?)`", cells)))
    return re.compile(names.replace("DOMAIN", f"(?:{'|'.join(short().domains)})").replace("PART", r"\w+"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    """A run to its end; its cold start is what the other tests start from."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert prepare(short(), Path("runs/whole"), resume=False).train() == 0
    return RunFolder(home / "runs" / "whole")


def test_a_run_records_every_step_and_ends_with_scores(finished):
    rows = finished.metrics()
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert row["trained_trajectories"] > 0
        assert row["route_coverage"] == 1.0 and row["refused"] == 0
        assert row["mismatch_kl"] < 1e-8, "on unchanged weights the ratio is 1"
        assert {"reward/reasoning", "reward/agent", "reward/alignment"} <= row.keys()
        assert [key for key in row if not documented().fullmatch(key)] == []
    assert [row["step"] for row in finished.ledger()] == list(range(STEPS))
    for ledger, row in zip(finished.ledger(), rows, strict=True):
        assert len(ledger["prompts"]) == 9 == len({prompt["name"] for prompt in ledger["prompts"]})
        assert sum(prompt["trained"] for prompt in ledger["prompts"]) == row["trained_trajectories"]
    (start,) = [row for _, row in read_json_lines(finished.path / "history.jsonl")]
    assert start["step"] == 0 and start["versions"]["torch"] and start["changed"] == {}
    held_out = finished.held_out()
    assert held_out["before"]["score"].keys() == held_out["after"]["score"].keys() == short().domains.keys()
    assert "alignment/judge_agreement" in held_out["after"]["parts"]
    episode = json.loads((finished.path / "episodes" / "step-00000.jsonl").read_text().splitlines()[0])
    assert episode["messages"][-1]["role"] == "assistant"


def test_a_run_replays_selections_and_measures_a_domain_that_it_does_not_train(finished, tmp_path):
    every = short().domains
    domains = {"reasoning": every["reasoning"], "agent": replace(every["agent"], prompts=0)}
    start = str(finished.checkpoints.all()[-1])
    config = replace(short(), model=start, domains=domains, keep_selection=True, steps=1)
    assert prepare(config, tmp_path / "run", resume=False).train() == 0
    run = RunFolder(tmp_path / "run")
    (row,) = run.metrics()
    assert row["mismatch_kl"] < 1e-8 and row["lost/reasoning"] == 0 and row["indexer_grad_norm"] > 0
    assert {"selection/ids", "selection/fp8_ids", "selection/fp8_mass"} <= row.keys()
    assert [key for key in row if key.endswith("/agent")] == []
    after = run.held_out()["after"]
    assert after["score"].keys() == after["tokens"].keys() == domains.keys() and min(after["tokens"].values()) > 1


def test_a_killed_and_resumed_run_repeats_its_later_steps(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished.path.parent.parent)
    copy = RunFolder(tmp_path / "killed")
    shutil.copytree(finished.path, copy.path)
    shutil.rmtree(copy.checkpoints.latest())  # killed between the checkpoint of step 2 and that of step 3
    whole, ledger = finished.metrics()[-1], finished.ledger()
    assert prepare(Config.load(copy.config), copy.path, resume=True).train() == 0
    rows = copy.metrics()
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert copy.ledger() == ledger
    again = rows[-1]
    timed = ("seconds/", "tokens_per_s/", "memory/", "kl/", "masked/", "clip_", "drift_", "entropy/")
    exact = [key for key in whole if "/" in key and not key.startswith(timed)] + ["sampled_tokens", "kept_mean"]
    assert {key: again[key] for key in exact} == {key: whole[key] for key in exact}
    for key in ("kl", "grad_norm", "indexer_kl", "drift_p90"):
        assert again[key] == pytest.approx(whole[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_cleanly(number, finished, tmp_path):
    config = replace(short(), model=str(finished.checkpoints.latest()), steps=50, save_every=50)
    path = tmp_path / "interrupted"
    script = tmp_path / "recipe.py"
    config.save(tmp_path / "config.json")
    script.write_text(
        "from pathlib import Path\nfrom trimtab.grpo.config import Config\n"
        f"def recipe():\n    return Config.load(Path({str(tmp_path / 'config.json')!r}))\n"
    )
    words = [*TRIMTAB, "train", f"{script}:recipe", "--out", str(path)]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 200
    while not (path / "metrics.jsonl").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.5)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output and "--resume" in output
    folder = RunFolder(path)
    assert len(folder.metrics()) == json.loads((folder.checkpoints.latest() / "state.json").read_text())["step"]
