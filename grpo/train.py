"""The main loop: play, pack, train, synchronise, log. Read it from `Run.train` down."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console

from trimtab.grpo.batch import Trajectory, trajectories
from trimtab.grpo.config import Config
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.cost.flops import Learns, Work
from trimtab.grpo.cost.ledger import Plan
from trimtab.grpo.cost.meter import Meter
from trimtab.grpo.cost.shape import shape_of
from trimtab.grpo.policy.lora import adapt, load_adapter
from trimtab.grpo.policy.policy import Policy, load_policy
from trimtab.grpo.results.display import LiveTable, held_out_table
from trimtab.grpo.results.intervals import mean_interval
from trimtab.grpo.runs.changes import changes
from trimtab.grpo.runs.checkpoints import step_of
from trimtab.grpo.runs.folder import RunFolder, remedy
from trimtab.grpo.runs.ledger import ledger_row
from trimtab.grpo.runs.record import record_start
from trimtab.grpo.runs.saving import Saving
from trimtab.grpo.runs.signals import Stop, until_stopped
from trimtab.grpo.sampling.lost import LostGroups, TooManyLost, without_advantage
from trimtab.grpo.sampling.mixture import PlayedBatch, draw_held_out, draw_step, part_means, prompt_scores, scores
from trimtab.grpo.sampling.players import Players
from trimtab.grpo.sampling.scores import ExpectedParts
from trimtab.grpo.setup.prepare import complete
from trimtab.grpo.stages.cold_start import cold_start
from trimtab.grpo.trainer import Trainer
from trimtab.rewards import bounds
from trimtab.rewards.sandbox import isolation
from trimtab.rollout.checkpoint import read_config
from trimtab.rollout.types import Group

HELD_OUT_SAMPLES = 4


def prepare(config: Config, path: Path, *, resume: bool) -> "Run":
    """Check everything that can be checked before the first minute is spent.

    Raises:
        ValueError: a checkpoint, task, size or run folder that is missing or unfit.
    """
    if not resume:
        if path.exists():
            raise ValueError(f"{path} exists already; continue it with `trimtab train {path} --resume`")
        config, plan = complete(config)
        return Run(config, path, plan)
    folder = RunFolder.open(path)
    changed = changes(Config.load(folder.config), config)
    config, plan = complete(config)
    with folder.lock():
        return Run(config, path, plan, Resumed(folder.checkpoints.latest(), changed))


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on, and with which settings changed."""

    checkpoint: Path | None
    """None: nothing was saved, so it starts from its model again."""
    changed: Mapping[str, Any]

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint else 0


@dataclass(frozen=True, slots=True)
class Run:
    """A checked run, ready to start."""

    config: Config
    path: Path
    plan: Plan
    resumed: Resumed | None = None

    def train(self) -> int:
        """Run to the last step, or to the step during which a signal comes. Returns the exit code.

        Raises:
            Exception: of a reward, a judge, an engine: the last whole step is saved.
        """
        return until_stopped(self._train, lambda: remedy(self.path))

    def _train(self, console: Console, stop: Stop) -> int:
        config = self.config
        if torch.cuda.is_available():
            console.print(self.plan.ledger.table(self.plan, torch.cuda.mem_get_info()[0]))
        if not config.model:
            config = replace(config, model=str(cold_start(config, console)))
        clock = Clock(torch.cuda.synchronize if torch.cuda.is_available() else None)
        resumed = self.resumed or Resumed(None, {})
        with ExitStack() as stack:
            folder = RunFolder(self.path) if self.resumed else RunFolder.create(self.path, config)
            stack.enter_context(folder.lock())
            console.print(f"run: {folder.path}")
            console.print(f"sandbox: {isolation()}", soft_wrap=True)
            folder.go_on(config, resumed.step)
            record_start(folder.path, resumed.step, resumed.changed)
            players = stack.enter_context(Players.start(config, folder.path, clock))
            stop.listen()
            start = resumed.checkpoint or Path(config.model)
            policy, references = load_policies(config, start)  # on the CPU, while the engines start
            console.print(players.wait_until_ready())
            trainer = load_trainer(config, folder, policy, references, clock, resumed.checkpoint)
            players.update(trainer, resumed.step)
            parts = ExpectedParts(config)
            if resumed.step == 0:
                folder.save_held_out(before=held_out(players, config, parts))
            merge = config.lora.rank > 0 and config.lora.merge
            saving = Saving(folder, trainer, resumed.step, model=Path(config.model), merge=merge)
            with LiveTable(config, console) as table, saving.on_failure():
                learns: Learns = "adapters" if config.lora.rank else "all"
                meter = Meter(
                    shape_of(read_config(config.model)), clock, learns=learns, learn_indexer=config.indexer_kl > 0
                )
                lost = LostGroups(config)
                for step in range(resumed.step, config.steps):
                    with stop.after_the_step():
                        table.show(one_step(config, folder, trainer, players, meter, saving, lost, parts, step))
                        due = (step + 1) % config.save_every == 0 or step + 1 == config.steps or stop.asked()
                        with clock.phase("saving"):
                            saving.after_step(due=due)
                            if due:
                                folder.keep_within(config.run_gib)
                    if stop.asked():
                        console.print(f"stopped after step {step + 1}; {remedy(folder.path)}")
                        return stop.exit_code
            folder.save_held_out(after=held_out(players, config, parts))
            if not saving.save() or (owing := folder.owing()):
                wrong = f"could not be written ({owing})" if saving.saved == config.steps else "has no last checkpoint"
                raise OSError(f"the run is over, but its folder {wrong}; make room")
        report(folder, config, console)
        return 0


