"""What a batch cost: seconds by phase, tokens a second, the share of the GPU's peak, memory."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trimtab.grpo.batch import Trajectory
from trimtab.grpo.config import Config
from trimtab.grpo.cost import clock
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.cost.flops import Work, mfu, training
from trimtab.grpo.cost.shape import shape_of
from trimtab.rollout.checkpoint import read_config

UPDATE = ("packing", "reference", "forward and backward", "optimiser")
GIB = 2**30


class Meter:
    """Turns a clock's phases into metrics, batch by batch."""

    def __init__(self, config: Config, phases: Clock):
        self._config, self._clock = config, phases
        self._shape = shape_of(read_config(config.model))
        self._started = self._saving = 0.0

    def start(self) -> None:
        """A batch begins; a checkpoint that was written just before counts to it."""
        self._saving = self._clock.seconds().get("saving", 0.0)
        self._started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def metrics(self, metrics: Mapping[str, Any], batch: Sequence[Trajectory]) -> dict[str, Any]:
        """What the batch that began with `start` cost until now."""
        seconds = self._clock.seconds() | ({"saving": self._saving} if self._saving else {})
        found: dict[str, Any] = dict(clock.metrics(seconds))
        found["seconds"] = time.perf_counter() - self._started + self._saving
        if rollout := seconds.get("rollout"):
            found["tokens_per_s/rollout"] = metrics["sampled_tokens"] / rollout
        update = sum(seconds.get(phase, 0.0) for phase in UPDATE)
        if batch and update:
            found["tokens_per_s/train"] = sum(trajectory.num_tokens for trajectory in batch) / update
        if torch.cuda.is_available():
            found |= _memory() | self._mfu(batch, seconds.get("forward and backward", 0.0))
        return found

    def _mfu(self, batch: Sequence[Trajectory], seconds: float) -> dict[str, float]:
        """Model FLOPs of forward and backward passes as a share of the peak; nothing for an unknown GPU."""
        segments = [segment for trajectory in batch for segment in trajectory.segments]
        work = Work(
            lengths=[len(segment.token_ids) for segment in segments],
            sampled=sum(len(segment.logp) for segment in segments),
            kept=sum(len(segment.kept_ids) for segment in segments) if self._config.keep_sampling_mask else None,
        )
        full, learns = not self._config.lora.rank, self._config.indexer_kl > 0
        flops = training(self._shape, work, full=full, learn_indexer=learns)
        share = mfu(flops, seconds, torch.cuda.get_device_name())
        return {} if share is None else {"mfu": share}


def _memory() -> dict[str, float]:
    """Peak of the trainer; what other processes, engines above all, hold now."""
    free, total = torch.cuda.mem_get_info()
    trainer, reserved = torch.cuda.max_memory_reserved(), torch.cuda.memory_reserved()
    engine = max(total - free - reserved, 0)
    return {"memory/trainer_gib": trainer / GIB, "memory/engine_gib": engine / GIB, "memory/gpu_gib": total / GIB}
