"""DeepSeek Sparse Attention for training on a GPU: the two forms of grpo.attention in Triton, over packed sequences.

Nothing is padded and no [N, N] tensor of numbers exists. Shape suffixes: N = tokens of a span, H = heads, D = head
width, C = latent width, R = rotary width, V = value width, K = selected keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.grpo.policy.attention import Attend, Index, Latents
from trimtab.grpo.policy.parts import Part, to_device
from trimtab.kernels import reference
from trimtab.kernels.indexer import index_topk, selected_scores
from trimtab.kernels.indexer_kl import chunks_of, dense_kl_gradients, sparse_prob, weighted_kl
from trimtab.kernels.masked_mha import masked_mha
from trimtab.kernels.sparse_mla import sparse_mla

Result = TypeVar("Result")

SPARSE_FROM_TIMES_TOPK = 5
"""Longer sequences use the sparse form. Measured on one H200, forward and backward, with 128 heads and 2048 selected
keys: it is faster above 4.7 times as many tokens as keys (benchmarks/kernel_table.py crossover)."""
QUERIES_AT_ONCE = 16384
"""More queries attend in parts: absorbed queries and outputs, 576 and 512 wide for each head, then never exist for all
of them at once."""
QUERIES_OF_A_PART = 4096
"""A part is computed again in the backward pass whatever its size, so it is small: at 128 heads it takes 2 GiB."""
KEPT_BYTES = 8 << 30
"""Absorbed queries and outputs that a layer may keep for its backward pass where it is itself computed again: below,
its parts are not computed a third time."""


@dataclass(frozen=True)
class Span(Part):
    """Sequences that are attended to in one form, one after another."""

    recomputed: bool = False
    """Whether each layer is computed again in the backward pass."""

    @cached_property
    def start_N(self) -> Tensor:
        """First key that each query sees."""
        starts = accumulate(self.lengths, initial=0)
        start_N = torch.cat(
            [
                torch.full((length,), start, dtype=torch.int32)
                for start, length in zip(starts, self.lengths, strict=False)
            ]
        )
        return to_device(start_N, self.device)

    @cached_property
    def end_N(self) -> Tensor:
        """The key after the last that each query sees."""
        return torch.arange(1, self.tokens + 1, dtype=torch.int32, device=self.device)

    @cached_property
    def _kept(self) -> dict[int, Any]:
        return {}

    def once(self, mla: nn.Module, make: Callable[[], Result]) -> Result:
        """What make returns; where the layer of mla is computed again, the same tensors the second time. They take
        part in no gradient, so that nothing tells the two apart."""
        if not self.recomputed:
            return make()
        if id(mla) in self._kept:
            return self._kept.pop(id(mla))
        return self._kept.setdefault(id(mla), make())


def spans_of(
    lengths: Sequence[int],
    device: torch.device,
    topk: int,
    choose: Callable[[int, int], Attend],
    *,
    recomputed: bool = False,
) -> list[Span]:
    """Cut a pack where the form of attention changes."""
    runs = groupby(lengths, key=lambda length: choose(length, topk))
    return [Span(tuple(run), device, recomputed) for _, run in runs]


def attend_masked(
    mla: nn.Module, latents: Latents, index: Index | None, span: Span, topk: int, with_kl: bool
) -> tuple[Tensor, Tensor | None]:
    """MLA as multi-head attention with the selection as a bit mask: time grows with the square of the length."""
    m: Any = mla
    q_NHD, latent_NC, k_rope_NR = latents
    k_nope, v_NHV = (
        m.kv_b_proj(latent_NC).unflatten(-1, (m.num_heads, -1)).split([m.qk_nope_head_dim, m.v_head_dim], -1)
    )
    k_NHD = torch.cat([k_nope, k_rope_NR[:, None].expand(-1, m.num_heads, -1)], -1)
    ids_NK = _select(mla, index, span, topk) if index is not None and topk < span.T else None
    seen = span.start_N, span.end_N
    out_NHV, lse_NH = masked_mha(q_NHD, k_NHD, v_NHV, ids_NK, *seen, m.scaling, longest=span.T)
    if index is None or not with_kl:
        return out_NHV, None
    if ids_NK is None:
        inputs = *index.tensors, q_NHD, k_NHD, lse_NH, *seen
        made = span.once(mla, lambda: dense_kl_gradients(*inputs, m.scaling, chunks=chunks_of(span.lengths)))
        return out_NHV, weighted_kl(*index.tensors, made, *seen)
    with torch.no_grad():
        row_NC = torch.cat([latent_NC, k_rope_NR], -1)
        parts = zip(*(x.split(QUERIES_OF_A_PART) for x in (q_NHD, ids_NK, lse_NH)), strict=True)
        prob_NK = torch.cat([sparse_prob(_absorb(m, q)[0], row_NC, ids, lse, m.scaling) for q, ids, lse in parts])
    return out_NHV, _selected_kl(index, prob_NK, ids_NK)


def attend_selected(
    mla: nn.Module, latents: Latents, index: Index | None, span: Span, topk: int, with_kl: bool
) -> tuple[Tensor, Tensor | None]:
    """MLA absorbed into multi-query attention over the selected rows: time grows with length times topk."""
    if index is None or topk >= span.T:
        return attend_masked(mla, latents, index, span, topk, with_kl)
    ids_NK = _select(mla, index, span, topk)
    q_NHD, latent_NC, k_rope_NR = latents
    row_NC = torch.cat([latent_NC, k_rope_NR], -1)
    if len(q_NHD) <= QUERIES_AT_ONCE or (span.recomputed and _absorbed_bytes(mla, q_NHD) <= KEPT_BYTES):
        return _attend_rows(mla, q_NHD, row_NC, index, ids_NK, with_kl)
    shared = row_NC.float(), index.k_BTD.float()  # float32: what the parts add to their gradients is not rounded
    parts = zip(*(x.split(QUERIES_OF_A_PART) for x in (q_NHD, index.q_BTHD, index.w_BTH, ids_NK)), strict=True)
    results = [
        checkpoint(
            lambda q, row, index_q, index_k, index_w, ids: _attend_rows(
                mla, q, row.to(q.dtype), Index(index_q, index_k.to(index_q.dtype), index_w), ids, with_kl
            ),
            *(q, shared[0], index_q, shared[1], index_w, ids),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for q, index_q, index_w, ids in parts
    ]
    outs, kls = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(kls) if with_kl else None


def choose_attend(T: int, topk: int) -> Attend:
    """The faster form for sequences of up to T tokens."""
    return attend_selected if SPARSE_FROM_TIMES_TOPK * topk < T else attend_masked


def _select(mla: nn.Module, index: Index, span: Span, topk: int) -> Tensor:
    if index.ids_BTK is not None:
        return torch.where(index.ids_BTK < 0, -1, index.ids_BTK + span.start_N[:, None])
    q_NHD, k_ND, w_NH = (x.detach() for x in index.tensors)
    return span.once(mla, lambda: index_topk(q_NHD, k_ND, w_NH, span.start_N, span.end_N, topk, longest=span.T))


def _absorbed_bytes(mla: nn.Module, q_NHD: Tensor) -> int:
    """Of the absorbed queries and outputs of attention."""
    m: Any = mla
    return q_NHD[..., 0].numel() * (2 * m.kv_lora_rank + m.qk_rope_head_dim) * q_NHD.element_size()


def _attend_rows(
    mla: nn.Module, q_NHD: Tensor, row_MC: Tensor, index: Index, ids_NK: Tensor, with_kl: bool
) -> tuple[Tensor, Tensor | None]:
    """Values [N, H, V] and KL of some queries over rows of the whole span."""
    m: Any = mla
    q_NHC, w_uv = _absorb(m, q_NHD)
    out_NHC, lse_NH = sparse_mla(q_NHC, row_MC, ids_NK, m.kv_lora_rank, m.scaling)
    kl_N = None
    if with_kl:
        prob_NK = sparse_prob(q_NHC.detach(), row_MC.detach(), ids_NK, lse_NH, m.scaling)
        kl_N = _selected_kl(index, prob_NK, ids_NK)
    return torch.einsum("nhc,hvc->nhv", out_NHC, w_uv), kl_N


def _absorb(m: Any, q_NHD: Tensor) -> tuple[Tensor, Tensor]:
    """Queries in latent form [N, H, C + R], and the projection of values [H, V, C]."""
    w_uk, w_uv = m.kv_b_proj.weight.unflatten(0, (m.num_heads, -1)).split([m.qk_nope_head_dim, m.v_head_dim], 1)
    q_nope, q_rope = q_NHD.split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
    return torch.cat([torch.einsum("nhd,hdc->nhc", q_nope, w_uk), q_rope], -1), w_uv


def _selected_kl(index: Index, prob_NK: Tensor, ids_NK: Tensor) -> Tensor:
    return reference.indexer_kl(selected_scores(*index.tensors, ids_NK), prob_NK, ids_NK >= 0)