def one_step(
    config: Config,
    folder: RunFolder,
    trainer: Trainer,
    players: Players,
    meter: Meter,
    saving: Saving,
    lost: LostGroups,
    parts: ExpectedParts,
    step: int,
) -> dict[str, Any]:
    """Play a rollout batch with the current weights, train on it, hand the new weights to the engines."""
    meter.start()
    draws = draw_step(config, players.tasks, step)
    played = players.play(draws, config.group_size)
    folder.save_episodes(step, played.groups)
    folder.log_lost(step, played.lost)
    shares = lost.add(draws, played)
    parts.add(played.groups)
    batch = trajectories(played.groups, {name: domain.loss for name, domain in config.domains.items()})
    metrics = {"step": step} | rollout_metrics(played, config) | shares
    training = [trajectory for trajectory in batch if trajectory.has_gradient]
    metrics["trained_trajectories"] = len(training)
    players.rest()
    if training:
        trainer.resume()
        metrics |= trainer.train_on(batch, step)
    taught = any(domain.loss.surrogate for domain in config.domains.values())
    if taught and not any(trajectory.advantage for trajectory in batch):
        print(f"trimtab: step {step + 1}: {without_advantage(draws, played, kl=bool(training))}", file=sys.stderr)
    saving.trained(step + 1)
    try:
        metrics |= players.update(trainer, step + 1)
    finally:  # the step is trained, whatever becomes of the engines
        metrics["engine_restarts"] = players.pool.restarts
        metrics["requests_given_up"] = players.pool.given_up
        metrics["checkpoint_failures"] = saving.failures
        metrics |= players.judge.metrics() if players.judge else {}
        metrics |= {f"bound/{name}": count for name, count in bounds.counts().items()}
        metrics |= meter.metrics(work_of(training, config), sampled_tokens=metrics.get("sampled_tokens", 0))
        folder.log_ledger(ledger_row(step, draws, played.groups, training))
        folder.log(metrics)
    trainer.accelerator.log(metrics, step=step)
    return metrics


def work_of(batch: Sequence[Trajectory], config: Config) -> Work:
    """What a batch asks of the model, for the meter."""
    segments = [segment for trajectory in batch for segment in trajectory.segments]
    return Work(
        lengths=[len(segment.token_ids) for segment in segments],
        sampled=sum(len(segment.logp) for segment in segments),
        kept=sum(len(segment.kept_ids) for segment in segments) if config.keep_sampling_mask else None,
    )


def held_out(players: Players, config: Config, parts: ExpectedParts) -> dict[str, Any]:
    """Scores and reward parts on the held-out prompts, with the 95 % intervals of the scores over prompts, and the mean
    of the tokens sampled in an episode."""
    played = players.play(draw_held_out(config, players.tasks), HELD_OUT_SAMPLES)
    parts.add(played.groups)
    for name in config.domains:
        if not any(group.domain == name for group in played.groups):
            raise TooManyLost(name, "no held-out prompt could be scored", played.lost)
    by_prompt = prompt_scores(played.groups, config)
    return {
        "score": scores(played.groups, config),
        "interval": {name: mean_interval([*found.values()]) for name, found in by_prompt.items()},
        "parts": part_means(played.groups),
        "prompts": by_prompt,
        "tokens": {name: float(np.mean(counts)) for name, counts in sampled_tokens(played.groups).items()},
        "samples": HELD_OUT_SAMPLES,
    }


