"""Exact, deterministic top-k of long score rows. Spec: reference.select and reference.selected_ids."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 32768
"""Longest piece of a row that one program holds in registers."""
PART = 4096
"""Scores written at a time."""


@triton.jit
def _order(score):
    """int32 keys in the order of the scores: -0.0 and 0.0 become 0, and NaN becomes the key of -inf."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = tl.where(score == score, score, float("-inf")).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _threshold(key, topk):
    """The largest value that at least topk keys reach, by bisection; below every visible key if they are few.

    Stops early when exactly topk keys reach it. Zero is tried first: ReLU makes it the likeliest plateau.
    """
    lowest: tl.constexpr = -2139095040  # the key after that of -inf
    low = lowest
    high = tl.max(key, 0) + 1  # fewer than topk keys reach it
    if tl.sum((key >= lowest).to(tl.int32), 0) <= topk:
        high = lowest + 1
    probe = 1
    while low + 1 < high:
        reached = tl.sum((key >= probe).to(tl.int32), 0)
        if reached >= topk:
            low = probe
        else:
            high = probe
        if reached == topk:
            high = probe + 1
        probe = (low & high) + ((low ^ high) >> 1)
        if (low < 0) & (high == 1):
            probe = 0
    return low


@triton.jit
def _topk_kernel(
    score_ptr, name_ptr, start_ptr, end_ptr, id_ptr, value_ptr, M, stride, topk,
    BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    n, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = segment * BLOCK
    first, last = begin, M
    if start_ptr is not None:
        first, last = tl.maximum(first, tl.load(start_ptr + n)), tl.minimum(last, tl.load(end_ptr + n))
    score_ptr += n * stride
    m = begin + tl.arange(0, BLOCK)
    key = _order(tl.load(score_ptr + m, mask=(m >= first) & (m < last), other=float("-inf")))
    low = _threshold(key, topk)
    room = topk - tl.sum((key > low).to(tl.int32), 0)

    # Compaction reads the row again, from L2: one scan counts the keys above the threshold (high half) and on it
    # (low half) before each position.
    row = (n * tl.num_programs(1) + segment) * topk
    above_done, tied_done = 0, 0
    for offset in range(0, BLOCK, PART):
        at = begin + offset + tl.arange(0, PART)
        score = tl.load(score_ptr + at, mask=(at >= first) & (at < last), other=float("-inf"))
        part = _order(score)
        above, tied = part > low, part == low
        one = (above.to(tl.int32) << 16) + tied.to(tl.int32)
        before = tl.cumsum(one, 0) - one
        tied_before = tied_done + (before & 0xFFFF)
        slot = row + above_done + (before >> 16) + tl.minimum(tied_before, room)
        taken = above | (tied & (tied_before < room))
        name = at
        if name_ptr is not None:
            name = tl.load(name_ptr + n * stride + at, mask=taken, other=0)
        tl.store(id_ptr + slot, name, mask=taken)
        if value_ptr is not None:
            tl.store(value_ptr + slot, score, mask=taken)
        total = tl.sum(one, 0)
        above_done += total >> 16
        tied_done += total & 0xFFFF
    for pad in range(above_done + tl.minimum(tied_done, room), topk, 1024):
        j = pad + tl.arange(0, 1024)
        tl.store(id_ptr + row + j, -1, mask=j < topk)
        if value_ptr is not None:
            tl.store(value_ptr + row + j, float("-inf"), mask=j < topk)


def topk_ids(
    score_NM: Tensor,
    topk: int,
    *,
    start_N: Tensor | None = None,
    end_N: Tensor | None = None,
    segment: int = SEGMENT,
) -> Tensor:
    """Positions of the topk best scores of each row in a total order: higher score, then lower position.

    -0.0 equals 0.0; -inf and NaN are never selected. A longer row than a segment is cut: the best of each segment,
    in order of position, compete again, which selects the same set.

    Args:
        score_NM: float32, N rows of M scores; a row stride larger than M is fine.
        start_N, end_N: int32; scores outside start <= m < end are neither read nor selected.
        segment: a power of two; tests make it small.

    Returns:
        [N, topk] int32, ascending, padded with -1 at the end.

    Raises:
        ValueError: topk is not positive, or above half a segment for rows that must be cut.
    """
    N, M = score_NM.shape
    assert score_NM.dtype == torch.float32 and (score_NM.stride(1) == 1 or M <= 1), (score_NM.dtype, score_NM.stride())
    assert (start_N is None) == (end_N is None) and segment & (segment - 1) == 0 and segment <= SEGMENT, segment
    if topk < 1 or (M > segment and 2 * topk > segment):
        raise ValueError(f"topk must be positive, and at most {segment // 2} for more than {segment} keys: {topk}")
    if N == 0 or M == 0:
        return torch.full((N, topk), -1, dtype=torch.int32, device=score_NM.device)
    value, name = score_NM, None
    while True:
        width = value.shape[1]
        block = min(segment, triton.next_power_of_2(width))
        segments = triton.cdiv(width, block)
        ids = torch.empty(N, segments * topk, dtype=torch.int32, device=score_NM.device)
        best = torch.empty(ids.shape, dtype=torch.float32, device=score_NM.device) if segments > 1 else None
        _topk_kernel[(N, segments)](
            value, name, start_N, end_N, ids, best, width, value.stride(0), topk, block, min(block, PART),
            num_warps=max(1, min(16, block // 1024)),
        )  # fmt: skip
        if best is None:
            return ids
        value, name, start_N, end_N = best, ids, None, None
