"""Sums of weighted rows by segment: a sparse matrix in CSR form times a dense one, in a fixed order.

Shape suffixes: X = rows of the dense matrix, D = their width, E = entries of the sparse one, R = its rows (segments).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 1024
"""Entries of a segment that are added one after another; longer segments are cut, and their parts added in order."""
SPAN = 2048
"""Columns of the parts that exist at a time."""


@triton.jit
def _weighted_sum(x_ptr, index_ptr, g_ptr, start, end, d, D, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(start, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        g = tl.load(g_ptr + e, mask=e < end, other=0.0)
        index = tl.load(index_ptr + e, mask=e < end, other=0).to(tl.int64)
        x = tl.load(x_ptr + index[:, None] * D + d, mask=(g != 0.0)[:, None] & (d < D), other=0.0)
        acc += g[:, None] * x.to(tl.float32)
    return tl.sum(acc, 0)


@triton.jit
def _short_segment_kernel(
    x_ptr, index_ptr, g_ptr, offset_ptr, out_ptr, D,
    PART: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end = tl.load(offset_ptr + r), tl.load(offset_ptr + r + 1)
    if end - start <= PART:
        acc = _weighted_sum(x_ptr, index_ptr, g_ptr, start, end, d, D, BLOCK_E, BLOCK_D)
        tl.store(out_ptr + r * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _segment_part(segment_ptr, offset_ptr, E, PART: tl.constexpr):
    """Program 2c + side: the segment of part c's first entry (side 0), or the one that begins behind it (side 1)."""
    first = tl.program_id(0).to(tl.int64) // 2 * PART
    side = tl.program_id(0) % 2
    r = tl.load(segment_ptr + tl.where(side == 0, first, tl.minimum(first + PART, E) - 1)).to(tl.int64)
    start, end = tl.load(offset_ptr + r), tl.load(offset_ptr + r + 1)
    return r, first, start, end, (end - start > PART) & ((side == 0) | (start > first))


@triton.jit
def _segment_part_kernel(
    x_ptr, index_ptr, g_ptr, segment_ptr, offset_ptr, part_ptr, first_d, E, D,
    PART: tl.constexpr, SPAN: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    _, first, start, end, exists = _segment_part(segment_ptr, offset_ptr, E, PART)
    if exists:
        start, end = tl.maximum(start, first), tl.minimum(end, first + PART)
        acc = _weighted_sum(x_ptr, index_ptr, g_ptr, start, end, first_d + column, D, BLOCK_E, BLOCK_D)
        tl.store(part_ptr + tl.program_id(0).to(tl.int64) * SPAN + column, acc)


@triton.jit
def _join_parts_kernel(
    part_ptr, segment_ptr, offset_ptr, out_ptr, first_d, E, D,
    PART: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    r, first, start, end, exists = _segment_part(segment_ptr, offset_ptr, E, PART)
    if exists & (start >= first):
        acc = tl.load(part_ptr + tl.program_id(0).to(tl.int64) * SPAN + column)
        part = part_ptr + 2 * (first // PART) * SPAN + column
        for _ in range(first // PART + 1, tl.cdiv(end, PART)):
            part += 2 * SPAN
            acc += tl.load(part)
        d = first_d + column
        tl.store(out_ptr + r * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)


def segment_sums(x_XD: Tensor, index_E: Tensor, g_E: Tensor, segment_E: Tensor, offset_R: Tensor) -> Tensor:
    """Multiply a sparse matrix by a dense one: out[r] = sum of g[e] * x[index[e]] over the entries e of segment r.

    Rows of x are read for a g other than 0 only. Entries are added in an order that depends on offset_R alone.

    Args:
        segment_E: r of each entry, ascending; offset_R [R + 1] delimits the segments.

    Returns:
        [R, D] in x's dtype; zero for a segment without entries.
    """
    R, D, E = len(offset_R) - 1, x_XD.shape[1], len(index_E)
    assert g_E.shape == segment_E.shape == (E,) and x_XD.is_contiguous()
    out_RD = x_XD.new_empty(R, D)
    BLOCK_E, BLOCK_D = 1, min(1024, triton.next_power_of_2(D))
    _short_segment_kernel[R, triton.cdiv(D, BLOCK_D)](x_XD, index_E, g_E, offset_R, out_RD, D, PART, BLOCK_E, BLOCK_D)
    if E > PART:
        span = min(SPAN, triton.next_power_of_2(D))
        BLOCK_E, BLOCK_D = 32, min(256, span)
        grid = 2 * triton.cdiv(E, PART), span // BLOCK_D
        part_PC = x_XD.new_empty(grid[0], span, dtype=torch.float32)
        for first_d in range(0, D, span):
            _segment_part_kernel[grid](
                x_XD, index_E, g_E, segment_E, offset_R, part_PC, first_d, E, D, PART, span, BLOCK_E, BLOCK_D
            )
            _join_parts_kernel[grid](part_PC, segment_E, offset_R, out_RD, first_d, E, D, PART, span, BLOCK_D)
    return out_RD
