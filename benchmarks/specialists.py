"""From a dense model to a mixed one over six small domains, and what else the same tokens could have done.

    python benchmarks/specialists.py run        three seeds, on a GPU; the same command goes on
    python benchmarks/specialists.py tables     of the seeds that are whole

A seed is a pipeline for the beginning, and tracks behind it, some of them side by side: a specialist for each domain;
the domains mixed, straight from the beginning; one after another. Then, from the specialists: their answers, one
model, mixed RL, and a long-reasoning variant beside it; and on-policy distillation. Straight and sequence play as many
episodes as specialists, distillation and mixed RL together.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from shapes import card
from six_domains import domains

from trimtab.grpo import pipeline
from trimtab.grpo.config import Config, Domain, LossSettings, Rollout
from trimtab.grpo.pipeline import Pipeline
from trimtab.grpo.recipes import long_reasoning
from trimtab.grpo.stages.config import Blank, Conversion, Demonstrations, Distillation, Indexer, Supervised
from trimtab.rewards.sandbox import isolation
from trimtab.rollout.types import Sampling

SIX = ("mathematics", "logic", "programming", "agent", "mending", "searching")
WINDOW = 1024
AT_ONCE = 4
"""Tracks side by side on a GPU: each has a trainer, an engine and a Ray of its own, and twelve stood in each other's
way on 16 cores."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    conversations: int = 12000
    tokens_per_step: int = 4096
    steps: tuple[int, int, int] = (900, 150, 300)
    """Of pre-training, warm-up and sparse training."""
    specialist: int = 12
    mixed: int = 12
    straight: int = 30
    """Batches of 8 prompts a domain: specialists 12, distillation 6, mixed 12."""
    distilled: int = 96
    sft: int = 60
    held_out: int = 32
    group: int = 8
    prompts: int = 8
    at_least: float = 1.0
    """What an answer has earned that is distilled."""


TINY = Size(
    conversations=1000,
    tokens_per_step=1024,
    steps=(150, 4, 20),
    specialist=1,
    mixed=1,
    straight=1,
    distilled=8,
    sft=2,
    held_out=2,
    group=2,
    prompts=2,
    at_least=0.0,
)
"""That it runs."""


def beginning(size: Size, seed: int) -> Pipeline:
    """From nothing to a sparse policy that knows what the six domains look like."""
    supervised = Supervised(
        form="conversations",
        data=("stage:demonstrations",),
        optimizer="muon",
        weight_decay=0.01,
        prompt_weight=0.5,
        tokens_per_step=size.tokens_per_step,
        lr=3e-3,
        max_len=WINDOW,
        held_out=64,
        save_every=10_000,
        seed=seed,
    )
    dense, warm_up, sparse = (replace(supervised, steps=steps) for steps in size.steps)
    return Pipeline(
        stages={
            "demonstrations": Demonstrations(domains=domains(), conversations=size.conversations, seed=seed),
            "blank": Blank(
                shape="trimtab.grpo.stages.shapes:quickstart_dense", data=("stage:demonstrations",), vocab_size=1024
            ),
            "dense": replace(dense, model="stage:blank", random_weights=True),
            "converted": Conversion(
                model="stage:dense", indexer=Indexer(index_topk=64, index_n_heads=4, index_head_dim=32, seed=seed)
            ),
            "warm_up": replace(
                warm_up, model="stage:converted", dense_attention=True, learns="indexer", lr_end_share=1.0
            ),
            "sparse": replace(sparse, model="stage:warm_up", lr=1e-3),
        }
    )


def rl(size: Size, seed: int, model: str, trained: Sequence[str] = SIX, *, steps: int) -> Config:
    """RL over some of the domains, measured on all. What is answered with thinking and without trains as both."""
    every = domains()
    for name, domain in every.items():
        kind = name.removesuffix("_direct")
        prompts = size.prompts // 2 if f"{kind}_direct" in every else size.prompts
        every[name] = replace(domain, prompts=prompts if kind in trained else 0)
    return Config(
        model=model,
        domains=every,
        steps=steps,
        lr=3e-4,
        group_size=size.group,
        held_out=size.held_out,
        save_every=10_000,
        rollout=Rollout(max_len=WINDOW, kv_cache_mib=1024),
        sampling=Sampling(max_tokens=128),
        sandbox="limits" if isolation().startswith(("none", "limits")) else "isolated",
        seed=seed,
    )


