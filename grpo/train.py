"""The main loop: play, pack, train, synchronise, log. Read it from `Run.train` down."""

import asyncio
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console

from trimtab.grpo import services
from trimtab.grpo.batch import trajectories
from trimtab.grpo.config import Config, resolved
from trimtab.grpo.display import LiveTable, held_out_table
from trimtab.grpo.mixture import Draw, PlayedBatch, draw_held_out, draw_step, load_tasks, part_means, play_draws, scores
from trimtab.grpo.policy.policy import check_checkpoint, load_policy
from trimtab.grpo.resolve import resolve
from trimtab.grpo.run import RunFolder, replace_text, step_of_checkpoint
from trimtab.grpo.stages.cold_start import cold_start
from trimtab.grpo.trainer import Trainer
from trimtab.rollout.engine.engine import EngineConfig, read_config
from trimtab.rollout.engine.pool import Pool, gpu_share
from trimtab.rollout.formats.template import load_format

HELD_OUT_SAMPLES = 4
INTERRUPTED = 130  # the shell's code for Ctrl-C


def prepare(config: Config, path: Path, *, resume: bool) -> "Run":
    """Check everything that can be checked before the first minute is spent.

    Raises:
        ValueError: a checkpoint, task or run folder that is missing or unfit.
    """
    for checkpoint in filter(None, (config.model, config.judge.checkpoint)):
        check_checkpoint(Path(checkpoint))
    shape = read_config(config.model) if config.model else {}
    config = resolve(config, shape, gpu=torch.cuda.is_available())
    load_tasks(config, **dict.fromkeys(services.SERVICES))
    services.check(config)
    for checkpoint in filter(None, (config.model, config.judge.checkpoint)):
        engine_config(config, checkpoint)
        load_format(checkpoint)
    if resume:
        RunFolder.open(path).latest_checkpoint()
    elif path.exists():
        raise ValueError(f"{path} exists already; continue it with `trimtab train {path} --resume`")
    return Run(config, path, resume)


class NothingPlayed(RuntimeError):
    """Not one group could be scored: a judge, a tool or an engine is broken, and going on would not mend it."""

    def __init__(self, played: PlayedBatch):
        reasons = "; ".join(list(dict.fromkeys((*played.voided, *played.refused)))[:3]) or "no reason is known"
        lost = f"{len(played.voided)} voided and {len(played.refused)} refused"
        super().__init__(f"no group could be scored: {lost} episodes, the first because: {reasons}")


@dataclass(frozen=True, slots=True)
class Run:
    """A checked run, ready to start."""

    config: Config
    path: Path
    resume: bool

    def train(self) -> int:
        """Run to the last step, or to the step during which Ctrl-C comes. Returns the exit code."""
        console = Console()
        config = self.config
        if not config.model:
            config = replace(config, model=str(cold_start(config, console)))
        with stop_after_interrupt(console) as stopping, ExitStack() as stack:
            folder = RunFolder.open(self.path) if self.resume else RunFolder.create(self.path, config)
            console.print(f"run: {folder.path}")
            trainer, first = load_trainer(config, folder, resume=self.resume)
            players = stack.enter_context(Players.start(config, folder, trainer, first))
            if first == 0:
                save_held_out(folder, before=players.held_out())
            table = stack.enter_context(LiveTable(list(config.domains), config.steps, console))
            for step in range(first, config.steps):
                metrics = one_step(config, folder, trainer, players, step)
                table.show(metrics)
                done = step + 1
                if done % config.save_every == 0 or done == config.steps or stopping():
                    save(folder, trainer, done)
                if stopping():
                    console.print(f"stopped after step {done}; go on with: trimtab train {folder.path} --resume")
                    return INTERRUPTED
            save_held_out(folder, after=players.held_out())
        report(folder, config, console)
        return 0


