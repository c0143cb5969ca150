"""Whether a supervised stage fits on a GPU, before it starts; with what would make it fit. No torch."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from trimtab.grpo.config import Config, Domain, LossSettings, Rollout
from trimtab.grpo.cost.ledger import CONTEXT, GIB, RESERVE, activations, gathered, head
from trimtab.grpo.cost.shape import Shape
from trimtab.grpo.stages.config import Supervised


def check_memory(settings: Supervised, shape: Shape, gpu_bytes: int) -> None:
    """Refuse what cannot fit.

    Args:
        settings: complete.

    Raises:
        ValueError: it does not fit; with the smallest change that makes it fit, if there is one.
    """
    needed = need(settings, shape)
    if needed <= gpu_bytes:
        return
    said = f"the stage needs {needed / GIB:.1f} GiB, and this GPU has {gpu_bytes / GIB:.1f}"
    for words, smaller in _remedies(settings):
        if need(smaller, shape) <= gpu_bytes:
            raise ValueError(f"{said}; with {words} it needs {need(smaller, shape) / GIB:.1f}")
    raise ValueError(f"{said}; take a GPU of {-(-needed // GIB)} GiB or a smaller model")


def need(settings: Supervised, shape: Shape) -> int:
    """Bytes of the smallest GPU that would do: masters, gradients and moments in fp32, copies in the compute type,
    activations and the head's logits; RESERVE included."""
    alike = _alike(settings)
    indexers = sum(layer.indexer_weights + (layer.indexer.norms if layer.indexer else 0) for layer in shape.layers)
    learning = shape.parameters if settings.learns == "all" else indexers
    kept = CONTEXT + 4 * shape.parameters + gathered(alike, shape)
    moments = 8 * learning
    backward = 4 * learning + activations(alike, shape) + head(alike, shape)
    step = 4 * learning + (moments if settings.offload == "optimizer" else 0)
    peak = kept + max(backward, step) + (0 if settings.offload == "optimizer" else moments)
    return int(peak / (1 - RESERVE))


def _alike(settings: Supervised) -> Config:
    """An RL run with the same packs, as the ledger counts them."""
    assert settings.max_len
    return Config(
        domains={"stage": Domain(task="", loss=LossSettings(beta=0.0))},
        precision=settings.precision,
        tokens_per_microbatch=settings.tokens_per_microbatch,
        checkpoint_activations=settings.checkpoint_activations,
        keep_sampling_mask=False,
        rollout=Rollout(max_len=settings.max_len),
    )


def _remedies(settings: Supervised) -> Iterator[tuple[str, Supervised]]:
    """What can be given up, the cheapest first."""
    assert settings.max_len
    tokens = [settings.tokens_per_microbatch]
    while tokens[-1] // 2 >= settings.max_len:
        tokens.append(tokens[-1] // 2)
    for size, rests, again in product(tokens, (False, True), (False, True)):
        smaller = replace(
            settings,
            tokens_per_microbatch=size,
            offload="optimizer" if rests else settings.offload,
            checkpoint_activations=again or settings.checkpoint_activations,
        )
        words = [
            f"--tokens-per-microbatch {size}" if size != settings.tokens_per_microbatch else "",
            "--offload optimizer" if smaller.offload != settings.offload else "",
            "--checkpoint-activations" if smaller.checkpoint_activations != settings.checkpoint_activations else "",
        ]
        if any(words):
            yield " ".join(filter(None, words)), smaller
