"""The main loop: play, pack, train, synchronise, log. Read it from `Run.train` down."""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console

from trimtab.grpo.batch import trajectories
from trimtab.grpo.config import Config
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.cost.ledger import Plan
from trimtab.grpo.cost.meter import Meter
from trimtab.grpo.display import LiveTable, held_out_table
from trimtab.grpo.mixture import PlayedBatch, draw_held_out, draw_step, part_means, prompt_scores, scores
from trimtab.grpo.players import Players
from trimtab.grpo.policy.lora import adapt, load_adapter
from trimtab.grpo.policy.policy import Policy, load_policy
from trimtab.grpo.run import RunFolder, replace_text, step_of_checkpoint
from trimtab.grpo.setup.prepare import complete
from trimtab.grpo.stages.cold_start import cold_start
from trimtab.grpo.trainer import Trainer

HELD_OUT_SAMPLES = 4
INTERRUPTED = 130  # the shell's code for Ctrl-C


def prepare(config: Config, path: Path, *, resume: bool) -> "Run":
    """Check everything that can be checked before the first minute is spent.

    Raises:
        ValueError: a checkpoint, task, size or run folder that is missing or unfit.
    """
    config, plan = complete(config)
    if resume:
        check_resumed(RunFolder.open(path), config)
    elif path.exists():
        raise ValueError(f"{path} exists already; continue it with `trimtab train {path} --resume`")
    return Run(config, path, resume, plan)


def check_resumed(folder: RunFolder, config: Config) -> None:
    """Find out whether a run can go on with these settings.

    Raises:
        ValueError: there is no checkpoint, or it holds other weights than these settings train.
    """
    checkpoint, before = folder.latest_checkpoint(), folder.load_config().lora
    if (before.rank, before.targets) != (config.lora.rank, config.lora.targets):
        raise ValueError(
            f"{checkpoint} was made with lora.rank {before.rank} and lora.targets {' '.join(before.targets)}, which "
            "cannot change when a run goes on: leave them out, or start a new run"
        )


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
    plan: Plan

    def train(self) -> int:
        """Run to the last step, or to the step during which Ctrl-C comes. Returns the exit code."""
        console = Console()
        config = self.config
        if torch.cuda.is_available():
            console.print(self.plan.ledger.table(self.plan, torch.cuda.mem_get_info()[0]))
        if not config.model:
            config = replace(config, model=str(cold_start(config, console)))
        clock = Clock(torch.cuda.synchronize if torch.cuda.is_available() else None)
        with stop_after_interrupt(console) as stopping, ExitStack() as stack:
            folder = (RunFolder.reopen if self.resume else RunFolder.create)(self.path, config)
            console.print(f"run: {folder.path}")
            players = stack.enter_context(Players.start(config, folder.path, clock))
            start = folder.latest_checkpoint() if self.resume else Path(config.model)
            policies = load_policies(config, start)  # on the CPU, while the engines start
            console.print(players.wait_until_ready())
            trainer, first = load_trainer(config, folder, *policies, clock, resume=self.resume)
            players.update(trainer, first)
            if first == 0:
                save_held_out(folder, before=held_out(players, config))
            meter = Meter(config, clock)
            table = stack.enter_context(LiveTable(config, console))
            for step in range(first, config.steps):
                metrics = one_step(config, folder, trainer, players, meter, step)
                table.show(metrics)
                done = step + 1
                if done % config.save_every == 0 or done == config.steps or stopping():
                    with clock.phase("saving"):
                        save(folder, trainer, done)
                if stopping():
                    console.print(f"stopped after step {done}; go on with: trimtab train {folder.path} --resume")
                    return INTERRUPTED
            save_held_out(folder, after=held_out(players, config))
        report(folder, config, console)
        return 0


def one_step(
    config: Config, folder: RunFolder, trainer: Trainer, players: Players, meter: "Meter", step: int
) -> dict[str, Any]:
    """Play a rollout batch with the current weights, train on it, hand the new weights to the engines."""
    meter.start()
    played = players.play(draw_step(config, players.tasks, step), config.group_size)
    folder.save_episodes(step, played.groups)
    folder.log_lost(step, voided=played.voided, refused=played.refused)
    batch = trajectories(played.groups, {name: domain.loss for name, domain in config.domains.items()})
    metrics = {"step": step} | rollout_metrics(played, config)
    metrics["trained_trajectories"] = len(batch)
    players.rest()
    if batch:
        trainer.resume()
        metrics |= trainer.train_on(batch, step)
    metrics |= players.update(trainer, step + 1)
    metrics["engine_restarts"] = players.pool.restarts
    metrics |= players.judge.metrics() if players.judge else {}
    metrics |= meter.metrics(metrics, batch)
    folder.log(metrics)
    trainer.accelerator.log(metrics, step=step)
    return metrics


