"""DeepSeek Sparse Attention for training on a GPU: the two forms of grpo.attention in Triton, over packed sequences.

Nothing is padded and no [N, N] tensor of numbers exists. Shape suffixes: N = tokens of a span, H = heads, D = head
width, C = latent width, R = rotary width, V = value width, K = selected keys.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.grpo.policy.attention import Attend, Index, Latents
from trimtab.grpo.policy.parts import Part
from trimtab.kernels import reference
from trimtab.kernels.indexer import index_topk, selected_scores
from trimtab.kernels.indexer_kl import dense_indexer_kl, sparse_prob
from trimtab.kernels.masked_mha import masked_mha
from trimtab.kernels.sparse_mla import sparse_mla

SPARSE_FROM_TIMES_TOPK = 5
"""Longer sequences use the sparse form. Measured on one H200, forward and backward, with 128 heads and 2048 selected
keys: it is faster above 4.7 times as many tokens as keys (benchmarks/kernels.py crossover)."""
QUERIES_AT_ONCE = 16384
"""More queries attend in parts, each computed again in the backward pass: absorbed queries and outputs, 576 and 512
wide for each head, then never exist for all of them at once."""


class Span(Part):
    """Sequences that are attended to in one form, one after another."""

    @cached_property
    def start_N(self) -> Tensor:
        """First key that each query sees."""
        length_B = torch.tensor(self.lengths, dtype=torch.int32)
        return (length_B.cumsum(0, dtype=torch.int32) - length_B).repeat_interleave(length_B).to(self.device)

    @cached_property
    def end_N(self) -> Tensor:
        """The key after the last that each query sees."""
        return torch.arange(1, self.tokens + 1, dtype=torch.int32, device=self.device)


def spans_of(
    lengths: Sequence[int], device: torch.device, topk: int, choose: Callable[[int, int], Attend]
) -> list[Span]:
    """Cut a pack where the form of attention changes."""
    runs = groupby(lengths, key=lambda length: choose(length, topk))
    return [Span(tuple(run), device) for _, run in runs]


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
    ids_NK = _select(index, span, topk) if index is not None and topk < span.T else None
    out_NHV, lse_NH = masked_mha(q_NHD, k_NHD, v_NHV, ids_NK, span.start_N, span.end_N, m.scaling)
    if index is None or not with_kl:
        return out_NHV, None
    if ids_NK is not None:
        with torch.no_grad():
            q_NHC, _ = _absorb(m, q_NHD)
            row_NC = torch.cat([latent_NC, k_rope_NR], -1)
        return out_NHV, _selected_kl(index, q_NHC, row_NC, ids_NK, lse_NH, m.scaling)
    kl_N = dense_indexer_kl(*index, q_NHD.detach(), k_NHD.detach(), lse_NH, span.start_N, span.end_N, scale=m.scaling)
    return out_NHV, kl_N


def attend_selected(
    mla: nn.Module, latents: Latents, index: Index | None, span: Span, topk: int, with_kl: bool
) -> tuple[Tensor, Tensor | None]:
    """MLA absorbed into multi-query attention over the selected rows: time grows with length times topk."""
    if index is None or topk >= span.T:
        return attend_masked(mla, latents, index, span, topk, with_kl)
    ids_NK = _select(index, span, topk)
    q_NHD, latent_NC, k_rope_NR = latents
    row_NC = torch.cat([latent_NC, k_rope_NR], -1)
    if len(q_NHD) <= QUERIES_AT_ONCE:
        return _attend_rows(mla, q_NHD, row_NC, index, ids_NK, with_kl)
    shared = row_NC.float(), index.k_BTD.float()  # float32: what the parts add to their gradients is not rounded
    parts = zip(*(x.split(QUERIES_AT_ONCE) for x in (q_NHD, index.q_BTHD, index.w_BTH, ids_NK)), strict=True)
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


def _select(index: Index, span: Span, topk: int) -> Tensor:
    q_NHD, k_ND, w_NH = (x.detach() for x in index)
    return index_topk(q_NHD, k_ND, w_NH, span.start_N, span.end_N, topk)


def _attend_rows(
    mla: nn.Module, q_NHD: Tensor, row_MC: Tensor, index: Index, ids_NK: Tensor, with_kl: bool
) -> tuple[Tensor, Tensor | None]:
    """Values [N, H, V] and KL of some queries over rows of the whole span."""
    m: Any = mla
    q_NHC, w_uv = _absorb(m, q_NHD)
    out_NHC, lse_NH = sparse_mla(q_NHC, row_MC, ids_NK, m.kv_lora_rank, m.scaling)
    kl_N = _selected_kl(index, q_NHC.detach(), row_MC.detach(), ids_NK, lse_NH, m.scaling) if with_kl else None
    return torch.einsum("nhc,hvc->nhv", out_NHC, w_uv), kl_N


def _absorb(m: Any, q_NHD: Tensor) -> tuple[Tensor, Tensor]:
    """Queries in latent form [N, H, C + R], and the projection of values [H, V, C]."""
    w_uk, w_uv = m.kv_b_proj.weight.unflatten(0, (m.num_heads, -1)).split([m.qk_nope_head_dim, m.v_head_dim], 1)
    q_nope, q_rope = q_NHD.split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
    return torch.cat([torch.einsum("nhd,hdc->nhc", q_nope, w_uk), q_rope], -1), w_uv


def _selected_kl(index: Index, q_NHC: Tensor, row_NC: Tensor, ids_NK: Tensor, lse_NH: Tensor, scale: float) -> Tensor:
    prob_NK = sparse_prob(q_NHC, row_NC, ids_NK, lse_NH, scale)
    return reference.indexer_kl(selected_scores(*index, ids_NK), prob_NK, ids_NK >= 0)