def one_step(config: Config, folder: RunFolder, trainer: Trainer, players: "Players", step: int) -> dict[str, Any]:
    """Play a rollout batch with the current weights, train on it, hand the new weights to the engines."""
    started = time.perf_counter()
    played = players.play(draw_step(config, players.tasks, step), config.group_size)
    seconds_rollout = time.perf_counter() - started
    folder.save_episodes(step, played.groups)
    folder.log_lost(step, voided=played.voided, refused=played.refused)
    batch = trajectories(played.groups, {name: domain.loss for name, domain in config.domains.items()})
    metrics = {"step": step} | rollout_metrics(played, config, seconds_rollout)
    metrics["trained_trajectories"] = len(batch)
    if batch:
        metrics |= trainer.train_on(batch, step)
    synchronised = time.perf_counter()
    players.pool.load_weights(trainer.weights(), step + 1)
    metrics["seconds_sync"] = time.perf_counter() - synchronised
    metrics["seconds"] = time.perf_counter() - started
    metrics["engine_restarts"] = players.pool.restarts
    metrics |= players.judge.metrics() if players.judge else {}
    folder.log(metrics)
    trainer.accelerator.log(metrics, step=step)
    return metrics


class Players:
    """The engines that sample, the model that judges, and the tasks they play."""

    def __init__(self, config: Config, pool: Pool, judge: services.Judging | None, runner: asyncio.Runner):
        self._config, self.pool, self.judge, self._runner = config, pool, judge, runner
        self._chat = load_format(config.model)
        self.tasks = load_tasks(config, **(judge.services if judge else {}))

    @classmethod
    @contextmanager
    def start(cls, config: Config, folder: RunFolder, trainer: Trainer, version: int) -> Iterator["Players"]:
        """Start the engines, a judge's only if a task asks for one; those that sample get the trainer's weights."""
        with ExitStack() as stack:
            runner = stack.enter_context(asyncio.Runner())
            judges = services.is_needed(config)
            engine_judges = judges and not config.judge.model
            share = config.rollout.gpus_per_actor
            share = gpu_share(config.rollout.actors + engine_judges) if share is None else share
            pool = Pool(engine_config(config, config.model), config.rollout.actors, share)
            stack.callback(pool.close)
            judge = None
            if engine_judges:
                settings = engine_config(config, config.judge.checkpoint or config.model)
                judge = stack.enter_context(services.engine(config, settings, share))
            elif judges:
                judge = stack.enter_context(services.endpoint(config, folder.path))
            pool.wait_until_ready()
            if version:
                pool.load_weights(trainer.weights(), version)
            yield cls(config, pool, judge, runner)

    def play(self, draws: list[Draw], group_size: int) -> PlayedBatch:
        return self._runner.run(play_draws(draws, self._config, self.pool.generate, self._chat, group_size))

    def held_out(self) -> dict[str, Any]:
        """Scores and reward parts on the held-out prompts."""
        played = self.play(draw_held_out(self._config, self.tasks), HELD_OUT_SAMPLES)
        for name in self._config.domains:
            if not any(group.domain == name for group in played.groups):
                raise NothingPlayed(played)
        return {"score": scores(played.groups, self._config), "parts": part_means(played.groups)}


def engine_config(config: Config, model: str) -> EngineConfig:
    rollout = config.rollout
    return EngineConfig(
        model=model,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[config.precision or "fp32"],
        max_model_len=resolved(rollout.max_len),
        kv_cache_bytes=(rollout.kv_cache_mib or 256) * 2**20,
        max_num_seqs=rollout.max_num_seqs,
        seed=config.seed,
    )