def held_out(players: Players, config: Config) -> dict[str, Any]:
    """Scores and reward parts on the held-out prompts."""
    played = players.play(draw_held_out(config, players.tasks), HELD_OUT_SAMPLES)
    for name in config.domains:
        if not any(group.domain == name for group in played.groups):
            raise NothingPlayed(played)
    return {
        "score": scores(played.groups, config),
        "parts": part_means(played.groups),
        "prompts": prompt_scores(played.groups, config),
        "samples": HELD_OUT_SAMPLES,
    }


def load_policies(config: Config, start: Path) -> tuple[Policy, Policy | None]:
    """The policy as it starts, and the reference that the KL of a domain is taken to."""
    adapted = config.lora.rank > 0
    policy = load_policy(Path(config.model) if adapted else start, checkpointing=config.checkpoint_activations)
    if adapted:
        lora = config.lora
        policy = adapt(policy, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=config.seed)
        if start != Path(config.model):
            load_adapter(policy, start)
    needed = config.needs_reference and not adapted  # a policy without its adapters is its own reference
    return policy, load_policy(Path(config.model)) if needed else None


def load_trainer(
    config: Config, folder: RunFolder, policy: Policy, reference: Policy | None, clock: Clock, *, resume: bool
) -> tuple[Trainer, int]:
    """The trainer, and the first step it has to do."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=list(config.trackers) or None, project_dir=folder.path
    )
    if accelerator.num_processes > 1:
        raise ValueError(f"training runs in one process in this version, got {accelerator.num_processes}")
    if config.trackers:
        accelerator.init_trackers("trimtab", init_kwargs={})
    trainer = Trainer(config, policy, reference, accelerator, clock)
    if not resume:
        return trainer, 0
    checkpoint = folder.latest_checkpoint()
    trainer.load_optimizer(checkpoint)
    first = step_of_checkpoint(checkpoint)
    folder.rewind(first)
    return trainer, first


def save(folder: RunFolder, trainer: Trainer, step: int) -> None:
    """Write a checkpoint; a full disk costs this one, not the run."""
    tokenizer = Path(trainer.config.model)

    def write(path: Path) -> None:
        trainer.save(path)
        folders = [path]
        if trainer.config.lora.rank and trainer.config.lora.merge:
            folders.append(path / "merged")
            trainer.save_merged(folders[-1])
        for file in (*tokenizer.glob("*token*"), *tokenizer.glob("chat_template*")):
            for place in folders:
                shutil.copy(file, place)

    try:
        folder.save_checkpoint(step, write)
    except OSError as error:
        print(f"trimtab: the checkpoint of step {step} could not be written ({error}); going on", file=sys.stderr)


def rollout_metrics(played: PlayedBatch, config: Config) -> dict[str, Any]:
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
        "routes/bytes": sum(segment.routes.nbytes for segment in segments),
        "masks/bytes": sum(segment.kept_ids.nbytes + segment.kept_offsets.nbytes for segment in segments),
        "kept_mean": float(kept.mean()),
        "kept_p99": float(np.quantile(kept, 0.99)),
        "kept_singletons": float((kept == 1).mean()),
        "sampled_tokens": len(kept),
        "longest_answer": max(sum(len(segment.logp) for segment in episode.segments) for episode in episodes),
        "truncated": float(np.mean([episode.ended == "length" for episode in episodes])),
        "malformed": float(np.mean([episode.ended == "malformed" for episode in episodes])),
        "resets": float(np.mean([len(episode.resets) for episode in episodes])),
    }
    return metrics


def save_held_out(folder: RunFolder, **results: dict[str, Any]) -> None:
    file = folder.path / "held_out.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    replace_text(file, json.dumps(known | results, indent=2) + "\n")


def report(folder: RunFolder, config: Config, console: Console) -> None:
    """The end of a run: scores before and after, and where things are."""
    results = json.loads((folder.path / "held_out.json").read_text())
    console.print(held_out_table(results["before"], results["after"]))
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