def load_policies(config: Config, start: Path) -> tuple[Policy, dict[str, Policy]]:
    """The policy as it starts, and the references that the KL of a domain is taken to, by the domain's teacher."""
    adapted = config.lora.rank > 0
    policy = load_policy(Path(config.model) if adapted else start, checkpointing=config.checkpoint_activations)
    if adapted:
        lora = config.lora
        policy = adapt(policy, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=config.seed)
        if start != Path(config.model):
            load_adapter(policy, start)
    needed = [one for one in config.references if one or not adapted]  # without adapters it is its own reference
    return policy, {teacher: load_policy(Path(teacher or config.model)) for teacher in needed}


def load_trainer(
    config: Config,
    folder: RunFolder,
    policy: Policy,
    references: Mapping[str, Policy],
    clock: Clock,
    checkpoint: Path | None,
) -> Trainer:
    """The trainer, as it was when the checkpoint was written."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=list(config.trackers) or None, project_dir=folder.path
    )
    if accelerator.num_processes > 1:
        raise ValueError(f"training runs in one process in this version, got {accelerator.num_processes}")
    if config.trackers:
        accelerator.init_trackers("trimtab", init_kwargs={})
    trainer = Trainer(config, policy, None, accelerator, clock, teachers=references)
    if checkpoint is not None:
        trainer.load_optimizer(checkpoint)
    return trainer


def rollout_metrics(played: PlayedBatch, config: Config) -> dict[str, Any]:
    """Rewards by domain, and what the recording says of the sampler."""
    episodes = [episode for group in played.groups for episode in group.episodes]
    segments = [segment for episode in episodes for segment in episode.segments]
    recording = sum(one.kind == "recording" for one in played.lost)
    without_routes = sum(one.kind == "recording" and "route" in one.reason for one in played.lost)
    metrics: dict[str, Any] = {
        "episodes": len(episodes),
        "voided": len(played.lost) - recording,
        "refused": recording,
    }
    if not segments:
        return metrics
    kept = np.concatenate([np.diff(segment.kept_offsets) for segment in segments])
    for name in config.domains:
        metrics |= domain_metrics(name, [group for group in played.groups if group.domain == name])
    metrics |= part_means(played.groups)
    metrics |= {
        "route_coverage": len(episodes) / (len(episodes) + without_routes),
        "routes/bytes": sum(segment.routes.nbytes for segment in segments),
        "selections/bytes": sum(segment.selected.nbytes for segment in segments),
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


def domain_metrics(name: str, groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and lengths of one domain; nothing where none of its groups is left."""
    if not groups:
        return {}
    rewards = [[episode.reward for episode in group.episodes] for group in groups]
    (lengths,) = sampled_tokens(groups).values()
    return {
        f"reward/{name}": float(np.mean([reward for group in rewards for reward in group])),
        f"reward_std/{name}": float(np.mean([np.std(group) for group in rewards])),
        f"equal/{name}": float(np.mean([len(set(group)) == 1 for group in rewards])),
        f"length/{name}": float(np.mean(lengths)),
    }


def sampled_tokens(groups: Sequence[Group]) -> dict[str, list[int]]:
    """By domain, the tokens sampled in each episode."""
    found: dict[str, list[int]] = {}
    for group in groups:
        counts = [sum(len(segment.logp) for segment in episode.segments) for episode in group.episodes]
        found.setdefault(group.domain, []).extend(counts)
    return found


def report(folder: RunFolder, config: Config, console: Console) -> None:
    """The end of a run: scores before and after, and where things are."""
    results = folder.held_out()
    console.print(held_out_table(results["before"], results["after"]))
    for name in ("before", "after"):
        agreement = {k: v for k, v in results[name]["parts"].items() if k.endswith("/judge_agreement")}
        for part, value in agreement.items():
            console.print(f"judge's agreement with ground truth, {part.partition('/')[0]}, {name}: {value:.1%}")
    console.print(f"metrics      {folder.path / 'metrics.jsonl'}")
    console.print(f"episodes     {folder.path / 'episodes'}")
    console.print(f"checkpoint   {folder.checkpoints.all()[-1]}")
