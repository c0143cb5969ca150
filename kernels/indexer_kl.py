"""The indexer's target and loss: attention probabilities summed over heads, and the KL of the dense warm-up.

Shape suffixes: N = queries of all packed sequences, M = keys, H = heads, D = head width, C = width of a cached row,
K = selected keys of a query, P = parts of the queries. In the loss the indexer has its own H and D.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels.hopper import indexer_kl as indexer_kl_hopper
from trimtab.kernels.indexer import check_index, index_scores
from trimtab.kernels.masked_mha import (
    LOG2_E,
    large_tiles,
    load_lse,
    load_tile,
    seen_by,
    split_width,
    store_tile,
    visible,
)

SCORES_AT_ONCE = 1 << 27
"""Scores that dense_indexer_kl holds at a time, beside as many probabilities: 2 x 512 MiB."""

LOWEST = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32."""


@triton.jit
def _gather(ptr, row, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns FIRST .. FIRST + BLOCK of the given rows, zero past WIDTH."""
    column = FIRST + tl.arange(0, BLOCK)
    return tl.load(
        ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=(column < WIDTH)[None, :], other=0.0
    )


@triton.jit
def _sparse_prob_kernel(
    q_ptr, kv_ptr, ids_ptr, lse_ptr, prob_ptr, H, K, kv_stride, scale_log2,
    C: tl.constexpr, C_HEAD: tl.constexpr, C_REST: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    for h0 in range(0, H, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        q = load_tile(q_ptr + n * H * C, h0, H, C, 0, C, BLOCK_H, C_HEAD)
        if C_REST > 0:
            q_rest = load_tile(q_ptr + n * H * C, h0, H, C, C_HEAD, C, BLOCK_H, C_REST)
        lse = load_lse(lse_ptr + n * H, h, h < H)
        tl.debug_barrier()  # other threads may have stored the sum that this one adds to
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            m = tl.load(ids_ptr + n * K + k, mask=k < K, other=-1)
            row = tl.maximum(m, 0)
            kv = _gather(kv_ptr, row, kv_stride, 0, C, C_HEAD)
            score = tl.dot(kv, tl.trans(q), input_precision=PRECISION)  # keys first: they fill a tile, heads may not
            if C_REST > 0:
                kv_rest = _gather(kv_ptr, row, kv_stride, C_HEAD, C, C_REST)
                score = tl.dot(kv_rest, tl.trans(q_rest), score, input_precision=PRECISION)
            prob = tl.sum(tl.exp2(score * scale_log2 - lse[None, :]), 1)
            if h0 > 0:
                prob += tl.load(prob_ptr + n * K + k, mask=k < K, other=0.0)
            tl.store(prob_ptr + n * K + k, tl.where(m >= 0, prob, 0.0), mask=k < K)


def sparse_prob(q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, lse_NH: Tensor, scale: float) -> Tensor:
    """The probabilities of sparse_mla summed over heads, from its lse: the target of the indexer.

        p[n, j] = sum_h exp(scale * q[n, h] . kv[ids[n, j]] - lse[n, h])

    [DeepSeek-V3.2-Exp, eq. 4]. No gradient, and no [N, H, K] tensor. kv's rows may be apart by more than C.

    Returns:
        [N, K] float32; zero for unused ids (-1).
    """
    (N, H, C), K = q_NHC.shape, ids_NK.shape[1]
    assert kv_MC.shape[1] == C and len(ids_NK) == N and lse_NH.shape == (N, H), (q_NHC.shape, kv_MC.shape, ids_NK.shape)
    assert q_NHC.dtype == kv_MC.dtype, (q_NHC.dtype, kv_MC.dtype)
    kv_MC = kv_MC.detach() if kv_MC.stride(1) == 1 else kv_MC.detach().contiguous()
    q_NHC, lse_NH, ids_NK = q_NHC.detach().contiguous(), lse_NH.contiguous(), ids_NK.to(torch.int32).contiguous()
    prob_NK = torch.zeros(N, K, dtype=torch.float32, device=q_NHC.device)
    if not prob_NK.numel():
        return prob_NK
    aligned = kv_MC.stride(0) % 16 == 0 and kv_MC.data_ptr() % 16 == 0
    if indexer_kl_hopper.supported(q_NHC, (576,)) and H <= 128 and aligned:
        indexer_kl_hopper.sparse_prob(q_NHC, kv_MC, ids_NK, lse_NH, scale * LOG2_E, prob_NK)
        return prob_NK
    heads = max(16, triton.next_power_of_2(H))
    if C > 576 or not large_tiles(q_NHC):
        BLOCK_H, BLOCK_K, warps = 16, 32, 4
    else:
        BLOCK_H, BLOCK_K, warps = (64, 128, 8) if heads > 32 else (heads, 64, 4)
    precision = "ieee" if q_NHC.dtype == torch.float32 else None
    _sparse_prob_kernel[(N,)](
        q_NHC, kv_MC, ids_NK, lse_NH, prob_NK, H, K, kv_MC.stride(0), scale * LOG2_E, C, *split_width(C),
        BLOCK_H, BLOCK_K, precision, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return prob_NK


@triton.jit
def _dense_prob_kernel(
    q_ptr, k_ptr, lse_ptr, start_ptr, end_ptr, prob_ptr, N, M, H, scale_log2,
    D: tl.constexpr, D_HEAD: tl.constexpr, D_REST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n0, m0 = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_M
    n, m = n0 + tl.arange(0, BLOCK_N), m0 + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + n, mask=n < N, other=0)
    end = tl.load(end_ptr + n, mask=n < N, other=0)
    seen = visible(start[:, None], end[:, None], m[None, :])
    heads = tl.where(tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0, H, 0)

    prob = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for h in range(0, heads):
        q = load_tile(q_ptr + h * D, n0, N, H * D, 0, D, BLOCK_N, D_HEAD)
        k = load_tile(k_ptr + h * D, m0, M, H * D, 0, D, BLOCK_M, D_HEAD)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if D_REST > 0:
            q_rest = load_tile(q_ptr + h * D, n0, N, H * D, D_HEAD, D, BLOCK_N, D_REST)
            k_rest = load_tile(k_ptr + h * D, m0, M, H * D, D_HEAD, D, BLOCK_M, D_REST)
            score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision=PRECISION)
        lse = load_lse(lse_ptr + h, n.to(tl.int64) * H, n < N)
        prob += tl.exp2(score * scale_log2 - lse[:, None])

    place = prob_ptr + n.to(tl.int64)[:, None] * M + m[None, :]
    tl.store(place, tl.where(seen, prob, 0.0), mask=(n < N)[:, None] & (m < M)[None, :])


def dense_prob(q_NHD: Tensor, k_MHD: Tensor, lse_NH: Tensor, start_N: Tensor, end_N: Tensor, scale: float) -> Tensor:
    """The probabilities of masked_mha over every visible key summed over heads, from its lse. No gradient.

        p[n, m] = sum_h exp(scale * q[n, h] . k[m, h] - lse[n, h])

    [DeepSeek-V3.2-Exp, eq. 3].

    Returns:
        [N, M] float32, zero where not visible: for as many queries as that leaves room for.
    """
    (N, H, D), M = q_NHD.shape, len(k_MHD)
    assert k_MHD.shape == (M, H, D) and lse_NH.shape == (N, H), (q_NHD.shape, k_MHD.shape, lse_NH.shape)
    assert start_N.shape == end_N.shape == (N,) and q_NHD.dtype == k_MHD.dtype, (start_N.shape, q_NHD.dtype)
    q_NHD, k_MHD = q_NHD.detach().contiguous(), k_MHD.detach().contiguous()
    lse_NH, start_N, end_N = lse_NH.contiguous(), start_N.contiguous(), end_N.contiguous()
    prob_NM = torch.empty(N, M, dtype=torch.float32, device=q_NHD.device)
    if indexer_kl_hopper.supported(q_NHD, (64, 128, 192)):
        indexer_kl_hopper.dense_prob(q_NHD, k_MHD, lse_NH, start_N, end_N, scale * LOG2_E, prob_NM)
        return prob_NM
    large = D <= 192 and large_tiles(q_NHD)
    BLOCK_N, BLOCK_M, warps, stages = (128, 128, 8, 2) if large else (32, 32, 4, 1)
    precision = "ieee" if q_NHD.dtype == torch.float32 else None
    _dense_prob_kernel[(triton.cdiv(N, BLOCK_N), triton.cdiv(M, BLOCK_M))](
        q_NHD, k_MHD, lse_NH, start_N, end_N, prob_NM, N, M, H, scale * LOG2_E, D, *split_width(D),
        BLOCK_N, BLOCK_M, precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return prob_NM


@triton.jit
def _normalisers(score_ptr, prob_ptr, start, end, BLOCK: tl.constexpr):
    """Of one row: logarithm of the sum of exp(score), and the sum of prob."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        m = first + tl.arange(0, BLOCK)
        score = tl.load(score_ptr + m, mask=m < end, other=float("-inf"))
        new_top = tl.maximum(top, score)
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - finite_top) + tl.exp(score - finite_top)
        top = new_top
        mass += tl.load(prob_ptr + m, mask=m < end, other=0.0)
    best = tl.max(top, 0)
    return best + tl.log(tl.sum(total * tl.exp(top - best), 0)), tl.maximum(tl.sum(mass, 0), LOWEST)


