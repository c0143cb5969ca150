"""One line of advice where one phase of a batch takes more than its share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.grpo.config import Config

MUCH = 0.3
"""Share of a batch's seconds above which a phase that could be short is worth a word."""
MOST = 0.6
"""... and one that is long by nature."""
LOW_MFU = 0.2
SMALL_PACK = 16384
ROOM = 0.6
"""A trainer that uses less of its GPU than this share has room for larger packs."""
STRAGGLES = 4
"""The longest answer is this many times the mean."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The figures of one batch, and the settings they came from."""

    metrics: Mapping[str, Any]
    config: Config

    def share(self, phase: str) -> float:
        """Of the batch's seconds."""
        return self.metrics.get(f"seconds/{phase}", 0.0) / max(self.metrics.get("seconds", 0.0), 1e-9)

    def said(self, phase: str) -> str:
        return f"{phase.replace('_', ' ')}: {self.share(phase):.0%} of the batch"

    @property
    def memory(self) -> tuple[float, float, float] | None:
        """GiB at most of trainer and engine, and of the GPU."""
        names = ("memory/trainer_gib", "memory/engine_gib", "memory/gpu_gib")
        values = [self.metrics[name] for name in names if name in self.metrics]
        return (values[0], values[1], values[2]) if len(values) == len(names) else None


def advice(metrics: Mapping[str, Any], config: Config) -> str | None:
    """What to change first, if anything; None where nothing stands out.

    Args:
        metrics: of one batch, as metrics.jsonl has them.
    """
    batch = Batch(metrics, config)
    return next(filter(None, (rule(batch) for rule in RULES)), None)


def _sleep(batch: Batch) -> str | None:
    if batch.memory is None or not batch.config.rollout.sleep or batch.share("wake_and_sleep") < 0.05:
        return None
    trainer, engine, gpu = batch.memory
    if trainer + engine > 0.9 * gpu:
        return None
    both = f"{trainer:.1f} and {engine:.1f} GiB of {gpu:.1f}"
    return f"{batch.said('wake_and_sleep')}, and trainer and engine fit together ({both}): --rollout.sleep False"


def _weights(batch: Batch) -> str | None:
    if batch.share("weights") < MUCH:
        return None
    return f"{batch.said('weights')}: sample more for each update (prompts or group_size)"


def _saving(batch: Batch) -> str | None:
    if batch.share("saving") < MUCH:
        return None
    return f"{batch.said('saving')}: raise --save-every above {batch.config.save_every}"


def _rewards(batch: Batch) -> str | None:
    if batch.share("rewards") < MUCH:
        return None
    return f"{batch.said('rewards')}, in which no engine samples: faster rewards or tools, or more prompts at a time"


def _reference(batch: Batch) -> str | None:
    if batch.share("reference") < MUCH:
        return None
    if batch.config.offload in ("reference", "all"):
        return f"{batch.said('reference')}: it comes from host memory each time; --offload none if it fits"
    return f"{batch.said('reference')}: longer packs (--tokens-per-microbatch), or no KL (beta 0 in every domain)"


def _optimiser(batch: Batch) -> str | None:
    if batch.share("optimiser") < MUCH:
        return None
    if batch.config.offload in ("optimizer", "all"):
        return f"{batch.said('optimiser')}: its state comes from host memory each time; --offload none if it fits"
    return f"{batch.said('optimiser')}: fewer minibatches than {batch.config.minibatches}"


def _training(batch: Batch) -> str | None:
    mfu, tokens = batch.metrics.get("mfu"), batch.config.tokens_per_microbatch
    if mfu is None or mfu > LOW_MFU or batch.share("forward_and_backward") < MUCH:
        return None
    if batch.memory is None or batch.memory[0] > ROOM * batch.memory[2]:
        return None
    said = f"{batch.said('forward_and_backward')} at an MFU of {mfu:.0%}"
    if batch.config.checkpoint_activations:
        return f"{said}, with memory to spare: leave --checkpoint-activations out"
    return f"{said} in packs of {tokens}: --tokens-per-microbatch {2 * tokens}" if tokens < SMALL_PACK else None


def _rollout(batch: Batch) -> str | None:
    if batch.share("rollout") < MOST:
        return None
    longest = batch.metrics.get("longest_answer", 0)
    mean = batch.metrics.get("sampled_tokens", 0) / max(batch.metrics.get("episodes", 0), 1)
    if mean and longest > STRAGGLES * mean:
        waits = f"its longest answer has {longest} tokens, the mean {mean:.0f}"
        return f"{batch.said('rollout')}, and {waits}: lower --sampling.max-tokens, or weigh the length reward"
    episodes, room = batch.metrics.get("episodes", 0), batch.config.rollout.actors * batch.config.rollout.max_num_seqs
    if 2 * episodes <= room:
        return f"{batch.said('rollout')} with {episodes} of {room} sequences decoding: more prompts cost little time"
    return None


RULES: tuple[Callable[[Batch], str | None], ...] = (
    _sleep,
    _weights,
    _saving,
    _rewards,
    _reference,
    _optimiser,
    _training,
    _rollout,
)
"""In the order in which they are worth following: the cheapest change first."""
