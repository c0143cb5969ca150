"""The cold start beside other busy processes: tokens a second, as it runs and as it would with threads that spin.

    python benchmarks/neighbours.py            about 6 minutes on two cores
    python benchmarks/neighbours.py --steps 40 --repeats 2

A busy process is a loop in Python. Threads that wait for each other at the end of an operation spin before they sleep;
beside a busy process they spin for a core that another needs (grpo/commands/cli.py: SPINS). The variants take turns, so
that what else the machine does meets all of them; medians over the repeats.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
from statistics import median

PROGRAM = """
import sys, tempfile
from dataclasses import replace
from pathlib import Path
from rich.console import Console
from trimtab.grpo.commands.cli import quiet
quiet()
from trimtab.grpo.recipes import quickstart
from trimtab.grpo.stages.cold_start import train
whole = quickstart()
config = replace(whole, cold_start=replace(whole.cold_start, steps=int(sys.argv[1]), dense_share=1.0, warmup_share=0.0))
with tempfile.TemporaryDirectory() as folder:
    train(config, Path(folder), Console(width=200))
"""
VARIANTS = {"as it runs": {}, "threads spin": {"GOMP_SPINCOUNT": "300000"}}
"""By name, what the environment says; 300,000 rounds are what the library would do by itself."""


def tokens_a_second(steps: int, environment: dict[str, str], busy: int) -> float:
    """The last figure that the cold start tells, of its second half."""
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        argv = [sys.executable, "-c", PROGRAM, str(steps)]
        done = subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True, check=True)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    return float(re.findall(r"(\d+) tok/s", done.stdout.replace(",", ""))[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.repeats):
        for busy in options.busy:
            for name, environment in VARIANTS.items():
                found.setdefault((name, busy), []).append(tokens_a_second(options.steps, environment, busy))
    print(f"{os.cpu_count()} cores, {platform.machine()}; cold start, {options.steps} steps, tokens/s\n")
    print("| threads | alone |" + "".join(f" beside {busy} | slower |" for busy in options.busy[1:]))
    print("| --- |" + " --- |" * (2 * len(options.busy) - 1))
    for name in VARIANTS:
        alone = median(found[name, options.busy[0]])
        cells = f" {alone:,.0f} |"
        for busy in options.busy[1:]:
            beside = median(found[name, busy])
            cells += f" {beside:,.0f} | {alone / beside:.2f} x |"
        print(f"| {name} |{cells}")


if __name__ == "__main__":
    main()
