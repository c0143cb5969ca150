"""The engines that sample, the model that judges, and the tasks they play."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from trimtab.grpo.config import Config, Rollout, resolved
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.sampling import services, sync
from trimtab.grpo.sampling.mixture import Draw, PlayedBatch, chat_of, load_tasks, play_draws
from trimtab.grpo.trainer import Trainer
from trimtab.rollout.checkpoint import policy_shape, read_config
from trimtab.rollout.engine.engine import EngineConfig
from trimtab.rollout.engine.pool import Limits, Pool, gpu_share
from trimtab.rollout.engine.weights import checksums
from trimtab.rollout.types import Request

SELECTION_TIMES_TOPK = 2
"""Tokens of the sequence that selections are compared on, at most, in multiples of index_topk."""
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class Players:
    """Plays draws with the policy's newest weights. Engines that sleep leave the GPU to the trainer between batches."""

    def __init__(
        self,
        config: Config,
        pool: Pool,
        judge: services.Judging | None,
        runner: asyncio.Runner,
        clock: Clock,
    ):
        self._config, self.pool, self.judge, self._runner, self._clock = config, pool, judge, runner, clock
        self._chat = chat_of(config, config.model)
        self._checkpoint = read_config(config.model)
        self._version = 0
        self._probe: Request | None = None
        self._longest = np.empty(0, np.int32)
        """The longest sequence of the batch before: what selections are compared on."""
        self.tasks = load_tasks(config, **(judge.services if judge else {}))

    @classmethod
    @contextmanager
    def start(cls, config: Config, folder: Path, clock: Clock) -> Iterator["Players"]:
        """Start the engines, those of the policy in the background; a judge's only if a task asks for one."""
        with ExitStack() as stack:
            runner = stack.enter_context(asyncio.Runner())
            judges = services.is_needed(config)
            engine_judges = judges and not config.judge.model
            share = config.rollout.gpus_per_actor
            share = gpu_share(config.rollout.actors + engine_judges) if share is None else share
            pool = Pool(
                replace(engine_config(config, config.model), keep_selection=config.keep_selection),
                config.rollout.actors,
                share,
                limits=limits(config.rollout),
            )
            stack.callback(pool.close)
            judge = None
            if engine_judges:
                settings = engine_config(config, config.judge.checkpoint or config.model, sleep=False)
                chat = chat_of(config, settings.model)
                judge = stack.enter_context(services.engine(config, settings, chat, share))
            elif judges:
                judge = stack.enter_context(services.endpoint(config, folder))
            yield cls(config, pool, judge, runner, clock)

    def wait_until_ready(self) -> str:
        """Return when the engines can serve, with what their start took; those that sleep while the policy trains do
        so until the first update.

        Raises:
            EngineError: one did not start.
        """
        self.pool.wait_until_ready()
        self.pool.sleep()
        slowest = max(self.pool.start_seconds, key=lambda parts: sum(parts.values()))
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in slowest.items())
        return f"engines: ready in {sum(slowest.values()):.1f} s ({parts})"

    def play(self, draws: list[Draw], group_size: int) -> PlayedBatch:
        """Play all draws; the prompt of one of them becomes the probe of later updates."""
        generate = self._clock.while_awaited("rollout", self.pool.generate)
        with self._clock.phase("rewards"):
            shape = policy_shape(self._checkpoint, self._version, keep_selection=self._config.keep_selection)
            played = self._runner.run(play_draws(draws, self._config, generate, self._chat, group_size, shape))
        if played.groups:
            segment = played.groups[0].episodes[0].segments[0]
            self._probe = sync.probe_of(segment, self._config.sampling)
            segments = (segment for group in played.groups for one in group.episodes for segment in one.segments)
            self._longest = max((segment.token_ids for segment in segments), key=len)
        return played

    def rest(self) -> None:
        """Leave the GPU to the trainer, where the ledger says that both do not fit."""
        with self._clock.phase("wake and sleep"):
            self.pool.sleep()

    def update(self, trainer: Trainer, version: int) -> dict[str, float]:
        """Hand the policy's weights over, wake, and check that every engine computes with them.

        Raises:
            WeightMismatch: one does not.
        """
        with self._clock.phase("weights"):
            self.pool.load_weights(trainer.stream, version)
            self._version = version
        with self._clock.phase("wake and sleep"):
            if self._config.rollout.sleep or self._config.offload != "none":
                trainer.rest()  # what torch keeps for the next update, and what offload names, are the cache's now
            self.pool.wake()
        if self._probe is None:
            return {}
        with self._clock.phase("weights"):
            difference = sync.check(
                self.pool,
                version,
                self._probe,
                precision=self._config.precision or "fp32",
                score=trainer.score,
                checksums=lambda: checksums(trainer.stream()),
            )
            found = {"probe_difference": difference}
            return found | self._selection(trainer) if version % self._config.save_every == 0 else found

    def _selection(self, trainer: Trainer) -> dict[str, float]:
        """How far engines and policy select the same keys; nothing where none of the sequences is long enough."""
        topk = self._checkpoint.get("index_topk") or 0
        ids = tuple(self._longest[: SELECTION_TIMES_TOPK * topk].tolist())
        if not trainer.policy.sparse or len(ids) <= topk:
            return {}
        return sync.selection_agreement(self.pool.selection(ids), trainer.select(ids))


def limits(rollout: Rollout) -> Limits:
    """What is expected of the engines of a run."""
    return Limits(
        requests=rollout.requests_per_engine, step_seconds=rollout.step_seconds, restarts=rollout.max_restarts
    )


def engine_config(config: Config, model: str, *, sleep: bool | None = None) -> EngineConfig:
    """What an engine for this model is started with in this run."""
    rollout = config.rollout
    return EngineConfig(
        model=model,
        dtype=DTYPES[config.precision or "fp32"],
        max_model_len=resolved(rollout.max_len),
        kv_cache_bytes=resolved(rollout.kv_cache_mib) * 2**20,
        max_num_seqs=1 if rollout.deterministic else rollout.max_num_seqs,
        prefix_caching=not rollout.deterministic,
        graphs=bool(rollout.graphs),
        sleep=bool(rollout.sleep) if sleep is None else sleep,
        stop_ids=tuple(chat_of(config, model).stop_ids),
        seed=config.seed,
    )
