"""The quickstart over several seeds, or with each stabiliser off in turn: tables for README.

    python benchmarks/quickstart.py seeds                 three seeds, cold start included
    python benchmarks/quickstart.py ablation --steps 12   one cold start, each stabiliser off in turn

Every run is a `trimtab train` of its own, whose output goes to runs/benchmark.log; what the tables say is read from
the runs' files.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import psutil

DOMAINS = ("reasoning", "agent", "alignment")
NO_DELTA = [word for domain in DOMAINS for word in (f"--domains.{domain}.loss.delta", "None")]
ABLATIONS: dict[str, list[str]] = {
    "all on": [],
    "Keep Routing off": ["--no-keep-routing"],
    "Keep Sampling Mask off": ["--no-keep-sampling-mask"],
    "sequence mask off": NO_DELTA,
    "k3 instead of the unbiased KL": ["--kl", "k3"],
}


WATCH_EVERY_S = 5.0  # reading the memory of a dozen processes costs a tenth of a second


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished run."""

    folder: Path
    seconds: float
    peak_gib: float

    @property
    def held_out(self) -> dict:
        return json.loads((self.folder / "held_out.json").read_text())

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def run(options: list[str]) -> Outcome:
    """Train in a process of its own and watch the memory of all its descendants."""
    Path("runs").mkdir(exist_ok=True)
    before = set(Path("runs").glob("quickstart-*"))
    started = time.perf_counter()
    log = (Path("runs") / "benchmark.log").open("a")
    process = subprocess.Popen([Path(sys.executable).with_name("trimtab"), "train", "quickstart", *options], stdout=log)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(WATCH_EVERY_S)
    if process.returncode:
        sys.exit(f"the run with {' '.join(options) or 'no options'} failed with code {process.returncode}")
    (folder,) = set(Path("runs").glob("quickstart-*")) - before
    return Outcome(folder, time.perf_counter() - started, peak / 2**30)


def memory(pid: int) -> int:
    """Bytes of a process and its descendants; memory that several share is split among them (PSS)."""
    total = 0
    try:
        for process in (root := psutil.Process(pid), *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:  # one of them ended while we looked
        pass
    return total


def seeds(options: list[str]) -> None:
    print_machine()
    print("| seed | " + " | ".join(f"{domain} before → after" for domain in DOMAINS) + " | minutes | peak memory |")
    print("| --- " * (len(DOMAINS) + 3) + "|")
    rows, notes = [], []
    for seed in (0, 1, 2):
        done = run(["--seed", str(seed), "--cold-start.seed", str(seed), *options])
        before, after = (done.held_out[when]["score"] for when in ("before", "after"))
        rows.append({domain: after[domain] - before[domain] for domain in DOMAINS})
        notes.append(f"seed {seed}: {health(done.folder)}")
        cells = [f"{before[d]:.3f} → {after[d]:.3f} ({after[d] - before[d]:+.3f})" for d in DOMAINS]
        print(f"| {seed} | {' | '.join(cells)} | {done.seconds / 60:.1f} | {done.peak_gib:.1f} GiB |", flush=True)
    print("\n" + "\n".join(notes))
    print("least rise: " + ", ".join(f"{domain} {min(row[domain] for row in rows):+.3f}" for domain in DOMAINS))


def health(folder: Path) -> str:
    """A run's stabilisers and speed, each a mean over its steps, and the judge's agreement with ground truth."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = json.loads((folder / "held_out.json").read_text())
    before, after = (held_out[when]["parts"]["alignment/judge_agreement"] for when in ("before", "after"))
    figures = {
        "mismatch KL": f"{mean(row['mismatch_kl'] for row in rows):.1e}",
        "largest log ratio": f"{max(row['mismatch_log_ratio_max'] for row in rows):.1e}",
        "masked": f"{mean(row['masked'] for row in rows):.2%}",
        "kept ids": f"{mean(row['kept_mean'] for row in rows):.2f}",
        "singletons": f"{mean(row['kept_singletons'] for row in rows):.0%}",
        "rollout tok/s": f"{mean(row['tokens_per_s/rollout'] for row in rows):.0f}",
        "train tok/s": f"{mean(row['tokens_per_s/train'] for row in rows if 'tokens_per_s/train' in row):.0f}",
        "judge agrees": f"{before:.0%} before, {after:.0%} after",
    }
    return ", ".join(f"{name} {figure}" for name, figure in figures.items())


def ablation(options: list[str]) -> None:
    print_machine()
    print("| variant | mismatch KL | masked | KL | grad norm | " + " | ".join(f"held-out {d}" for d in DOMAINS) + " |")
    print("| --- " * (len(DOMAINS) + 5) + "|")
    for name, switches in ABLATIONS.items():
        done = run([*switches, *options])
        rows = done.metrics
        figures = [f"{mean(row['mismatch_kl'] for row in rows):.1e}"]
        figures += [f"{mean(row['masked'] for row in rows):.2%}", f"{mean(row['kl'] for row in rows):.4f}"]
        figures += [f"{mean(row['grad_norm'] for row in rows):.3f}"]
        before, after = (done.held_out[when]["score"] for when in ("before", "after"))
        figures += [f"{after[d]:.3f} ({after[d] - before[d]:+.3f})" for d in DOMAINS]
        print(f"| {name} | {' | '.join(figures)} |", flush=True)


def print_machine() -> None:
    memory_gib = psutil.virtual_memory().total / 2**30
    print(f"{os.cpu_count()} cores ({platform.machine()}), {memory_gib:.0f} GiB, Python {platform.python_version()}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("seeds", "ablation"))
    arguments, rest = parser.parse_known_args()
    {"seeds": seeds, "ablation": ablation}[arguments.table](rest)
