"""Lightning indexer of DeepSeek Sparse Attention. Spec: reference.index_scores.

Shape suffixes: N = query tokens of all sequences, M = key tokens, H = heads, D = head width, K = selected keys.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels.by_key import slots_by_key, sum_by_key
from trimtab.kernels.reference import hadamard
from trimtab.kernels.topk import topk_ids

SCORES_AT_ONCE = 1 << 26
"""Scores that index_topk holds at a time: 256 MiB."""

CONTRIBUTION_BYTES = 1 << 29
"""Largest tensor of gradients per (query, key) that the backward of selected_scores holds at a time."""


@triton.jit
def _tile_scores(
    k, k_scale, q_ptr, w_ptr, i, H: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of keys for query i. Every score is made here, so its bits depend on the tile's size alone."""
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    at = i * H
    w = tl.load(w_ptr + at + h, mask=h < H, other=0.0).to(tl.float32)
    q = tl.load(q_ptr + (at + h[:, None]) * D + d, mask=(h[:, None] < H) & (d < D), other=0.0)
    each = tl.maximum(tl.dot(k, tl.trans(q), input_precision=PRECISION), 0.0)
    return tl.sum(each * w, 1) * k_scale


@triton.jit(do_not_specialize=["N", "M", "WIDTH"])
def _index_scores_kernel(
    q_ptr, k_ptr, w_ptr, k_scale_ptr, row_ptr, start_ptr, end_ptr, score_ptr, N, M, WIDTH, k_stride,
    H: tl.constexpr, D: tl.constexpr, FILL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m0, n0 = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64) * BLOCK_N
    m, d = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    n1 = tl.minimum(n0 + BLOCK_N, N)

    n = n0 + tl.arange(0, BLOCK_N)
    sees = tl.load(start_ptr + n, mask=n < N, other=M) < tl.minimum(m0 + BLOCK_M, M)
    sees &= tl.load(end_ptr + n, mask=n < N, other=0) > m0
    first, last = tl.min(tl.where(sees, n, n1), 0), tl.max(tl.where(sees, n + 1, n0), 0)
    if FILL:
        for hidden in range(n0, n1):
            if (hidden < first) | (hidden >= last):
                tl.store(score_ptr + hidden * WIDTH + m, float("-inf"), mask=m < M)
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
        start, end = tl.load(start_ptr + i), tl.load(end_ptr + i)
        score = _tile_scores(k, scale, q_ptr, w_ptr, i, H, D, PRECISION, BLOCK_H, BLOCK_D)
        visible = (m >= start) & (m < end)
        if FILL:
            tl.store(score_ptr + i * WIDTH + m, tl.where(visible, score, float("-inf")), mask=m < M)
        else:  # the columns count from the first visible key
            tl.store(score_ptr + i * WIDTH + (m - start), score, mask=visible & (m < M) & (m - start < WIDTH))