def load_trainer(config: Config, folder: RunFolder, *, resume: bool) -> tuple[Trainer, int]:
    """The trainer, and the first step it has to do."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=list(config.trackers) or None, project_dir=folder.path
    )
    if accelerator.num_processes > 1:
        raise ValueError(f"training runs in one process in this version, got {accelerator.num_processes}")
    if config.trackers:
        accelerator.init_trackers("trimtab", init_kwargs={})
    load = partial(load_policy, checkpointing=config.checkpoint_activations)
    frozen = load_policy(Path(config.model)).requires_grad_(False) if config.needs_reference else None
    if not resume:
        return Trainer(config, load(Path(config.model)), frozen, accelerator), 0
    checkpoint = folder.latest_checkpoint()
    trainer = Trainer(config, load(checkpoint), frozen, accelerator)
    trainer.load_optimizer(checkpoint)
    first = step_of_checkpoint(checkpoint)
    folder.rewind(first)
    return trainer, first


def save(folder: RunFolder, trainer: Trainer, step: int) -> None:
    """Write a checkpoint; a full disk costs this one, not the run."""
    tokenizer = Path(trainer.config.model)

    def write(path: Path) -> None:
        trainer.save(path)
        for file in (*tokenizer.glob("*token*"), *tokenizer.glob("chat_template*")):
            shutil.copy(file, path)

    try:
        folder.save_checkpoint(step, write)
    except OSError as error:
        print(f"trimtab: the checkpoint of step {step} could not be written ({error}); going on", file=sys.stderr)


def rollout_metrics(played: PlayedBatch, config: Config, seconds: float) -> dict[str, Any]:
    """Rewards by domain, and what the recording says of the sampler."""
    episodes = [episode for group in played.groups for episode in group.episodes]
    segments = [segment for episode in episodes for segment in episode.segments]
    if not segments:
        raise NothingPlayed(played)
    kept = np.concatenate([np.diff(segment.kept_offsets) for segment in segments])
    without_routes = sum("route" in reason for reason in played.refused)
    rewards = {name: [episode.reward for episode in episodes if episode.domain == name] for name in config.domains}
    metrics: dict[str, Any] = {f"reward/{name}": float(np.mean(r)) for name, r in rewards.items() if r}
    metrics |= part_means(played.groups)
    metrics |= {
        "episodes": len(episodes),
        "voided": len(played.voided),
        "refused": len(played.refused),
        "route_coverage": len(episodes) / (len(episodes) + without_routes),
        "route_bytes": sum(segment.routes.nbytes for segment in segments),
        "kept_mean": float(kept.mean()),
        "kept_p99": float(np.quantile(kept, 0.99)),
        "kept_singletons": float((kept == 1).mean()),
        "sampled_tokens": len(kept),
        "truncated": float(np.mean([episode.ended == "length" for episode in episodes])),
        "malformed": float(np.mean([episode.ended == "malformed" for episode in episodes])),
        "resets": float(np.mean([len(episode.resets) for episode in episodes])),
        "seconds_rollout": seconds,
        "rollout_tokens_per_s": len(kept) / seconds,
    }
    return metrics


def save_held_out(folder: RunFolder, **results: dict[str, Any]) -> None:
    file = folder.path / "held_out.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    replace_text(file, json.dumps(known | results, indent=2) + "\n")


def report(folder: RunFolder, config: Config, console: Console) -> None:
    """The end of a run: scores before and after, and where things are."""
    results = json.loads((folder.path / "held_out.json").read_text())
    console.print(held_out_table(results["before"]["score"], results["after"]["score"], config.held_out))
    for name in ("before", "after"):
        agreement = {k: v for k, v in results[name]["parts"].items() if k.endswith("/judge_agreement")}
        for part, value in agreement.items():
            console.print(f"judge's agreement with ground truth, {part.partition('/')[0]}, {name}: {value:.1%}")
    console.print(f"metrics      {folder.path / 'metrics.jsonl'}")
    console.print(f"episodes     {folder.path / 'episodes'}")
    console.print(f"checkpoint   {folder.latest_checkpoint()}")


@contextmanager
def stop_after_interrupt(console: Console) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks for a stop after the current step, the second one stops at once."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        console.print("stopping after this step; Ctrl-C again stops at once and loses it")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
