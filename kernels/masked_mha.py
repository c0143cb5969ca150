"""Multi-head attention over packed sequences in tiles: over all visible keys, or over a selection of them.

Shape suffixes: N = queries of all packed sequences, M = keys, H = heads, D = query and key width, V = value width,
K = selected keys of a query, W = words of 32 keys.

A width that is no power of two is multiplied in two parts, a power of two and the padded rest: 192 = 128 + 64.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


class Tile(NamedTuple):
    """Queries and keys of one tile, and how a program runs it."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD, QUERY_GRADIENT, KEY_GRADIENT = Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 64, 4, 2)
"""What an H200 runs fastest in half precision at the widths 192 and 128."""
SMALL = Tile(32, 32, 4, 1)
"""Where those do not fit."""


def large_tiles(x: Tensor) -> bool:
    """Whether tiles of the H200's size fit: 16-bit values, and 227 KiB of shared memory a program."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return x.dtype != torch.float32
    properties = torch.cuda.get_device_properties(x.device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= 227 * 1024


def split_width(D: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0), each 0 or at least 16, whose sum covers D."""
    head = max(16, 1 << (D.bit_length() - 1))
    return head, max(16, triton.next_power_of_2(D - head)) if head < D else 0


@triton.jit
def _tile(ptr, first, count, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of a tile, and which lie inside. Offsets within it are int32: the compiler keeps them over a loop."""
    row, column = tl.arange(0, ROWS), FIRST + tl.arange(0, BLOCK)
    inside = (first + row < count)[:, None] & (column < WIDTH)[None, :]
    return ptr + tl.full([], first, tl.int64) * stride + (row[:, None] * stride + column[None, :]), inside


@triton.jit
def load_tile(
    ptr, first, count, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + BLOCK of ROWS rows of a matrix, zero past its last row and past WIDTH."""
    place, inside = _tile(ptr, first, count, stride, FIRST, WIDTH, ROWS, BLOCK)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def store_tile(
    ptr, value, first, count, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The inverse of load_tile."""
    place, inside = _tile(ptr, first, count, stride, FIRST, WIDTH, ROWS, BLOCK)
    tl.store(place, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def visible(start, end, m):
    """Whether key m[j] lies in the range of query i: one comparison, because a key before start wraps around."""
    return (m - start).to(tl.uint32) < tl.maximum(end - start, 0).to(tl.uint32)


@triton.jit
def _selection_bits_kernel(
    ids_ptr, start_ptr, end_ptr, bits_ptr, K, W, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    start, end = tl.load(start_ptr + n), tl.load(end_ptr + n)
    for first in range(0, K, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        m = tl.load(ids_ptr + n * K + slot, mask=slot < K, other=-1)
        word = m // 32 - start // 32
        bit = (tl.full([BLOCK], 1, tl.int32) << (m % 32)).to(tl.int32)
        # setting bits commutes: the order of these atomics does not show
        tl.atomic_or(bits_ptr + n * W + word, bit, mask=(m >= start) & (m < end) & (word < W), sem="relaxed")


def selection_bits(ids_NK: Tensor, start_N: Tensor, end_N: Tensor, longest: int | None = None) -> Tensor:
    """The selection as bits, 32 keys a word, counted from the word that holds the first visible key.

        bit b of word w of row n  =  key 32 * (start[n] // 32 + w) + b is selected and visible

    Args:
        longest: keys of the longest range, end - start, if the host knows; finding out waits for a GPU.

    Returns:
        [N, W] int32, W as the widest visible range needs, wherever in a word it starts.
    """
    N, K = ids_NK.shape
    assert start_N.shape == end_N.shape == (N,), (ids_NK.shape, start_N.shape, end_N.shape)
    start_N, end_N = start_N.contiguous(), end_N.contiguous()
    if longest is None:
        longest = int((end_N - start_N).max()) if N else 0
    bits_NW = torch.zeros(N, triton.cdiv(max(1, longest) + 31, 32), dtype=torch.int32, device=ids_NK.device)
    if bits_NW.numel():
        block = min(1024, triton.next_power_of_2(max(K, 1)))
        ids_NK = ids_NK.to(torch.int32).contiguous()
        _selection_bits_kernel[(N,)](ids_NK, start_N, end_N, bits_NW, K, bits_NW.shape[1], block)
    return bits_NW


@triton.jit
def _words(bits_ptr, n, N, start, m0, W, J: tl.constexpr):
    word = m0 // 32 - start // 32 + J
    return tl.load(bits_ptr + n.to(tl.int64) * W + word, mask=(n < N) & (word >= 0) & (word < W), other=0)


@triton.jit
def _selected(bits_ptr, n, N, start, m0, W, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether each query of a tile selects each of its keys; m0 is a multiple of 32.  [BLOCK_N, BLOCK_M]"""
    key = tl.arange(0, BLOCK_M)[None, :]
    word = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for j in tl.static_range(BLOCK_M // 32):
        word = tl.where(key // 32 == j, _words(bits_ptr, n, N, start, m0, W, j)[:, None], word)
    return ((word >> (key & 6)) >> (key & 25) & 1) != 0


@triton.jit
def _selected_transposed(bits_ptr, n, N, start, m0, W, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """The transpose of _selected, made in place: a tile's layout decides which of the two is free."""
    key = tl.arange(0, BLOCK_M)[:, None]
    word = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for j in tl.static_range(BLOCK_M // 32):
        word = tl.where(key // 32 == j, _words(bits_ptr, n, N, start, m0, W, j)[None, :], word)
    return ((word >> (key & 23)) >> (key & 8) & 1) != 0


@triton.jit
def _query_ranges(start_ptr, end_ptr, n, N, BLOCK_M: tl.constexpr):
    """Ranges of a tile of queries, and four key positions: every key is in [lo, hi), all see [full_lo, full_hi)."""
    start = tl.load(start_ptr + n, mask=n < N, other=0)
    end = tl.load(end_ptr + n, mask=n < N, other=0)
    sees = start < end
    lo = tl.min(tl.where(sees, start, 2147483647), 0) // BLOCK_M * BLOCK_M
    hi = tl.max(tl.where(sees, end, 0), 0)
    full_lo = tl.cdiv(tl.max(tl.where(n < N, start, 0), 0), BLOCK_M) * BLOCK_M
    full_hi = tl.min(tl.where(n < N, tl.where(sees, end, 0), 2147483647), 0) // BLOCK_M * BLOCK_M
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.maximum(full_hi, full_lo)
    return start, end, lo, hi, full_lo, full_hi


@triton.jit
def _forward_tiles(
    acc, top, total, q, q_rest, n, start, end, first, last, gap, gap_width, k_ptr, v_ptr, bits_ptr, N, M, W,
    k_stride, v_stride, scale_log2,
    D: tl.constexpr, D_HEAD: tl.constexpr, D_REST: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    SELECTED: tl.constexpr, FULL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends to the keys [first, last), those from the gap on moved up by its width. FULL: all queries see them."""
    for i in range(first, last, BLOCK_M):
        m0 = tl.where(i < gap, i, i + gap_width)
        m = m0 + tl.arange(0, BLOCK_M)
        score = tl.dot(q, tl.trans(load_tile(k_ptr, m0, M, k_stride, 0, D, BLOCK_M, D_HEAD)), input_precision=PRECISION)
        if D_REST > 0:
            k_rest = load_tile(k_ptr, m0, M, k_stride, D_HEAD, D, BLOCK_M, D_REST)
            score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision=PRECISION)
        if SELECTED:
            score = tl.where(_selected(bits_ptr, n, N, start, m0, W, BLOCK_N, BLOCK_M), score, float("-inf"))
        elif not FULL:
            score = tl.where(visible(start[:, None], end[:, None], m[None, :]), score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale_log2)
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        prob = tl.exp2(score * scale_log2 - finite_top[:, None])
        shrink = tl.exp2(top - finite_top)
        total = total * shrink + tl.sum(prob, 1)
        v = load_tile(v_ptr, m0, M, v_stride, 0, V, BLOCK_M, V_BLOCK)
        acc = tl.dot(prob.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, bits_ptr, out_ptr, lse_ptr, N, M, H, W, scale_log2,
    D: tl.constexpr, D_HEAD: tl.constexpr, D_REST: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    SELECTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries see most: the longest programs start first
    n0 = block * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    start, end, lo, hi, full_lo, full_hi = _query_ranges(start_ptr, end_ptr, n, N, BLOCK_M)

    q = load_tile(q_ptr + h * D, n0, N, H * D, 0, D, BLOCK_N, D_HEAD)
    q_rest = q
    if D_REST > 0:
        q_rest = load_tile(q_ptr + h * D, n0, N, H * D, D_HEAD, D, BLOCK_N, D_REST)
    acc = tl.zeros([BLOCK_N, V_BLOCK], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    k_ptr += h * D
    v_ptr += h * V
    if SELECTED:
        acc, top, total = _forward_tiles(
            acc, top, total, q, q_rest, n, start, end, lo, hi, hi, 0, k_ptr, v_ptr, bits_ptr, N, M, W, H * D, H * V,
            scale_log2, D, D_HEAD, D_REST, V, V_BLOCK, True, False, BLOCK_N, BLOCK_M, PRECISION,
        )  # fmt: skip
    else:
        full = full_hi - full_lo
        acc, top, total = _forward_tiles(
            acc, top, total, q, q_rest, n, start, end, full_lo, full_hi, full_hi, 0, k_ptr, v_ptr, bits_ptr, N, M, W,
            H * D, H * V, scale_log2, D, D_HEAD, D_REST, V, V_BLOCK, False, True, BLOCK_N, BLOCK_M, PRECISION,
        )  # fmt: skip
        acc, top, total = _forward_tiles(
            acc, top, total, q, q_rest, n, start, end, lo, hi - full, full_lo, full, k_ptr, v_ptr, bits_ptr, N, M, W,
            H * D, H * V, scale_log2, D, D_HEAD, D_REST, V, V_BLOCK, False, False, BLOCK_N, BLOCK_M, PRECISION,
        )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # no keys: acc is 0 and top -inf, as they should be
    acc = acc / total[:, None]
    store_tile(out_ptr + h * V, acc, n0, N, H * V, 0, V, BLOCK_N, V_BLOCK)
    tl.store(lse_ptr + n.to(tl.int64) * H + h, (top + tl.log2(total)) * LN_2, mask=n < N)


@triton.jit
def load_lse(lse_ptr, place, inside):
    """Log2 of normalisers; +inf for a query without keys, and outside, whose probabilities are then 0."""
    lse = tl.load(lse_ptr + place, mask=inside, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse / LN_2)


@triton.jit
def _query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, bits_ptr, out_ptr, lse_ptr, dout_ptr, row_ptr, dq_ptr,
    N, M, H, W, scale_log2,
    D: tl.constexpr, D_HEAD: tl.constexpr, D_REST: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    SELECTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    n0 = block * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    start, end, lo, hi, _, _ = _query_ranges(start_ptr, end_ptr, n, N, BLOCK_M)

    dout = load_tile(dout_ptr + h * V, n0, N, H * V, 0, V, BLOCK_N, V_BLOCK)
    out = load_tile(out_ptr + h * V, n0, N, H * V, 0, V, BLOCK_N, V_BLOCK)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    lse = load_lse(lse_ptr + h, n.to(tl.int64) * H, n < N)
    tl.store(row_ptr + h * N + n, lse, mask=n < N)
    tl.store(row_ptr + (H + h) * N + n, delta, mask=n < N)
    q = load_tile(q_ptr + h * D, n0, N, H * D, 0, D, BLOCK_N, D_HEAD)
    dq = tl.zeros([BLOCK_N, D_HEAD], tl.float32)
    if D_REST > 0:
        q_rest = load_tile(q_ptr + h * D, n0, N, H * D, D_HEAD, D, BLOCK_N, D_REST)
        dq_rest = tl.zeros([BLOCK_N, D_REST], tl.float32)

    for m0 in range(lo, hi, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        k = load_tile(k_ptr + h * D, m0, M, H * D, 0, D, BLOCK_M, D_HEAD)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if D_REST > 0:
            k_rest = load_tile(k_ptr + h * D, m0, M, H * D, D_HEAD, D, BLOCK_M, D_REST)
            score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision=PRECISION)
        v = load_tile(v_ptr + h * V, m0, M, H * V, 0, V, BLOCK_M, V_BLOCK)
        dprob = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if SELECTED:
            seen = _selected(bits_ptr, n, N, start, m0, W, BLOCK_N, BLOCK_M)
        else:
            seen = visible(start[:, None], end[:, None], m[None, :])
        prob = tl.exp2(tl.where(seen, score, float("-inf")) * scale_log2 - lse[:, None])
        dscore = (prob * (dprob - delta[:, None])).to(k.dtype)
        dq = tl.dot(dscore, k, dq, input_precision=PRECISION)
        if D_REST > 0:
            dq_rest = tl.dot(dscore, k_rest, dq_rest, input_precision=PRECISION)

    scale = scale_log2 * LN_2
    store_tile(dq_ptr + h * D, dq * scale, n0, N, H * D, 0, D, BLOCK_N, D_HEAD)
    if D_REST > 0:
        store_tile(dq_ptr + h * D, dq_rest * scale, n0, N, H * D, D_HEAD, D, BLOCK_N, D_REST)


@triton.jit
def _seen_by_kernel(start_ptr, end_ptr, span_ptr, N, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    m0 = tl.program_id(0) * BLOCK_M
    first, last = N, 0
    for n0 in range(0, N, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        start = tl.load(start_ptr + n, mask=n < N, other=0)
        end = tl.load(end_ptr + n, mask=n < N, other=0)
        sees = (start < end) & (start < m0 + BLOCK_M) & (end > m0)
        first = tl.minimum(first, tl.min(tl.where(sees, n, N), 0))
        last = tl.maximum(last, tl.max(tl.where(sees, n + 1, 0), 0))
    tl.store(span_ptr + tl.program_id(0) * 2, first)
    tl.store(span_ptr + tl.program_id(0) * 2 + 1, last)


def seen_by(start_N: Tensor, end_N: Tensor, M: int, block: int) -> Tensor:
    """First query, and last query + 1, that see any key of each block of keys.

    Returns:
        [ceil(M / block), 2] int32; (N, 0) for a block that nobody sees.
    """
    assert start_N.shape == end_N.shape, (start_N.shape, end_N.shape)
    span = torch.empty(triton.cdiv(M, block), 2, dtype=torch.int32, device=start_N.device)
    _seen_by_kernel[(len(span),)](start_N, end_N, span, len(start_N), block, 1024)
    return span


@triton.jit
def _key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, bits_ptr, dout_ptr, row_ptr, span_ptr, dk_ptr, dv_ptr,
    N, M, H, W, scale_log2,
    D: tl.constexpr, D_HEAD: tl.constexpr, D_REST: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    SELECTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    m0 = tl.program_id(0) * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    first = tl.load(span_ptr + tl.program_id(0) * 2) // BLOCK_N * BLOCK_N
    last = tl.load(span_ptr + tl.program_id(0) * 2 + 1)

    k = load_tile(k_ptr + h * D, m0, M, H * D, 0, D, BLOCK_M, D_HEAD)
    v = load_tile(v_ptr + h * V, m0, M, H * V, 0, V, BLOCK_M, V_BLOCK)
    dk = tl.zeros([BLOCK_M, D_HEAD], tl.float32)
    dv = tl.zeros([BLOCK_M, V_BLOCK], tl.float32)
    if D_REST > 0:
        k_rest = load_tile(k_ptr + h * D, m0, M, H * D, D_HEAD, D, BLOCK_M, D_REST)
        dk_rest = tl.zeros([BLOCK_M, D_REST], tl.float32)

    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        start = tl.load(start_ptr + n, mask=n < N, other=0)
        q = load_tile(q_ptr + h * D, n0, N, H * D, 0, D, BLOCK_N, D_HEAD)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if D_REST > 0:
            q_rest = load_tile(q_ptr + h * D, n0, N, H * D, D_HEAD, D, BLOCK_N, D_REST)
            score = tl.dot(k_rest, tl.trans(q_rest), score, input_precision=PRECISION)
        if SELECTED:
            seen = _selected_transposed(bits_ptr, n, N, start, m0, W, BLOCK_N, BLOCK_M)
        else:
            end = tl.load(end_ptr + n, mask=n < N, other=0)
            seen = visible(start[None, :], end[None, :], m[:, None])
        lse = tl.load(row_ptr + h * N + n, mask=n < N, other=float("inf"))
        prob = tl.exp2(tl.where(seen, score, float("-inf")) * scale_log2 - lse[None, :])
        dout = load_tile(dout_ptr + h * V, n0, N, H * V, 0, V, BLOCK_N, V_BLOCK)
        dv = tl.dot(prob.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dprob = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        delta = tl.load(row_ptr + (H + h) * N + n, mask=n < N, other=0.0)
        dscore = (prob * (dprob - delta[None, :])).to(q.dtype)
        dk = tl.dot(dscore, q, dk, input_precision=PRECISION)
        if D_REST > 0:
            dk_rest = tl.dot(dscore, q_rest, dk_rest, input_precision=PRECISION)

    scale = scale_log2 * LN_2
    store_tile(dk_ptr + h * D, dk * scale, m0, M, H * D, 0, D, BLOCK_M, D_HEAD)
    store_tile(dv_ptr + h * V, dv, m0, M, H * V, 0, V, BLOCK_M, V_BLOCK)
    if D_REST > 0:
        store_tile(dk_ptr + h * D, dk_rest * scale, m0, M, H * D, D_HEAD, D, BLOCK_M, D_REST)


class _MaskedMha(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q_NHD: Tensor, k_MHD: Tensor, v_MHV: Tensor, bits_NW: Tensor | None, start_N: Tensor,
        end_N: Tensor, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (N, H, _), V = q_NHD.shape, v_MHV.shape[-1]
        out_NHV = torch.empty(N, H, V, dtype=q_NHD.dtype, device=q_NHD.device)
        lse_NH = torch.empty(N, H, dtype=torch.float32, device=q_NHD.device)
        tile, sizes = _launch(FORWARD, q_NHD, k_MHD, v_MHV, bits_NW, scale)
        _forward_kernel[(triton.cdiv(N, tile.queries), H)](
            q_NHD, k_MHD, v_MHV, start_N, end_N, bits_NW, out_NHV, lse_NH, *sizes,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        ctx.save_for_backward(q_NHD, k_MHD, v_MHV, bits_NW, start_N, end_N, out_NHV, lse_NH)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_NH)
        return out_NHV, lse_NH

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_NHV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_MHD, v_MHV, bits_NW, start_N, end_N, out_NHV, lse_NH = ctx.saved_tensors
        (N, H, _), M, dout_NHV = q_NHD.shape, len(k_MHD), dout_NHV.contiguous()
        dq_NHD, dk_MHD, dv_MHV = torch.empty_like(q_NHD), torch.empty_like(k_MHD), torch.empty_like(v_MHV)
        rows_2HN = torch.empty(2, H, N, dtype=torch.float32, device=lse_NH.device)  # lse in log2, and sum O dO
        tile, sizes = _launch(QUERY_GRADIENT, q_NHD, k_MHD, v_MHV, bits_NW, ctx.scale)
        _query_gradient_kernel[(triton.cdiv(N, tile.queries), H)](
            q_NHD, k_MHD, v_MHV, start_N, end_N, bits_NW, out_NHV, lse_NH, dout_NHV, rows_2HN, dq_NHD, *sizes,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile, sizes = _launch(KEY_GRADIENT, q_NHD, k_MHD, v_MHV, bits_NW, ctx.scale)
        span = seen_by(start_N, end_N, M, tile.keys)
        _key_gradient_kernel[(triton.cdiv(M, tile.keys), H)](
            q_NHD, k_MHD, v_MHV, start_N, end_N, bits_NW, dout_NHV, rows_2HN, span, dk_MHD, dv_MHV, *sizes,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return dq_NHD, dk_MHD, dv_MHV, None, None, None, None


def _launch(
    tile: Tile, q_NHD: Tensor, k_MHD: Tensor, v_MHV: Tensor, bits_NW: Tensor | None, scale: float
) -> tuple[Tile, tuple]:
    """The tile that fits, and the sizes that close every kernel's arguments."""
    (N, H, D), (M, _, V) = q_NHD.shape, v_MHV.shape
    if D + V > 320 or not large_tiles(q_NHD):
        tile = SMALL
    words = 0 if bits_NW is None else bits_NW.shape[1]
    widths = D, *split_width(D), V, max(16, triton.next_power_of_2(V))
    precision = "ieee" if q_NHD.dtype == torch.float32 else None
    return tile, (N, M, H, words, scale * LOG2_E, *widths, bits_NW is not None, tile.queries, tile.keys, precision)


def masked_mha(
    q_NHD: Tensor,
    k_MHD: Tensor,
    v_MHV: Tensor,
    ids_NK: Tensor | None,
    start_N: Tensor,
    end_N: Tensor,
    scale: float,
    *,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query to its selected keys, or to every key m with start[n] <= m < end[n].

        O[n, h] = sum_m softmax_m(scale * q[n, h] . k[m, h]) v[m, h]

    [FlashAttention-2, algorithms 1-2] with the selection as bits. Differentiable in q, k and v, through O only; the
    same bits on every run. Beside the results it holds one bit for each query and key of the widest range.

    Args:
        ids_NK: selected keys, unique in a row, -1 unused; None for all visible keys. Ids out of range are dropped.
        start_N, end_N: int32; an empty range is legal.
        longest: keys of the longest range, if the host knows; with a selection, finding out waits for a GPU.

    Returns:
        O [N, H, V] in q's dtype, zero for a query without keys; lse [N, H] float32, natural logarithm, then -inf.

    Raises:
        ValueError: the scale is not positive, or q, k and v are of more than one type.
    """
    (N, H, D), M = q_NHD.shape, len(k_MHD)
    assert k_MHD.shape == (M, H, D) and v_MHV.shape[:2] == (M, H), (q_NHD.shape, k_MHD.shape, v_MHV.shape)
    assert start_N.shape == end_N.shape == (N,), (start_N.shape, end_N.shape)
    assert start_N.dtype == end_N.dtype == torch.int32, (start_N.dtype, end_N.dtype)
    if not q_NHD.dtype == k_MHD.dtype == v_MHV.dtype:
        raise ValueError(
            f"queries are {q_NHD.dtype}, keys {k_MHD.dtype} and values {v_MHV.dtype}: they must be of one type; "
            "torch.autocast mixes them, so leave it off (ACCELERATE_MIXED_PRECISION=no)"
        )
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    start_N, end_N = start_N.contiguous(), end_N.contiguous()
    bits_NW = None if ids_NK is None else selection_bits(ids_NK, start_N, end_N, longest)
    return _MaskedMha.apply(q_NHD.contiguous(), k_MHD.contiguous(), v_MHV.contiguous(), bits_NW, start_N, end_N, scale)
