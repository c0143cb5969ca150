"""A run that is killed ten times against one that is not: ledger, metrics and weights side by side.

    python benchmarks/resume.py                      deterministic engines, then the usual ones; about 25 minutes
    python benchmarks/resume.py --modes deterministic --kills 10

Each run is the quickstart's recipe in small on the CPU. A kill is a SIGKILL to the driver and all its children at a
random moment: two of them while a checkpoint is being written, one in the evaluation before the first step. The run
goes on with `trimtab train RUN --resume`. Beside it stand two runs that nobody kills, as far as they agree.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import load_file

from trimtab.environments.json_lines import read_json_lines
from trimtab.grpo.config import Config
from trimtab.grpo.recipes import quickstart

STEPS = 12
MEASURED = ("seconds", "tokens_per_s/", "memory/", "judge_", "engine_restarts", "checkpoint_failures", "mfu", "bound/")
"""Beginnings of the names of metrics that are times, or count since the process began."""
SMALL = 1e-3
"""Metrics below this are compared as if they were so large: drifts of 1e-8 are rounding."""
TRIMTAB = [sys.executable, "-c", "import sys; from trimtab.grpo.commands.cli import main; sys.exit(main())"]


def config(deterministic: bool) -> Config:
    whole = quickstart()
    return replace(
        whole,
        domains={name: replace(domain, prompts=2) for name, domain in whole.domains.items()},
        cold_start=replace(whole.cold_start, steps=120),
        sampling=replace(whole.sampling, max_tokens=48),
        rollout=replace(whole.rollout, actors=1, deterministic=deterministic),
        group_size=4,
        minibatches=2,
        steps=STEPS,
        save_every=2,
        held_out=4,
    )


def start(target: str, *options: str) -> subprocess.Popen[bytes]:
    log = open("log.txt", "ab")  # noqa: SIM115 (the child's)
    return subprocess.Popen([*TRIMTAB, "train", target, *options], stdout=log, stderr=log)


def whole(recipe: str, out: str) -> Path:
    if code := start(recipe, "--out", out).wait():
        sys.exit(f"{out} ended with code {code}; see {Path('log.txt').resolve()}")
    return Path(out)


def killed(recipe: str, out: str, kills: int, rng: random.Random) -> tuple[Path, list[str]]:
    """The run, and where each kill found it."""
    folder, found = Path(out), []
    plans = ["the evaluation", "a checkpoint", "a checkpoint", "the start", *["a step"] * (kills - 4)]
    words = [recipe, "--out", out]
    for plan in plans:
        process, before = start(*words), steps_of(folder)
        wait = rng.uniform(0.0, {"the start": 8.0, "the evaluation": 2.0}.get(plan, 3.0))
        while process.poll() is None and not reached(plan, folder, before):
            time.sleep(0.0005)
        if plan != "a checkpoint":
            time.sleep(wait)
        if process.poll() is None:
            kill(process)
            found.append(f"in {plan} after {steps_of(folder)} steps")
        else:
            found.append(f"{plan} was over: the run had ended with {process.returncode}")
        words = [out, "--resume"] if (folder / "config.json").exists() else [recipe, "--out", out]
    if code := start(*words).wait():
        sys.exit(f"{out} ended with code {code}; see {Path('log.txt').resolve()}")
    return folder, found


def reached(plan: str, folder: Path, before: int) -> bool:
    """Whether a run is where it is to be killed, or a moment before."""
    match plan:
        case "a checkpoint":
            return any(folder.glob("checkpoints/*.partial"))
        case "the evaluation":
            return evaluating(folder)
        case "the start":
            return (folder / "history.jsonl").exists()
        case _:
            return steps_of(folder) > before or steps_of(folder) == STEPS


def evaluating(folder: Path) -> bool:
    """Whether the engines are ready and the first scores are not there yet."""
    text = Path("log.txt").read_text(errors="replace")
    return "engines: ready" in text.rpartition(f"run: {folder}")[2] and not (folder / "held_out.json").exists()


def steps_of(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and its children, engines included."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def rows(folder: Path, name: str) -> list[dict]:
    return [row for _, row in read_json_lines(folder / name)]


def compare(one: Path, two: Path) -> list[str]:
    """Prompts apart, sampled tokens apart, the largest relative difference of a metric, and of the weights."""
    ledgers = [rows(folder, "ledger.jsonl") for folder in (one, two)]
    prompts = [
        [(row["step"], p["name"], p.get("prompt")) for row in ledger for p in row["prompts"]] for ledger in ledgers
    ]
    tokens = [[p.get("tokens") for row in ledger for p in row["prompts"]] for ledger in ledgers]
    apart = len(set(prompts[0]) ^ set(prompts[1])) + sum(len(p) - len(set(p)) for p in prompts)
    sampled = sum(a != b for a, b in zip(*tokens, strict=True))
    worst, name = 0.0, "none"
    for left, right in zip(rows(one, "metrics.jsonl"), rows(two, "metrics.jsonl"), strict=True):
        for key in (left.keys() | right.keys()) - {"step"}:
            if key.startswith(MEASURED):
                continue
            a, b = left.get(key, float("nan")), right.get(key, float("nan"))
            difference = 0.0 if a == b else abs(a - b) / max(abs(a), abs(b), SMALL)
            if not difference <= worst:
                worst, name = difference, key
    finals = [load_file(folder / "checkpoints" / f"step-{STEPS:05d}" / "model.safetensors") for folder in (one, two)]
    weights = max(float(np.abs(finals[0][key] - finals[1][key]).max()) for key in finals[0])
    held_out = [json.loads((folder / "held_out.json").read_text())["after"]["score"] for folder in (one, two)]
    scores = max(abs(held_out[0][key] - held_out[1][key]) for key in held_out[0])
    return [str(apart), f"{sampled} of {len(tokens[0])}", f"{worst:.2g} ({name})", f"{weights:.2g}", f"{scores:.2g}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["deterministic", "usual"])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(tempfile.mkdtemp(prefix="resume-"))
    print(f"in {os.getcwd()}")
    print(
        "| engines | runs | prompts apart | groups whose tokens differ | metrics apart | weights apart | scores apart |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for mode in options.modes:
        config(mode == "deterministic").save(Path(f"{mode}.json"))
        Path(f"{mode}.py").write_text(
            "from pathlib import Path\nfrom trimtab.grpo.config import Config\n"
            f"def recipe():\n    return Config.load(Path({os.path.abspath(mode)!r} + '.json'))\n"
        )
        first = whole(f"{mode}.py:recipe", f"{mode}-first")
        second = whole(f"{mode}.py:recipe", f"{mode}-second")
        print(f"| {mode} | two that nobody kills | {' | '.join(compare(first, second))} |", flush=True)
        third, moments = killed(f"{mode}.py:recipe", f"{mode}-killed", options.kills, random.Random(options.seed))
        print(
            f"| {mode} | one and one killed {options.kills} times | {' | '.join(compare(first, third))} |", flush=True
        )
        for i, moment in enumerate(moments, 1):
            print(f"    kill {i}: {moment}")


if __name__ == "__main__":
    main()
