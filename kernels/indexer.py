"""Lightning indexer of DeepSeek Sparse Attention. Spec: reference.index_scores.

Shape suffixes: N = query tokens of all sequences, M = key tokens, H = heads, D = head width, K = selected keys.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels.by_key import slots_by_key, sum_by_key
from trimtab.kernels.topk import topk_ids

SCORES_AT_ONCE = 1 << 26
"""Scores that index_topk holds at a time: 256 MiB."""

CONTRIBUTION_BYTES = 1 << 29
"""Largest tensor of gradients per (query, key) that the backward of selected_scores holds at a time."""


@triton.jit(do_not_specialize=["N"])
def _index_scores_kernel(
    q_ptr, k_ptr, w_ptr, k_scale_ptr, row_ptr, start_ptr, end_ptr, score_ptr, N, M, k_stride,
    H: tl.constexpr, D: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64) * BLOCK_N
    m, h, d = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    n1 = tl.minimum(n0 + BLOCK_N, N)

    n = n0 + tl.arange(0, BLOCK_N)
    sees = tl.load(start_ptr + n, mask=n < N, other=M) < tl.minimum(m0 + BLOCK_M, M)
    sees &= tl.load(end_ptr + n, mask=n < N, other=0) > m0
    first, last = tl.min(tl.where(sees, n, n1), 0), tl.max(tl.where(sees, n + 1, n0), 0)
    if FILL:
        for hidden in range(n0, n1):
            if (hidden < first) | (hidden >= last):
                tl.store(score_ptr + hidden * M + m, float("-inf"), mask=m < M)
    if first >= last:
        return

    row = m.to(tl.int64)
    if row_ptr is not None:
        row = tl.load(row_ptr + m, mask=m < M, other=0)
    k = tl.load(k_ptr + row[:, None] * k_stride + d, mask=(m[:, None] < M) & (d < D), other=0.0)
    scale = 1.0
    if k_scale_ptr is not None:
        scale = tl.load(k_scale_ptr + row, mask=m < M, other=0.0)
    for i in range(first, last):
        at = i * H
        w = tl.load(w_ptr + at + h, mask=h < H, other=0.0).to(tl.float32)
        start, end = tl.load(start_ptr + i), tl.load(end_ptr + i)
        q = tl.load(q_ptr + (at + h[:, None]) * D + d, mask=(h[:, None] < H) & (d < D), other=0.0)
        each = tl.maximum(tl.dot(k, tl.trans(q), input_precision=PRECISION), 0.0)
        score = tl.where((m >= start) & (m < end), tl.sum(each * w, 1) * scale, float("-inf"))
        tl.store(score_ptr + i * M + m, score, mask=m < M)


def _scores(
    q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor, start_N: Tensor, end_N: Tensor, score_NM: Tensor,
    k_scale_M: Tensor | None, row_M: Tensor | None, *, fill: bool,
) -> None:  # fmt: skip
    """Write the scores of visible keys to score_NM, and -inf to the others: to all of them if asked to fill.

    Tiles depend on H, D and the type only, never on N or M: a score is the same to the bit in any batch.
    """
    (N, H, D), M = q_NHD.shape, score_NM.shape[1]
    assert k_MD.dtype == q_NHD.dtype and k_MD.shape[1] == D and k_MD.stride(1) == 1, (k_MD.shape, k_MD.dtype)
    assert w_NH.shape == (N, H) and start_N.shape == end_N.shape == (N,), (w_NH.shape, start_N.shape, end_N.shape)
    assert start_N.dtype == end_N.dtype == torch.int32 and score_NM.is_contiguous()
    if N == 0 or M == 0:
        return
    q_NHD, w_NH, start_N, end_N = q_NHD.contiguous(), w_NH.contiguous(), start_N.contiguous(), end_N.contiguous()
    block_h, block_d = _padded(H), _padded(D)
    block_m, warps, stages = (32, 8, 2) if q_NHD.dtype == torch.float32 else (256, 8, 3)
    _index_scores_kernel[(triton.cdiv(M, block_m), triton.cdiv(N, 64))](
        q_NHD, k_MD, w_NH, k_scale_M, row_M, start_N, end_N, score_NM, N, M, k_MD.stride(0),
        H, D, fill, _precision(q_NHD), block_h, block_d, block_m, 64, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # "tf32" means nothing to narrower types


def index_scores(q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor, start_N: Tensor, end_N: Tensor) -> Tensor:
    """Lightning-indexer scores of every visible key, -inf elsewhere. No gradient.

        I[n, m] = sum_h w[n, h] * relu(q[n, h] . k[m])      for start[n] <= m < end[n]

    [DeepSeek-V3.2-Exp, eq. 1], accumulated in fp32; w carries every scale.

    Args:
        k_MD: one key a token, shared by all heads; a row stride larger than D is fine.
        start_N, end_N: int32 range of the keys that a query sees; an empty range is legal.

    Returns:
        [N, M] float32.
    """
    score_NM = torch.empty(len(q_NHD), len(k_MD), dtype=torch.float32, device=q_NHD.device)
    _scores(q_NHD, k_MD, w_NH, start_N, end_N, score_NM, None, None, fill=True)
    return score_NM


@torch.no_grad()
def index_topk(
    q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor, start_N: Tensor, end_N: Tensor, topk: int, *,
    k_scale_M: Tensor | None = None, row_M: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The topk visible keys with the best index scores: higher score first, then lower position. No gradient.

    Rows are scored in chunks, so memory is O(N * topk) plus SCORES_AT_ONCE. The set that a query selects does not
    depend on the other queries of the call.

    Args:
        q_NHD, k_MD: fp32, fp16, bf16 or float8_e4m3fn.
        w_NH: head weights times every scale of q, as quantize_fp8 says.
        k_scale_M: float32 scale of each row of k.
        row_M: int64 row of k, and of k_scale, that holds key m: then k is a whole paged cache.

    Returns:
        [N, topk] int32 positions m, ascending, padded with -1.

    Raises:
        ValueError: topk_ids cannot serve this topk.
    """
    N, M = len(q_NHD), len(k_MD) if row_M is None else len(row_M)
    assert k_scale_M is None or (k_scale_M.shape == (len(k_MD),) and k_scale_M.is_contiguous()), k_scale_M
    rows = max(1, min(N, SCORES_AT_ONCE // max(1, M)))
    score_RM = torch.empty(rows, M, dtype=torch.float32, device=q_NHD.device)
    parts = []
    for q, w, start, end in zip(*(x.split(rows) for x in (q_NHD, w_NH, start_N, end_N)), strict=True):
        score = score_RM[: len(q)]
        _scores(q, k_MD, w, start, end, score, k_scale_M, row_M, fill=False)
        parts.append(topk_ids(score, topk, start_N=start, end_N=end))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@triton.jit
def _quantize_kernel(
    x_ptr, rotation_ptr, out_ptr, scale_ptr, R, D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + r[:, None] * D + d, mask=(r[:, None] < R) & (d < D), other=0.0)
    rotation = tl.load(rotation_ptr + d[:, None] * D + d, mask=(d[:, None] < D) & (d < D), other=0.0)
    y = tl.dot(x, rotation, input_precision=PRECISION) * (D**-0.5)
    top = tl.max(tl.abs(y), 1)
    scale = tl.where(top > 0.0, top / 448.0, 1.0)
    out = tl.clamp(y / scale[:, None], -448.0, 448.0).to(tl.float8e4nv, fp_downcast_rounding="rtne")
    tl.store(out_ptr + r[:, None] * D + d, out, mask=(r[:, None] < R) & (d < D))
    tl.store(scale_ptr + r, scale, mask=r < R)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows rotated by a Hadamard matrix, in e4m3 with one scale a row.

        y = x @ hadamard(D) / sqrt(D),   scale = max |y| / 448  (1 for a row of zeros),   out = e4m3(y / scale)

    [DeepSeek-V3.2-Exp, public inference code]. The rotation is orthogonal, so products of two rotated rows are those
    of the rows, and it spreads outliers over the width. A row's result does not depend on the other rows.
    ReLU commutes with a positive scale, so q's goes into the head weights and k's multiplies the sum over heads:

        q8, q_scale_NH = quantize_fp8(q_NHD);   k8, k_scale_M = quantize_fp8(k_MD)
        ids = index_topk(q8, k8, w_NH * q_scale_NH, start_N, end_N, topk, k_scale_M=k_scale_M)

    Returns:
        float8_e4m3fn of x's shape [..., D], float32 scale [...].

    Raises:
        ValueError: D is not a power of two.
    """
    D = x.shape[-1]
    if D & (D - 1):
        raise ValueError(f"the Hadamard rotation needs a width that is a power of two: {D}")
    x = x.contiguous()
    out, scale = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty_like(x[..., 0], dtype=torch.float32)
    rows = scale.numel()
    block_r = 16 if x.dtype == torch.float32 else 64
    if rows:
        _quantize_kernel[(triton.cdiv(rows, block_r),)](
            x, _hadamard(D, x.dtype, x.device), out, scale, rows, D, _precision(x), block_r, _padded(D)
        )
    return out, scale


@cache
def _hadamard(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix of +-1, by doubling."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.contiguous()


@triton.jit
def _selected_scores_kernel(
    q_ptr, k_ptr, w_ptr, id_ptr, score_ptr, K, k_stride, H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + (n * H + h[:, None]) * D + d, mask=(h[:, None] < H) & (d < D), other=0.0)
    w = tl.load(w_ptr + n * H + h, mask=h < H, other=0.0).to(tl.float32)
    m = tl.load(id_ptr + n * K + j, mask=j < K, other=-1).to(tl.int64)
    k = tl.load(k_ptr + m[:, None] * k_stride + d, mask=(m[:, None] >= 0) & (d < D), other=0.0)
    each = tl.maximum(tl.dot(k, tl.trans(q), input_precision=PRECISION), 0.0)
    tl.store(score_ptr + n * K + j, tl.sum(each * w, 1), mask=j < K)


@triton.jit
def _selected_scores_backward_kernel(
    q_ptr, k_ptr, w_ptr, id_ptr, d_score_ptr, dq_ptr, dk_ptr, dw_ptr, K, k_stride,
    H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    inside = (h[:, None] < H) & (d < D)
    q = tl.load(q_ptr + (n * H + h[:, None]) * D + d, mask=inside, other=0.0)
    w = tl.load(w_ptr + n * H + h, mask=h < H, other=0.0).to(tl.float32)
    dq = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    dw = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, K, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        m = tl.load(id_ptr + n * K + j, mask=j < K, other=-1).to(tl.int64)
        d_score = tl.load(d_score_ptr + n * K + j, mask=m >= 0, other=0.0)
        k = tl.load(k_ptr + m[:, None] * k_stride + d, mask=(m[:, None] >= 0) & (d < D), other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_K, BLOCK_H]
        dw += tl.sum(tl.maximum(score, 0.0) * d_score[:, None], 0)
        active = tl.where(score > 0.0, d_score[:, None], 0.0).to(k.dtype)
        dq += tl.dot(tl.trans(active), k, input_precision=PRECISION)
        weight = tl.where(score > 0.0, w, 0.0).to(q.dtype)
        dk = tl.dot(weight, q, input_precision=PRECISION) * d_score[:, None]
        at = (n * K + j[:, None]) * D + d
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=(j[:, None] < K) & (d < D))
    tl.store(dq_ptr + (n * H + h[:, None]) * D + d, (dq * w[:, None]).to(q.dtype), mask=inside)
    tl.store(dw_ptr + n * H + h, dw, mask=h < H)


class _SelectedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor, ids_NK: Tensor) -> Tensor:
        ctx.save_for_backward(q_NHD, k_MD, w_NH, ids_NK)
        (N, H, D), K = q_NHD.shape, ids_NK.shape[1]
        score_NK = torch.empty(N, K, dtype=torch.float32, device=q_NHD.device)
        if score_NK.numel():
            block_k, warps = (16, 8) if q_NHD.dtype == torch.float32 else (128, 4)
            _selected_scores_kernel[(N, triton.cdiv(K, block_k))](
                q_NHD, k_MD, w_NH, ids_NK, score_NK, K, k_MD.stride(0),
                H, D, _precision(q_NHD), _padded(H), _padded(D), block_k, num_warps=warps,
            )  # fmt: skip
        return score_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_score_NK: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NHD, k_MD, w_NH, ids_NK = ctx.saved_tensors
        (N, H, D), (M, _), K = q_NHD.shape, k_MD.shape, ids_NK.shape[1]
        d_score_NK = d_score_NK.contiguous()
        dq_NHD, dw_NH = torch.zeros_like(q_NHD), torch.zeros_like(w_NH, dtype=torch.float32)
        dk_MD = torch.zeros(M, D, dtype=torch.float32, device=k_MD.device)
        rows = max(1, min(N, CONTRIBUTION_BYTES // max(1, K * D * k_MD.element_size())))
        block_k, warps, stages = (32, 8, 1) if q_NHD.dtype == torch.float32 else (64, 4, 2)
        for n in range(0, N if K else 0, rows):
            part = slice(n, min(n + rows, N))
            ids = ids_NK[part]
            dk = torch.empty(ids.numel(), D, dtype=k_MD.dtype, device=k_MD.device)
            _selected_scores_backward_kernel[(len(ids),)](
                q_NHD[part], k_MD, w_NH[part], ids, d_score_NK[part], dq_NHD[part], dk, dw_NH[part], K, k_MD.stride(0),
                H, D, _precision(q_NHD), _padded(H), _padded(D), block_k, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            sum_by_key(dk, slots_by_key(ids, M), dk_MD)
        return dq_NHD, dk_MD.to(k_MD.dtype), dw_NH.to(w_NH.dtype), None


def selected_scores(q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor, ids_NK: Tensor) -> Tensor:
    """Index scores of given keys, differentiable in q, k and w.

        I[n, j] = sum_h w[n, h] * relu(q[n, h] . k[ids[n, j]]),   0 where the id is -1

    [DeepSeek-V3.2-Exp, eq. 1]. The gradient of k is summed over its (query, slot) pairs in ascending order, so it is
    the same on every run. relu has slope 0 at 0.

    Returns:
        [N, K] float32.
    """
    N, H, D = q_NHD.shape
    assert k_MD.shape[1] == D and k_MD.dtype == q_NHD.dtype and w_NH.shape == (N, H), (k_MD.shape, w_NH.shape)
    assert ids_NK.dtype == torch.int32 and len(ids_NK) == N, (ids_NK.dtype, ids_NK.shape)
    if k_MD.stride(1) != 1:
        k_MD = k_MD.contiguous()
    return _SelectedScores.apply(q_NHD.contiguous(), k_MD, w_NH.contiguous(), ids_NK.contiguous())
