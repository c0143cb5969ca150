"""The arithmetic that a model asks for, and what share of a GPU's peak it gets. Imports no torch.

Counted is the model's mathematics, not what a kernel happens to do: two operations for each weight that a token meets
in a product (of experts the chosen ones alone; the embedding is a look-up), attention over the pairs of query and key
that the mask leaves, and the head where a token was sampled. Work that is done twice to save memory counts once in
MFU, as the field counts [PaLM, appendix B].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trimtab.grpo.cost.shape import Layer, Shape

PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100-PCIE-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A40": 149.7,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H20": 148.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H800": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
}
"""Dense bf16 products with fp32 sums, 1e12 a second, by torch's name of the device [NVIDIA's data sheets, without
sparsity]. Whole names: a slice of a GPU has the name of the GPU in its own."""


Learns = Literal["all", "adapters", "indexer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What passes through a model."""

    lengths: Sequence[int]
    """Tokens of each sequence."""
    sampled: int
    """Tokens whose log-probability is asked for."""
    kept: int | None = None
    """Ids that their samplers kept, of all sampled tokens together; None: the whole vocabulary each."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def pairs(lengths: Sequence[int], topk: int | None = None) -> int:
    """Pairs of query and key: each token sees itself and what comes before it, topk keys at most."""
    return sum(_pairs(length, topk or length) for length in lengths)


def _pairs(length: int, topk: int) -> int:
    full = min(length, topk)
    return full * (full + 1) // 2 + (length - full) * topk


def forward(shape: Shape, work: Work) -> int:
    """FLOPs of a pass without gradients: what the reference costs, and with kept = None what sampling does.

    An indexer scores every pair, also where there are no more keys than it would select.
    """
    weights = sum(layer.active + layer.indexer_weights for layer in shape.layers)
    attended = sum(_attention(layer, work.lengths) + _scores(layer, work.lengths) for layer in shape.layers)
    return 2 * weights * work.tokens + attended + _head(shape, work)


def training(shape: Shape, work: Work, *, learns: Learns = "all", learn_indexer: bool = True) -> int:
    """FLOPs of a forward and a backward pass: three times the forward's, less what has no gradient.

    The selection has none: scores of all pairs count once, and what learns from its KL are the scores of the selected
    pairs, against attention's probabilities for them. A frozen weight needs one product less.

    Args:
        learns: all weights; adapters, whose own products are left out; or the indexer alone, for which there is no
            head and no way back through the layers.
        learn_indexer: the indexer learns from its KL.
    """
    layers = shape.layers
    products = sum(layer.active for layer in layers) * 2 * work.tokens
    products += 0 if learns == "indexer" else _head(shape, work)
    attended = sum(_attention(layer, work.lengths) for layer in layers)
    indexers = sum(2 * layer.indexer_weights * work.tokens + _scores(layer, work.lengths) for layer in layers)
    if learn_indexer:
        indexers += sum(2 * 2 * layer.indexer_weights * work.tokens + _kl(layer, work.lengths) for layer in layers)
    passes = {"all": 3, "adapters": 2, "indexer": 1}[learns]
    return passes * products + (1 if learns == "indexer" else 3) * attended + indexers


def recomputed(shape: Shape, work: Work) -> int:
    """FLOPs that checkpointed layers add: their forward pass once more. No part of MFU."""
    return forward(shape, Work(lengths=work.lengths, sampled=0))


def mfu(flops: float, seconds: float, device_name: str) -> float | None:
    """Model FLOPs utilisation: the share of the GPU's dense bf16 peak; None for a device whose peak is not known."""
    peak = PEAK_TFLOPS.get(device_name)
    return None if peak is None or seconds <= 0 else flops / seconds / (peak * 1e12)


def _attention(layer: Layer, lengths: Sequence[int]) -> int:
    return 2 * layer.attention.pair_width * pairs(lengths, layer.topk)


def _scores(layer: Layer, lengths: Sequence[int]) -> int:
    return 2 * layer.indexer.pair_width * pairs(lengths) if layer.indexer else 0


def _kl(layer: Layer, lengths: Sequence[int]) -> int:
    """Index scores of the selected pairs forward and backward; probabilities cost q times k once more."""
    if layer.indexer is None:
        return 0
    return 2 * (3 * layer.indexer.pair_width + layer.attention.key_pair_width) * pairs(lengths, layer.topk)


def _head(shape: Shape, work: Work) -> int:
    ids = work.sampled * shape.vocabulary if work.kept is None else work.kept
    return 2 * shape.hidden * ids
