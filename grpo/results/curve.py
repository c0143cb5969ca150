"""The curve that a recipe is expected to follow, measured over seeds, and whether a run follows it. No torch here."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from math import sqrt
from pathlib import Path
from statistics import fmean, variance
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from trimtab.grpo.config import Config, flat

CURVES = Path(__file__).parent / "curves"
SMOOTH = 5
"""Steps of the mean that a reward is smoothed by: this step and those before it."""
WIDTH = 4.0
"""Half a band's width, in standard deviations of a run."""
MARGIN = 0.02
"""... and at least this much."""
TOLERATED = 0.05
"""Share of the steps that a run may be outside of the band."""
_PLACEMENT = (
    *("actors", "gpus_per_actor", "kv_cache_mib", "max_num_seqs", "graphs", "sleep", "deterministic"),
    *("requests_per_engine", "step_seconds", "max_restarts"),
)
FREE = (
    *("out", "seed", "trackers", "save_every", "run_gib", "sandbox", "precision", "offload", "tokens_per_microbatch"),
    *("checkpoint_activations", "lora.merge", *(f"rollout.{name}" for name in _PLACEMENT)),
)
"""Settings that place a run or pick its draws, but do not change what it learns."""


@dataclass(frozen=True, slots=True)
class Band:
    """Between which values runs of other seeds lie."""

    low: float
    high: float

    def where(self, value: float) -> Literal["in", "below", "above"]:
        return "below" if value < self.low else "above" if value > self.high else "in"


@dataclass(frozen=True, slots=True)
class Curve:
    """What runs of a recipe did. reward is by domain and step, smoothed; before and after are held-out scores."""

    recipe: str
    settings: Mapping[str, Any]
    reward: Mapping[str, tuple[Band, ...]]
    before: Mapping[str, Band]
    after: Mapping[str, Band]
    seeds: tuple[int, ...]
    machine: str
    made: str
    """The command that measured it."""

    def save(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Curve":
        """Read a curve that `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(f"{path} is not a curve of this version: {error}") from error


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run, finished or not, has logged."""

    config: Config
    metrics: tuple[Mapping[str, Any], ...]
    """By step."""
    before: Mapping[str, float]
    after: Mapping[str, float]
    """Held-out scores by domain; empty where there are none yet."""

    def reward(self, domain: str) -> list[float]:
        """The domain's reward by step, smoothed; a step in which none was scored repeats the one before."""
        values: list[float] = []
        for metrics in self.metrics:
            values.append(metrics.get(f"reward/{domain}", values[-1] if values else 0.0))
        return smoothed(values)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run lies to its curve."""

    steps: int
    """Steps compared."""
    outside: tuple[str, ...]
    """A line for every step and held-out score outside its band."""
    follows: bool
    """All held-out scores lie in their bands, and of each domain's steps all but a share of TOLERATED."""


def judge(curve: Curve, run: RunRecord) -> Verdict:
    """Compare a run with a curve that applies to it, as far as the run has come.

    Raises:
        ValueError: the run is too short to tell.
    """
    steps = min(len(run.metrics), *(len(bands) for bands in curve.reward.values()))
    if steps < SMOOTH:
        raise ValueError(f"too short to tell: {steps} steps, and {SMOOTH} are needed")
    rewards = [
        _outside((f"step {i}: reward {domain}", *pair) for i, pair in enumerate(zip(bands, values, strict=False), 1))
        for domain, bands in curve.reward.items()
        for values in [run.reward(domain)[:steps]]
    ]
    held_out = _outside(
        (f"held out {when}: {domain}", band, scores[domain])
        for when, bands, scores in (("before", curve.before, run.before), ("after", curve.after, run.after))
        for domain, band in bands.items()
        if domain in scores
    )
    follows = not held_out and all(len(lines) <= TOLERATED * steps for lines in rewards)
    return Verdict(steps, (*chain.from_iterable(rewards), *held_out), follows)


def _outside(values: Iterable[tuple[str, Band, float]]) -> list[str]:
    """A line for every value outside its band."""
    return [
        f"{what} {value:.3f} is {band.where(value)} the band {band.low:.3f} to {band.high:.3f}"
        for what, band, value in values
        if band.where(value) != "in"
    ]


def comparable(config: Config) -> dict[str, Any]:
    """The settings that decide what a run learns, by dotted name, as JSON has them."""
    settings = flat(json.loads(json.dumps(asdict(config))))
    made = re.sub(r"-[0-9a-f]{10}$", "", Path(settings["model"]).name)  # without the converter's hash
    return {name: value for name, value in settings.items() if name not in FREE} | {"model": made}


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Settings that differ, each as a phrase; one that the curve does not know yet is no difference."""
    for name, value in expected.items():
        if found.get(name) != value:
            yield f"{name} is {found.get(name)!r} and not {value!r}"


def curve_for(config: Config, curves: Path = CURVES) -> Curve:
    """The curve of the recipe that trains a run's tasks.

    Raises:
        ValueError: there is none, or it does not apply: the run's settings differ.
    """
    known = [Curve.load(file) for file in sorted(curves.glob("*.json"))]
    tasks = {name: domain.task for name, domain in config.domains.items()}
    for curve in known:
        if {name: curve.settings.get(f"domains.{name}.task") for name in curve.reward} == tasks:
            if changed := list(differences(curve.settings, comparable(config))):
                raise ValueError(f"the curve of {curve.recipe} does not apply to this run: {'; '.join(changed)}")
            return curve
    there = f"there are curves for {', '.join(curve.recipe for curve in known)}" if known else "none was measured yet"
    raise ValueError(f"no expected curve for a run over {', '.join(tasks)}: {there}")


def measure(runs: Sequence[RunRecord], *, recipe: str, machine: str, made: str) -> Curve:
    """The curve of finished runs that differ in their seeds.

    Raises:
        ValueError: fewer than two runs, of other settings, or of other lengths.
    """
    if len(runs) < 2 or any(comparable(run.config) != comparable(runs[0].config) for run in runs):
        raise ValueError(f"a curve needs two runs or more that differ in nothing but their seeds, got {len(runs)}")
    if unfinished := [run.config.out for run in runs if len(run.metrics) < run.config.steps or not run.after]:
        raise ValueError(f"a curve needs finished runs, and {len(unfinished)} of {len(runs)} are not")
    domains = list(runs[0].config.domains)
    return Curve(
        recipe=recipe,
        settings=comparable(runs[0].config),
        reward={name: bands([run.reward(name) for run in runs]) for name in domains},
        before={name: bands([[run.before[name]] for run in runs])[0] for name in domains},
        after={name: bands([[run.after[name]] for run in runs])[0] for name in domains},
        seeds=tuple(run.config.seed for run in runs),
        machine=machine,
        made=made,
    )


def bands(series: Sequence[Sequence[float]]) -> tuple[Band, ...]:
    """At each place mean +- max(MARGIN, WIDTH sd sqrt(1 + 1/R)) over R series.

    sd is that of one run, from the variance over the series pooled with up to SMOOTH places to either side: three runs
    alone say little about their spread. sqrt(1 + 1/R) is for a further run against the mean of R.
    """
    places = list(zip(*series, strict=True))
    variances = [variance(values) for values in places]
    found = []
    for i, values in enumerate(places):
        pooled = fmean(variances[max(0, i - SMOOTH) : i + SMOOTH + 1])
        half = max(MARGIN, WIDTH * sqrt(pooled * (1 + 1 / len(values))))
        found.append(Band(fmean(values) - half, fmean(values) + half))
    return tuple(found)


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with the SMOOTH - 1 before it."""
    return [fmean(values[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(values))]