@triton.jit
def _kl_kernel(score_ptr, prob_ptr, start_ptr, end_ptr, kl_ptr, M, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    start, end = tl.load(start_ptr + n), tl.load(end_ptr + n)
    score_ptr += n * M
    prob_ptr += n * M
    loss = tl.zeros([BLOCK], tl.float32)
    if start < end:
        lse, mass = _normalisers(score_ptr, prob_ptr, start, end, BLOCK)
        for first in range(start, end, BLOCK):
            m = first + tl.arange(0, BLOCK)
            score = tl.load(score_ptr + m, mask=m < end, other=0.0)
            target = tl.load(prob_ptr + m, mask=m < end, other=0.0) / mass
            loss += tl.where(target > 0.0, target * (tl.log(tl.maximum(target, LOWEST)) - score + lse), 0.0)
    tl.store(kl_ptr + n, tl.sum(loss, 0))


def _kl(score_NM: Tensor, prob_NM: Tensor, start_N: Tensor, end_N: Tensor, out_N: Tensor) -> None:
    """Writes KL(prob / sum || softmax(score)) of each row."""
    assert score_NM.shape == prob_NM.shape and out_N.shape == start_N.shape == end_N.shape == score_NM.shape[:1]
    assert score_NM.is_contiguous() and prob_NM.is_contiguous() and out_N.is_contiguous()
    N, M = score_NM.shape
    _kl_kernel[(N,)](score_NM, prob_NM, start_N, end_N, out_N, M, 2048)


@triton.jit
def _score_gradient_kernel(score_ptr, prob_ptr, start_ptr, end_ptr, M, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    start, end = tl.load(start_ptr + n), tl.load(end_ptr + n)
    score_ptr += n * M
    prob_ptr += n * M
    if start < end:
        lse, mass = _normalisers(score_ptr, prob_ptr, start, end, BLOCK)
        tl.debug_barrier()  # every thread has read the row before one overwrites it
        for first in range(start, end, BLOCK):
            m = first + tl.arange(0, BLOCK)
            score = tl.load(score_ptr + m, mask=m < end, other=0.0)
            prob = tl.load(prob_ptr + m, mask=m < end, other=0.0)
            tl.store(prob_ptr + m, tl.exp(score - lse) - prob / mass, mask=m < end)


def _score_gradient(score_NM: Tensor, prob_NM: Tensor, start_N: Tensor, end_N: Tensor) -> Tensor:
    """softmax(score) - prob / sum, the gradient of _kl, in the place of prob: zero where not visible."""
    assert score_NM.shape == prob_NM.shape and start_N.shape == end_N.shape == score_NM.shape[:1]
    assert score_NM.is_contiguous() and prob_NM.is_contiguous()
    N, M = score_NM.shape
    _score_gradient_kernel[(N,)](score_NM, prob_NM, start_N, end_N, M, 2048)
    return prob_NM


@triton.jit
def _index_query_gradient_kernel(
    q_ptr, k_ptr, w_ptr, dscore_ptr, start_ptr, end_ptr, dq_ptr, dw_ptr, M, H,
    D: tl.constexpr, D_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    h0 = tl.program_id(1) * BLOCK_H
    h = h0 + tl.arange(0, BLOCK_H)
    start, end = tl.load(start_ptr + n), tl.load(end_ptr + n)
    q = load_tile(q_ptr + n * H * D, h0, H, D, 0, D, BLOCK_H, D_BLOCK)
    pull = tl.zeros([BLOCK_H, D_BLOCK], tl.float32)  # sum_m dscore[m] [q . k[m] > 0] k[m]
    for m0 in range(start // BLOCK_M * BLOCK_M, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        k = load_tile(k_ptr, m0, M, D, 0, D, BLOCK_M, D_BLOCK)
        dscore = tl.load(dscore_ptr + n * M + m, mask=m < M, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        pull = tl.dot(tl.where(score > 0.0, dscore[None, :], 0.0).to(k.dtype), k, pull, input_precision=PRECISION)
    w = tl.load(w_ptr + n * H + h, mask=h < H, other=0.0).to(tl.float32)
    store_tile(dq_ptr + n * H * D, pull * w[:, None], h0, H, D, 0, D, BLOCK_H, D_BLOCK)
    tl.store(dw_ptr + n * H + h, tl.sum(pull * q.to(tl.float32), 1), mask=h < H)


def _index_query_gradient(
    q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor, dscore_NM: Tensor, start_N: Tensor, end_N: Tensor, dq_NHD: Tensor,
    dw_NH: Tensor,
) -> None:  # fmt: skip
    """Writes dq[n, h] = w[n, h] g and dw[n, h] = q[n, h] . g, where g = sum_m dscore[n, m] [q . k > 0] k[m]."""
    (N, H, D), M = q_NHD.shape, len(k_MD)
    assert k_MD.shape == (M, D) and dq_NHD.shape == (N, H, D) and w_NH.shape == dw_NH.shape == (N, H)
    assert dscore_NM.shape == (N, M) and start_N.shape == end_N.shape == (N,)
    tensors = q_NHD, k_MD, w_NH, dscore_NM, start_N, end_N, dq_NHD, dw_NH
    assert all(x.is_contiguous() for x in tensors)
    BLOCK_H = min(64, max(16, triton.next_power_of_2(H)))
    BLOCK_M, stages = (128, 3) if D <= 128 and large_tiles(q_NHD) else (32, 1)
    precision = "ieee" if q_NHD.dtype == torch.float32 else None
    _index_query_gradient_kernel[(N, triton.cdiv(H, BLOCK_H))](
        *tensors, M, H, D, max(16, triton.next_power_of_2(D)), BLOCK_H, BLOCK_M, precision,
        num_warps=4, num_stages=stages,
    )  # fmt: skip


@triton.jit
def _index_key_gradient_kernel(
    q_ptr, k_ptr, w_ptr, dscore_ptr, span_ptr, dk_ptr, M, H,
    D: tl.constexpr, D_BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m0 = tl.program_id(0) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    first, last = tl.load(span_ptr + tl.program_id(0) * 2), tl.load(span_ptr + tl.program_id(0) * 2 + 1)
    share = tl.cdiv(tl.maximum(last - first, 0), tl.num_programs(1))
    first += tl.program_id(1) * share
    blocks = tl.cdiv(H, BLOCK_H)

    k = load_tile(k_ptr, m0, M, D, 0, D, BLOCK_M, D_BLOCK)
    dk = tl.zeros([BLOCK_M, D_BLOCK], tl.float32)
    for i in range(0, tl.minimum(share, last - first) * blocks):
        n = (first + i // blocks).to(tl.int64)
        h0 = i % blocks * BLOCK_H
        h = h0 + tl.arange(0, BLOCK_H)
        q = load_tile(q_ptr + n * H * D, h0, H, D, 0, D, BLOCK_H, D_BLOCK)
        w = tl.load(w_ptr + n * H + h, mask=h < H, other=0.0).to(tl.float32)
        dscore = tl.load(dscore_ptr + n * M + m, mask=m < M, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        push = tl.where(score > 0.0, dscore[:, None] * w[None, :], 0.0).to(q.dtype)
        dk = tl.dot(push, q, dk, input_precision=PRECISION)
    store_tile(dk_ptr + tl.program_id(1).to(tl.int64) * M * D, dk, m0, M, D, 0, D, BLOCK_M, D_BLOCK)


def _index_key_gradient(
    q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor, dscore_NM: Tensor, start_N: Tensor, end_N: Tensor
) -> Tensor:
    """dk[m] = sum_nh dscore[n, m] w[n, h] [q . k > 0] q[n, h], the queries in parts that are summed in order.

    Returns:
        [M, D] float32.
    """
    (N, H, D), M = q_NHD.shape, len(k_MD)
    assert k_MD.shape == (M, D) and w_NH.shape == (N, H) and dscore_NM.shape == (N, M)
    BLOCK_H = min(64, max(16, triton.next_power_of_2(H)))
    BLOCK_M, stages = (64, 3) if D <= 128 and large_tiles(q_NHD) else (32, 1)
    precision = "ieee" if q_NHD.dtype == torch.float32 else None
    span = seen_by(start_N, end_N, M, BLOCK_M)
    # enough programs to fill a GPU, and not of this GPU's number: the sum's order is fixed
    parts = min(triton.cdiv(1024, len(span)), triton.cdiv(N, 64))
    dk_PMD = torch.empty(parts, M, D, dtype=torch.float32, device=q_NHD.device)
    tensors = q_NHD, k_MD, w_NH, dscore_NM, span, dk_PMD
    assert all(x.is_contiguous() for x in tensors)
    _index_key_gradient_kernel[(len(span), parts)](
        *tensors, M, H, D, max(16, triton.next_power_of_2(D)), BLOCK_H, BLOCK_M, precision,
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return dk_PMD.sum(0)


Chunk = tuple[slice, slice]
"""Some queries, and the keys from the first to the last that any of them sees."""


def chunks_of(lengths: Sequence[int]) -> list[Chunk]:
    """Packed causal sequences of these lengths, in chunks of at most SCORES_AT_ONCE scores; asks no GPU."""
    total = sum(lengths)
    rows = max(1, SCORES_AT_ONCE // max(1, total))
    ends = list(accumulate(lengths))
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    first = [starts[bisect_right(ends, n)] for n in range(0, total, rows)]
    return [
        (slice(i * rows, min((i + 1) * rows, total)), slice(m, min((i + 1) * rows, total))) for i, m in enumerate(first)
    ]


def _chunks(start_N: Tensor, end_N: Tensor, M: int) -> list[Chunk]:
    """Queries of any ranges in chunks of at most SCORES_AT_ONCE scores."""
    if not len(start_N):
        return []
    rows = max(1, SCORES_AT_ONCE // max(M, 1))
    first = torch.where(start_N < end_N, start_N, M).split(rows)
    last = torch.where(start_N < end_N, end_N, 0).split(rows)
    spans = torch.stack([torch.stack((a.min(), b.max())) for a, b in zip(first, last, strict=True)]).tolist()
    return [(slice(i * rows, (i + 1) * rows), slice(a, b)) for i, (a, b) in enumerate(spans) if a < b]


class DenseKl(NamedTuple):
    """The warm-up's loss of each query, and its gradients for queries of weight 1."""

    kl_N: Tensor
    dq_NHD: Tensor
    dk_MD: Tensor
    dw_NH: Tensor


@torch.no_grad()
def dense_kl_gradients(
    index_q_NHD: Tensor, index_k_MD: Tensor, index_w_NH: Tensor, q_NHD: Tensor, k_MHD: Tensor, lse_NH: Tensor,
    start_N: Tensor, end_N: Tensor, scale: float, *, chunks: Sequence[Chunk] | None = None,
) -> DenseKl:  # fmt: skip
    """What dense_indexer_kl computes: its value and, in the same pass, its gradients.

    Args:
        chunks: chunks_of the packed sequences, if the host knows them; finding the ranges' ends waits for a GPU.

    Raises:
        ValueError: q and k of the index differ in type or width, or w in shape.
    """
    check_index(index_q_NHD, index_k_MD, index_w_NH)
    assert len(index_k_MD) == len(k_MHD) and len(q_NHD) == len(index_q_NHD), (index_k_MD.shape, k_MHD.shape)
    assert start_N.dtype == end_N.dtype == torch.int32, (start_N.dtype, end_N.dtype)
    index_q, index_k, index_w, q_NHD, k_MHD, lse_NH, start_N, end_N = (
        x.detach().contiguous() for x in (index_q_NHD, index_k_MD, index_w_NH, q_NHD, k_MHD, lse_NH, start_N, end_N)
    )
    kl_N = torch.zeros(len(q_NHD), dtype=torch.float32, device=q_NHD.device)
    dq, dw = torch.zeros_like(index_q), torch.zeros_like(index_w)
    dk = torch.zeros_like(index_k, dtype=torch.float32)
    for n, m in _chunks(start_N, end_N, len(k_MHD)) if chunks is None else chunks:
        start, end = start_N[n] - m.start, end_N[n] - m.start
        inputs = index_q[n], index_k[m], index_w[n]
        score = index_scores(*inputs, start, end)
        prob = dense_prob(q_NHD[n], k_MHD[m], lse_NH[n], start, end, scale)
        _kl(score, prob, start, end, kl_N[n])
        dscore = _score_gradient(score, prob, start, end)
        _index_query_gradient(*inputs, dscore, start, end, dq[n], dw[n])
        dk[m] += _index_key_gradient(*inputs, dscore, start, end)
    return DenseKl(kl_N, dq, dk, dw)


class _Weighted(torch.autograd.Function):
    """A loss whose gradients are known, for queries of one weight."""

    @staticmethod
    def forward(
        ctx, index_q: Tensor, index_k: Tensor, index_w: Tensor, kl_N: Tensor, dq: Tensor, dk: Tensor, dw: Tensor,
        sees_N: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(dq, dk, dw, sees_N)
        return kl_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl_N: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dw, sees_N = ctx.saved_tensors
        if not len(sees_N):
            return dq, dk.to(dq.dtype), dw, *[None] * 5
        lowest, weight = torch.stack(
            [dkl_N.masked_fill(~sees_N, float("inf")).min(), dkl_N.masked_fill(~sees_N, float("-inf")).max()]
        ).tolist()
        if lowest < weight:
            raise ValueError(f"queries weigh from {lowest} to {weight}: give those that do not count an empty range")
        weight = 0.0 if lowest > weight else weight  # no query has keys
        return dq * weight, (dk * weight).to(dq.dtype), dw * weight, *[None] * 5


def weighted_kl(
    index_q_NHD: Tensor, index_k_MD: Tensor, index_w_NH: Tensor, made: DenseKl, start_N: Tensor, end_N: Tensor
) -> Tensor:
    """dense_indexer_kl from what dense_kl_gradients made: where a layer is computed twice, that need be made once."""
    return _Weighted.apply(index_q_NHD, index_k_MD, index_w_NH, *made, start_N < end_N)


def dense_indexer_kl(
    index_q_NHD: Tensor,
    index_k_MD: Tensor,
    index_w_NH: Tensor,
    q_NHD: Tensor,
    k_MHD: Tensor,
    lse_NH: Tensor,
    start_N: Tensor,
    end_N: Tensor,
    scale: float,
) -> Tensor:
    """The loss of the dense warm-up, streaming over chunks of queries: no [N, M] tensor, forward or backward.

        L[n] = KL(p[n] || softmax(I[n])) over the visible keys,   p = dense_prob, normalised to sum 1
        dL[n]/dI[n] = softmax(I[n]) - p[n]

    [DeepSeek-V3.2-Exp, eq. 3]. Differentiable in the indexer's q, k and w; the same bits on every run.

    The gradient of the keys mixes queries, so it needs the weight of each. Making p once more in the backward pass
    would cost half as much again; so the forward pass makes the gradients too, for queries of equal weight, and the
    backward pass multiplies by that weight. A sum or mean over queries is such; a query that should not count is
    given an empty range. Beside the gradients the memory is that of a chunk (SCORES_AT_ONCE).

    Args:
        q_NHD, k_MHD, lse_NH: main attention's queries, keys of each head and lse over the visible keys: no gradient.
        start_N, end_N: int32, query n sees the keys start[n] <= m < end[n]; an empty range is legal.

    Returns:
        [N] float32, in nats; zero for a query without keys.

    Raises:
        ValueError: in the backward pass, the gradient is not the same for every query that has keys.
    """
    index = index_q_NHD, index_k_MD, index_w_NH
    made = dense_kl_gradients(*index, q_NHD, k_MHD, lse_NH, start_N, end_N, scale)
    return weighted_kl(*index, made, start_N, end_N)
