"""Whether a run follows the curve that its recipe is expected to follow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.grpo.config import Config
from trimtab.grpo.results.curve import CURVES, SMOOTH, RunRecord, curve_for, judge

SHOWN = 10
"""Lines of what lies outside, before the rest is counted."""


def check(path: Path, curves: Path = CURVES) -> int:
    """Compare a run's folder, finished or running, with its recipe's curve. Returns 0 if it follows it, else 1.

    Raises:
        ValueError: it is no run, there is no curve for it, its settings differ, or it is too short to tell.
    """
    run = read_run(path)
    curve = curve_for(run.config, curves)
    verdict = judge(curve, run)
    seeds = f"{len(curve.seeds)} seeds on {curve.machine}"
    print(f"{path}: {verdict.steps} steps, reward smoothed over {SMOOTH}, against {curve.recipe}'s curve ({seeds})")
    for line in verdict.outside[:SHOWN]:
        print(f"  {line}")
    if rest := verdict.outside[SHOWN:]:
        print(f"  and {len(rest)} more")
    print("the run lies in the band" if verdict.follows else "the run leaves the band")
    return 0 if verdict.follows else 1


def read_run(path: Path) -> RunRecord:
    """What the folder of a run holds.

    Raises:
        ValueError: it is not the folder of a run.
    """
    config = Config.load(path / "config.json")
    file = path / "held_out.json"
    held_out = json.loads(file.read_text()) if file.is_file() else {}
    before, after = (held_out.get(when, {}).get("score", {}) for when in ("before", "after"))
    return RunRecord(config, tuple(_rows(path / "metrics.jsonl")), before, after)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that may still grow: one that is not whole yet is the last."""
    if not file.is_file():
        return
    with file.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)
