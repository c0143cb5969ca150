"""The same RL on a dense policy and on its sparse conversion, whose indexer learns, is frozen, or is replayed.

    python benchmarks/indexer_in_rl.py              three seeds, on two cores
    python benchmarks/indexer_in_rl.py --seeds 0

From nothing to a dense policy on conversations of two of the quickstart's domains, its conversion, warm-up and sparse
training, and as many steps more of the dense one; then four runs that differ in nothing else. A run's score is that of
64 held-out prompts a domain, four answers each.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from trimtab.grpo import pipeline
from trimtab.grpo.pipeline import Pipeline
from trimtab.grpo.recipes import quickstart, stages_quickstart
from trimtab.grpo.stages.config import Demonstrations

DOMAINS = ("reasoning", "agent")
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"model": "stage:dense_on"},
    "sparse, indexer learns": {"model": "stage:sparse"},
    "sparse, indexer frozen": {"model": "stage:sparse", "indexer_kl": 0.0},
    "sparse, selection replayed": {"model": "stage:sparse", "keep_selection": True},
}
COLOURS = dict(zip(VARIANTS, ("#888888", "#1f6fb4", "#d98032", "#4c9a5a"), strict=True))


def stages(steps: int, seed: int) -> Pipeline:
    """The quickstart pipeline's first stages, and a run for each variant."""
    found = stages_quickstart().stages
    domains = {name: quickstart().domains[name] for name in DOMAINS}
    first = {name: found[name] for name in ("demonstrations", "blank", "pretrain", "convert", "warm_up", "sparse")}
    first["demonstrations"] = Demonstrations(domains=domains, conversations=6000, seed=seed)
    for name in ("pretrain", "warm_up", "sparse"):
        first[name] = replace(first[name], seed=seed)
    first["dense_on"] = replace(first["sparse"], model="stage:pretrain")
    run = replace(quickstart(), domains=domains, steps=steps, save_every=4, seed=seed)
    return Pipeline(stages=first | {folder(name): replace(run, **changes) for name, changes in VARIANTS.items()})


def folder(variant: str) -> str:
    return variant.replace(", ", "-").replace(" ", "_")


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tables(homes: Sequence[Path], steps: int) -> None:
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "a CPU"
    print(f"\n{card}, {len(homes)} seeds, {steps} batches\n")
    print("| seed | policy | " + " | ".join(f"{name}, before → after" for name in DOMAINS) + " | mean of all |")
    print("| --- | --- |" + " --- |" * (len(DOMAINS) + 1))
    for home in homes:
        for name in VARIANTS:
            held_out = json.loads((home / folder(name) / "held_out.json").read_text())
            before, after = (held_out[when]["score"] for when in ("before", "after"))
            cells = [f"{before[domain]:.3f} → {after[domain]:.3f}" for domain in DOMAINS]
            print(f"| {home.name} | {name} | {' | '.join(cells)} | {fmean(after.values()):.3f} |")
    keys = ("selection/ids", "selection/mass", "selection/fp8_ids", "selection/fp8_mass")
    print("\n| policy | mismatch KL | indexer KL, first → last | ids alike | mass alike | FP8: ids | FP8: mass |")
    print("| --- |" + " --- |" * 6)
    for name in VARIANTS:
        runs = [metrics(home / folder(name)) for home in homes]
        mismatch = fmean(row["mismatch_kl"] for run in runs for row in run if "mismatch_kl" in row)
        first, last = (fmean(run[i].get("indexer_kl", 0.0) for run in runs) for i in (0, -1))
        shares = [[row[key] for run in runs for row in run if key in row] for key in keys]
        cells = [f"{mismatch:.1e}", f"{first:.3f} → {last:.3f}" if last else "-"]
        print(f"| {name} | {' | '.join(cells + [f'{fmean(one):.4f}' if one else '-' for one in shares])} |")


def plot(homes: Sequence[Path], file: Path) -> None:
    """Rewards by rollout batch: means over seeds, with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(DOMAINS), figsize=(8, 3.4), layout="constrained")
    for domain, axis in zip(DOMAINS, axes, strict=True):
        for name, colour in COLOURS.items():
            curves = [[row[f"reward/{domain}"] for row in metrics(home / folder(name))] for home in homes]
            by_batch = list(zip(*curves, strict=True))
            batches, middle = range(1, len(by_batch) + 1), [fmean(column) for column in by_batch]
            axis.plot(batches, middle, color=colour, label=name)
            axis.fill_between(batches, [*map(min, by_batch)], [*map(max, by_batch)], color=colour, alpha=0.12, lw=0)
        axis.set_title(f"reward, {domain}", fontsize=10)
        axis.set_xlabel("rollout batch")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("runs/indexer-in-rl"))
    options = parser.parse_args()
    homes = [options.out / f"seed{seed}" for seed in options.seeds]
    for seed, home in zip(options.seeds, homes, strict=True):
        if code := pipeline.run(stages(options.steps, seed), home, Console()):
            raise SystemExit(code)
    tables(homes, options.steps)
    plot(homes, options.out / "rewards.png")


if __name__ == "__main__":
    main()