@triton.jit(do_not_specialize=["WIDTH"])
def _paged_scores_kernel(
    q_ptr, k_ptr, w_ptr, page_ptr, length_ptr, score_ptr, WIDTH, k_stride, pages,
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    m0 = tl.program_id(0) * BLOCK_M
    length = tl.minimum(tl.load(length_ptr + b), WIDTH)
    if m0 >= length:
        return
    m, d = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    page = tl.load(page_ptr + b * pages + m // PAGE, mask=m < length, other=0)
    row = page.to(tl.int64) * PAGE + m % PAGE
    k = tl.load(k_ptr + row[:, None] * k_stride + d, mask=(m[:, None] < length) & (d < D), other=0.0)
    score = _tile_scores(k, 1.0, q_ptr, w_ptr, b, H, D, PRECISION, BLOCK_H, BLOCK_D)
    tl.store(score_ptr + b * WIDTH + m, score, mask=m < length)


def _scores(
    q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor, start_N: Tensor, end_N: Tensor, score_NL: Tensor,
    k_scale_M: Tensor | None, row_M: Tensor | None, *, fill: bool,
) -> None:  # fmt: skip
    """Write the scores of visible keys to score_NL: with fill that of key m to column m, and -inf to the others; else
    to column m - start, and nothing else.

    Tiles depend on H, D and the type only, never on N or M: a score is the same to the bit in any batch.
    """
    N, M = len(q_NHD), len(k_MD) if row_M is None else len(row_M)
    assert start_N.shape == end_N.shape == (N,), (start_N.shape, end_N.shape)
    assert start_N.dtype == end_N.dtype == torch.int32 and score_NL.is_contiguous()
    assert row_M is None or row_M.dtype == torch.int64, row_M
    block_m, launch, constants = _tiles(q_NHD, k_MD, w_NH)
    if N == 0 or M == 0:
        return
    _index_scores_kernel[(triton.cdiv(M, block_m), triton.cdiv(N, 64))](
        q_NHD.contiguous(), k_MD, w_NH.contiguous(), k_scale_M, None if row_M is None else row_M.contiguous(),
        start_N.contiguous(), end_N.contiguous(), score_NL, N, M, score_NL.shape[1], k_MD.stride(0),
        *q_NHD.shape[1:], fill, *constants, block_m, 64, **launch,
    )  # fmt: skip


def _tiles(q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor) -> tuple[int, dict[str, int], tuple[str, int, int]]:
    """Keys of a tile, launch options, and (precision, padded heads, padded width): of H, D and the type alone.

    Raises:
        ValueError: q and k differ in type, or w in shape.
    """
    check_index(q_NHD, k_MD, w_NH)
    assert k_MD.stride(1) == 1, k_MD.stride()
    _, H, D = q_NHD.shape
    block_m, warps, stages = (32, 8, 2) if q_NHD.dtype == torch.float32 else (256, 8, 3)
    return block_m, {"num_warps": warps, "num_stages": stages}, (_precision(q_NHD), _padded(H), _padded(D))


def check_index(q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor) -> None:
    """Refuse an index whose parts do not fit. The head weights may be of a wider type than q and k.

    Raises:
        ValueError: q and k differ in type or width, or w is not [N, H].
    """
    N, H, D = q_NHD.shape
    if k_MD.dtype != q_NHD.dtype or k_MD.shape[1] != D:
        raise ValueError(
            f"the indexer's queries are {q_NHD.dtype}, {D} wide, and its keys {k_MD.dtype}, {k_MD.shape[1]} wide: "
            "they must be of one type and width; head weights alone may be float32 beside narrower ones"
        )
    if w_NH.shape != (N, H) or not w_NH.is_floating_point():
        raise ValueError(f"the index weights must be [{N}, {H}] floats, not {w_NH.dtype} {tuple(w_NH.shape)}")


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
    longest: int | None = None, k_scale_M: Tensor | None = None, row_M: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The topk visible keys with the best index scores: higher score first, then lower position. No gradient.

    Rows are scored in chunks, so memory is O(N * topk) plus SCORES_AT_ONCE. The set that a query selects does not
    depend on the other queries of the call.

    Args:
        longest: keys of the longest range, end - start, if the host knows: scores are kept for no more, so that a
            pack of many sequences takes few launches. All keys otherwise.
        q_NHD, k_MD: fp32, fp16, bf16 or float8_e4m3fn.
        w_NH: head weights times every scale of q, as quantize_fp8 says.
        k_scale_M: float32 scale of each row of k.
        row_M: int64 row of k, and of k_scale, that holds key m: then k is a whole paged cache.

    Returns:
        [N, topk] int32 positions m, ascending, padded with -1.

    Raises:
        ValueError: topk_ids cannot serve this topk; q and k differ in type, or w in shape.
    """
    N, M = len(q_NHD), len(k_MD) if row_M is None else len(row_M)
    assert k_scale_M is None or (k_scale_M.shape == (len(k_MD),) and k_scale_M.is_contiguous()), k_scale_M
    width = M if longest is None else min(longest, M)
    rows = max(1, min(N, SCORES_AT_ONCE // max(1, width)))
    score_RL = torch.empty(rows, width, dtype=torch.float32, device=q_NHD.device)
    count_N, parts = end_N - start_N, []
    for q, w, start, end, count in zip(*(x.split(rows) for x in (q_NHD, w_NH, start_N, end_N, count_N)), strict=True):
        score = score_RL[: len(q)]
        _scores(q, k_MD, w, start, end, score, k_scale_M, row_M, fill=False)
        parts.append(topk_ids(score, topk, count_N=count, first_N=start))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def paged_topk(
    q_BHD: Tensor,
    k_RD: Tensor,
    w_BH: Tensor,
    page_BP: Tensor,
    length_B: Tensor,
    topk: int,
    *,
    page_size: int,
    width: int,
    rows: bool = True,
) -> Tensor:
    """index_topk of a decoding step: query b sees the length[b] tokens of its sequence, where a paged cache holds them.

    Table and lengths are read on the device and no shape depends on them, so a CUDA graph can hold the call. Scores
    have the bits of index_topk's.

    Args:
        k_RD: the rows of the whole cache; token m of sequence b lies in row page[b, m // size] * size + m % size.
        page_BP, length_B: int32; a sequence of length 0 selects nothing.
        width: the longest length there can be.
        rows: of the cache are returned, else positions in the sequence.

    Returns:
        [B, topk] int32, in ascending order of position, padded with -1.

    Raises:
        ValueError: as index_topk does.
    """
    B = len(q_BHD)
    assert page_BP.dtype == length_B.dtype == torch.int32 and length_B.is_contiguous(), (page_BP.dtype, length_B.dtype)
    assert page_BP.stride(1) == 1 and page_BP.shape[1] * page_size >= width, (page_BP.shape, page_size, width)
    block_m, launch, constants = _tiles(q_BHD, k_RD, w_BH)
    score_BL = torch.empty(B, width, dtype=torch.float32, device=q_BHD.device)
    if B:
        _paged_scores_kernel[(triton.cdiv(width, block_m), B)](
            q_BHD.contiguous(), k_RD, w_BH.contiguous(), page_BP, length_B, score_BL, width, k_RD.stride(0),
            page_BP.stride(0), *q_BHD.shape[1:], page_size, *constants, block_m, **launch,
        )  # fmt: skip
    if not rows:
        return topk_ids(score_BL, topk, count_N=length_B)
    return topk_ids(score_BL, topk, count_N=length_B, page_NP=page_BP, page_size=page_size)


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
            x, hadamard(D, x.dtype, x.device), out, scale, rows, D, _precision(x), block_r, _padded(D)
        )
    return out, scale


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

    Raises:
        ValueError: q and k differ in type or width, or w in shape.
    """
    check_index(q_NHD, k_MD, w_NH)
    assert ids_NK.dtype == torch.int32 and len(ids_NK) == len(q_NHD), (ids_NK.dtype, ids_NK.shape)
    if k_MD.stride(1) != 1:
        k_MD = k_MD.contiguous()
    return _SelectedScores.apply(q_NHD.contiguous(), k_MD, w_NH.contiguous(), ids_NK.contiguous())