def first_tracks(size: Size, seed: int, base: Path) -> dict[str, Pipeline]:
    """What needs the beginning alone."""
    sparse = newest(base / "sparse")
    straight = rl(size, seed, sparse, steps=size.straight)
    tracks = {"straight": Pipeline(stages={"straight": straight})}
    before = sparse
    chain = {}
    for name in SIX:
        tracks[name] = Pipeline(stages={name: rl(size, seed, sparse, (name,), steps=size.specialist)})
        chain[f"then_{name}"] = rl(size, seed, before, (name,), steps=size.straight)
        before = f"stage:then_{name}"
    return tracks | {"sequence": Pipeline(stages=chain)}


def last_tracks(size: Size, seed: int, base: Path, specialists: Path) -> dict[str, Pipeline]:
    """What needs the specialists."""
    sparse = newest(base / "sparse")
    teachers = {name: newest(specialists / name / name) for name in SIX}
    start = rl(size, seed, sparse, steps=size.mixed)
    taught: dict[str, Domain] = {
        name: replace(domain, teacher=teachers[name.removesuffix("_direct")]) for name, domain in start.domains.items()
    }
    mixed = replace(start, model="stage:sft")
    own = LossSettings(beta=1.0, surrogate=False)
    student = {name: replace(domain, loss=own) for name, domain in taught.items()}
    supervised = beginning(size, seed).stages["sparse"]
    assert isinstance(supervised, Supervised)
    return {
        "distilled": Pipeline(
            stages={
                "distil": Distillation(
                    domains=taught,
                    prompts=size.distilled,
                    prompts_at_once=size.distilled,
                    rollout=start.rollout,
                    sampling=start.sampling,
                    sandbox=start.sandbox,
                    at_least=size.at_least,
                    max_tokens=192,
                    seed=seed,
                ),
                "sft": replace(supervised, model=sparse, data=("stage:distil",), steps=size.sft, lr=3e-4, held_out=4),
                "mixed": mixed,
                "long": long_reasoning(mixed, ("mathematics", "logic")),
            }
        ),
        "on_policy": Pipeline(stages={"on_policy": replace(start, kl="full", domains=student)}),
    }


def newest(stage: Path) -> str:
    """The last checkpoint of a finished stage."""
    return str(max((stage / "checkpoints").glob("step-*[0-9]")).resolve())


