"""What a batch cost: seconds by phase, tokens a second, the share of the GPU's peak, memory."""

import time
from typing import Any

import torch

from trimtab.grpo.cost import clock
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.cost.flops import Learns, Work, mfu, training
from trimtab.grpo.cost.shape import Shape

UPDATE = ("packing", "reference", "forward and backward", "optimiser")
GIB = 2**30


class Meter:
    """Turns a clock's phases into metrics, batch by batch."""

    def __init__(self, shape: Shape, phases: Clock, *, learns: Learns = "all", learn_indexer: bool = True):
        """learns and learn_indexer are those of flops.training."""
        self._shape, self._clock = shape, phases
        self._learns, self._learn_indexer = learns, learn_indexer
        self._started = self._saving = 0.0

    def start(self) -> None:
        """A batch begins; a checkpoint that was written just before counts to it."""
        self._saving = self._clock.seconds().get("saving", 0.0)
        self._started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def metrics(self, work: Work, *, sampled_tokens: int = 0) -> dict[str, Any]:
        """What the batch that began with `start` cost until now.

        Args:
            work: what was trained on.
            sampled_tokens: what the engines sampled.
        """
        seconds = self._clock.seconds() | ({"saving": self._saving} if self._saving else {})
        found: dict[str, Any] = dict(clock.metrics(seconds))
        found["seconds"] = time.perf_counter() - self._started + self._saving
        if rollout := seconds.get("rollout"):
            found["tokens_per_s/rollout"] = sampled_tokens / rollout
        update = sum(seconds.get(phase, 0.0) for phase in UPDATE)
        if work.tokens and update:
            found["tokens_per_s/train"] = work.tokens / update
        if torch.cuda.is_available():
            found |= _memory() | self._mfu(work, seconds.get("forward and backward", 0.0))
        return found

    def _mfu(self, work: Work, seconds: float) -> dict[str, float]:
        """Model FLOPs of forward and backward passes as a share of the peak; nothing for an unknown GPU."""
        flops = training(self._shape, work, learns=self._learns, learn_indexer=self._learn_indexer)
        share = mfu(flops, seconds, torch.cuda.get_device_name())
        return {} if share is None else {"mfu": share}


def _memory() -> dict[str, float]:
    """Peak of the trainer; what other processes, engines above all, hold now."""
    free, total = torch.cuda.mem_get_info()
    trainer, reserved = torch.cuda.max_memory_reserved(), torch.cuda.memory_reserved()
    engine = max(total - free - reserved, 0)
    return {"memory/trainer_gib": trainer / GIB, "memory/engine_gib": engine / GIB, "memory/gpu_gib": total / GIB}