class Tracks:
    """Tracks of several seeds side by side, each in a process of its own; what is there already is not made again."""

    def __init__(self, home: Path, at_once: int, tiny: bool):
        self._home, self._tiny = home, tiny
        self._pool, self._jobs = ThreadPoolExecutor(at_once), list[subprocess.Popen[bytes]]()

    def seed(self, seed: int) -> bool:
        """Everything of one seed, in the order in which it can be made. Whether all ended well."""

        def start(*names: str) -> dict[str, Future[bool]]:
            return {name: self._pool.submit(self._track, seed, name) for name in names}

        def well(tracks: Mapping[str, Future[bool]], *names: str) -> bool:
            return all(tracks[name].result() for name in names or tracks)

        if not well(start("base")):
            return False
        first = start("sequence", *SIX, "straight")
        last = start("distilled", "on_policy") if well(first, *SIX) else {}
        return well(first) and bool(last) and well(last)

    def _track(self, seed: int, name: str) -> bool:
        folder = self._home / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "track", "--seeds", str(seed), "--out", str(self._home), "--track", name]
        with (folder / f"{name}.log").open("a") as log:
            job = subprocess.Popen(
                [*command, *(["--tiny"] if self._tiny else [])], stdout=log, stderr=subprocess.STDOUT
            )
            self._jobs.append(job)
            well = job.wait() == 0
        print(f"seed {seed}, {name}: {'done' if well else f'failed, see {folder / name}.log'}", flush=True)
        return well

    def stop(self, *_: Any) -> None:
        """Each saves what it has; the same command goes on."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for job in self._jobs:
            if job.poll() is None:
                job.terminate()


def run(home: Path, seeds: Sequence[int], *, tiny: bool) -> None:
    """All of all seeds."""
    tracks = Tracks(home, AT_ONCE if card().gib > 16 else 1, tiny)
    signal.signal(signal.SIGTERM, tracks.stop)
    with ThreadPoolExecutor(len(seeds)) as side_by_side:
        if not all(side_by_side.map(tracks.seed, seeds)):
            raise SystemExit("not everything is there; the same command goes on")


def track(size: Size, seed: int, home: Path, name: str) -> int:
    folder = home / f"seed{seed}"
    if name == "base":
        return pipeline.run(beginning(size, seed), folder / name, Console(width=120))
    last = name in ("distilled", "on_policy")
    base = folder / "base"
    tracks = last_tracks(size, seed, base, folder) if last else first_tracks(size, seed, base)
    return pipeline.run(tracks[name], folder / name, Console(width=120))


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pipeline.json").read_text())


def held_out(stage: Path, when: str = "after") -> dict[str, Any]:
    return json.loads((stage / "held_out.json").read_text())[when]


def tables(home: Path) -> None:
    """Every table, over the seeds that are whole."""
    seeds = sorted(
        folder for folder in home.glob("seed*") if (folder / "distilled" / "long" / "held_out.json").is_file()
    )
    if not seeds:
        raise SystemExit(f"{home} has no finished seed")
    names = list(domains())
    print(f"{len(seeds)} seeds; means, in brackets the standard deviation over seeds where it exceeds 0.02\n")

    def show(title: str, rows: Mapping[str, tuple[str, str, str]]) -> None:
        """rows: by what they are, track, stage, and before or after."""
        print(f"\n{title}\n")
        print(f"| | {' | '.join(names)} | mean of six |")
        print(f"| --- |{' --- |' * (len(names) + 1)}")
        for label, (where, stage, when) in rows.items():
            found = [held_out(seed / where / stage, when)["score"] for seed in seeds]
            cells = [spread([one[name] for one in found]) for name in names]
            print(f"| {label} | {' | '.join(cells)} | {spread([fmean(one[n] for n in SIX) for one in found])} |")

    show(
        "Specialists, distilled, mixed",
        {"cold start": ("straight", "straight", "before")}
        | {f"specialist: {name}": (name, name, "after") for name in SIX}
        | {
            "distilled": ("distilled", "mixed", "before"),
            "distilled, then mixed RL": ("distilled", "mixed", "after"),
            "mixed RL straight from the cold start": ("straight", "straight", "after"),
            "one after another": ("sequence", f"then_{SIX[-1]}", "after"),
            "on-policy distillation": ("on_policy", "on_policy", "after"),
        },
    )
    show("One after another: what is forgotten", {f"then {n}": ("sequence", f"then_{n}", "after") for n in SIX})
    print("\n| after the distilled model | score | tokens | score | tokens |\n| --- | --- | --- | --- | --- |")
    for label, stage, when in (
        ("distilled", "mixed", "before"),
        ("mixed RL", "mixed", "after"),
        ("long reasoning", "long", "after"),
    ):
        found = [held_out(seed / "distilled" / stage, when) for seed in seeds]
        cells = [
            cell
            for name in ("mathematics", "logic")
            for cell in (
                spread([one["score"][name] for one in found]),
                f"{fmean(one['tokens'][name] for one in found):.1f}",
            )
        ]
        print(f"| {label} | {' | '.join(cells)} |")
    print("\n| track | tokens sampled, thousands | seconds |\n| --- | --- | --- |")
    for name in (*SIX, "distilled", "straight", "sequence", "on_policy"):
        stages = [state(seed / name).values() for seed in seeds]
        sampled = [sum(row["tokens"] or 0 for row in rows if row["kind"] != "Supervised") for rows in stages]
        seconds = fmean(sum(row["seconds"] for row in rows) for rows in stages)
        print(f"| {name} | {fmean(sampled) / 1000:.0f} | {seconds:.0f} |")


def spread(values: Sequence[float]) -> str:
    middle = fmean(values)
    deviation = (sum((value - middle) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5
    return f"{middle:.2f}" + (f" ({deviation:.2f})" if deviation > 0.02 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "track", "tables"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/specialists"))
    parser.add_argument("--track")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    size = TINY if options.tiny else Size()
    match options.what:
        case "run":
            run(options.out, options.seeds, tiny=options.tiny)
        case "track":
            raise SystemExit(track(size, options.seeds[0], options.out, options.track))
        case "tables":
            tables(options.out)


if __name__ == "__main__":
    main()
