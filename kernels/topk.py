"""Exact, deterministic top-k of long score rows. Spec: reference.select and reference.selected_ids."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 32768
"""Longest piece of a row that one program holds in registers."""


@triton.jit
def _flip(bits):
    """From the bits of a float to an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(value):
    """The ordered integer of a float."""
    return _flip(value.to(tl.int32, bitcast=True))


@triton.jit
def _reach(score, bound):
    """How many scores are at least the bound."""
    # a sum of floats: exact, and a third of the instructions of a sum of integers
    return tl.sum(tl.where(score >= bound, 1.0, 0.0))


@triton.jit
def _threshold(score, topk):
    """The largest float that at least topk scores reach, or any that exactly topk reach; the lowest visible if few are.

    False position with the Illinois rule, in floats; after 14 counts bisection of their bits, so that no distribution
    takes long. Stops when exactly topk scores reach the bound. Zero goes first: ReLU makes it the likeliest plateau.
    """
    visible = score > float("-inf")
    low_value, high_value = tl.min(tl.where(visible, score, float("inf"))), tl.max(score)
    low, high = _key(low_value), _key(high_value) + 1  # all reach the first, none the second
    low_over, high_over = tl.sum(tl.where(visible, 1.0, 0.0)) - topk + 0.5, 0.5 - topk
    if low_over < 1.0:
        high = low
    probe = tl.maximum(tl.minimum(high - 1, 1), low + 1)
    steps, side = 0, 0
    while low + 1 < high:
        value = _flip(probe).to(tl.float32, bitcast=True)
        over = _reach(score, value) - topk + 0.5
        if over > 0.0:
            if side == 1:
                high_over *= 0.5
            low, low_value, low_over, side = probe, value, over, 1
        else:
            if side == -1:
                low_over *= 0.5
            high, high_value, high_over, side = probe, value, over, -1
        if over == 0.5:
            high = low + 1
        steps += 1
        guess = low_value + (high_value - low_value) * (low_over / (low_over - high_over))
        probe = tl.where((steps < 14) & (guess == guess), _key(guess), (low & high) + ((low ^ high) >> 1))
        probe = tl.where((low < 0) & (high == 1), 0, tl.maximum(tl.minimum(probe, high - 1), low + 1))
    return low_value


@triton.jit(do_not_specialize=["M", "stride"])
def _mark_kernel(
    score_ptr, count_ptr, above_ptr, tied_ptr, M, stride, topk, BLOCK: tl.constexpr,
):  # fmt: skip
    """A bit for every score: of the first word if it is above the threshold of its segment, of the second if on it."""
    n, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, last = segment * BLOCK, M
    if count_ptr is not None:
        last = tl.minimum(last, tl.load(count_ptr + n))
    word, bit = tl.arange(0, BLOCK // 32), tl.arange(0, 32)
    at = (n * tl.num_programs(1) + segment) * (BLOCK // 32) + word
    if last <= first:
        tl.store(above_ptr + at, 0)
        tl.store(tied_ptr + at, 0)
        return
    m = segment * BLOCK + 32 * word[:, None] + bit
    score = tl.load(score_ptr + n * stride + m, mask=(m >= first) & (m < last), other=float("-inf"))
    bound = _threshold(score, topk)
    one = tl.full((32,), 1, tl.uint32) << bit.to(tl.uint32)
    tl.store(above_ptr + at, tl.sum(tl.where(score > bound, one, 0), 1))
    tl.store(tied_ptr + at, tl.sum(tl.where(score == bound, one, 0), 1))


@triton.jit
def _ones(word):
    """Set bits of each word."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["stride"])
def _write_kernel(
    above_ptr, tied_ptr, score_ptr, name_ptr, first_ptr, page_ptr, id_ptr, value_ptr, stride, pages, topk,
    WORDS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Names of all set bits of the first words and, in order of position, of the second while there is room."""
    n, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = n * tl.num_programs(1) + segment
    i = tl.arange(0, WORDS)
    above, tied = tl.load(above_ptr + row * WORDS + i), tl.load(tied_ptr + row * WORDS + i)
    n_above, n_tied = _ones(above), _ones(tied)
    room = topk - tl.sum(n_above, 0)
    tied_before = tl.cumsum(n_tied, 0) - n_tied
    slot = row * topk + tl.cumsum(n_above, 0) - n_above + tl.minimum(tied_before, room)
    left = above | tl.where(tied_before < room, tied, 0)
    while tl.max(left, 0) != 0:  # a bit of every word at a time
        lowest = left & (0 - left)
        is_tied = (tied & lowest) != 0
        taken = (left != 0) & ((tied_before < room) | ~is_tied)
        at = 32 * (segment * WORDS + i) + (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        name = at
        if first_ptr is not None:
            name += tl.load(first_ptr + n)
        if page_ptr is not None:
            name = tl.load(page_ptr + n * pages + at // PAGE, mask=taken, other=0) * PAGE + at % PAGE
        if name_ptr is not None:
            name = tl.load(name_ptr + n * stride + at, mask=taken, other=0)
        tl.store(id_ptr + slot, name, mask=taken)
        if value_ptr is not None:
            tl.store(value_ptr + slot, tl.load(score_ptr + n * stride + at, mask=taken, other=0.0), mask=taken)
        slot += taken.to(tl.int32)
        tied_before += is_tied.to(tl.int32)
        left ^= lowest
    for pad in range(topk - room + tl.minimum(tl.sum(n_tied, 0), room), topk, 1024):
        j = pad + tl.arange(0, 1024)
        tl.store(id_ptr + row * topk + j, -1, mask=j < topk)
        if value_ptr is not None:
            tl.store(value_ptr + row * topk + j, float("-inf"), mask=j < topk)


def topk_ids(
    score_NM: Tensor,
    topk: int,
    *,
    count_N: Tensor | None = None,
    first_N: Tensor | None = None,
    page_NP: Tensor | None = None,
    page_size: int = 1,
    segment: int = SEGMENT,
) -> Tensor:
    """Names of the topk best scores of each row in a total order: higher score, then lower position.

    -0.0 equals 0.0; -inf and NaN are never selected. A longer row than a segment is cut: the best of each segment,
    in order of position, compete again, which selects the same set. Shapes follow from those of the arguments alone,
    so a CUDA graph can hold the call.

    Args:
        score_NM: float32, N rows of M scores; a row stride larger than M is fine.
        count_N: int32; scores at and after this position are neither read nor selected.
        first_N: int32; the name of a position is itself plus this, or itself.
        page_NP: int32, with a name for every page_size positions: that of m is page[m // size] * size + m % size,
            which is a cache's row. Not with first_N.
        segment: a power of two; tests make it small.

    Returns:
        [N, topk] int32 names, in ascending order of position, padded with -1 at the end.

    Raises:
        ValueError: topk is not positive, or above half a segment for rows that must be cut.
    """
    N, M = score_NM.shape
    assert score_NM.dtype == torch.float32 and (score_NM.stride(1) == 1 or M <= 1), (score_NM.dtype, score_NM.stride())
    assert segment & (segment - 1) == 0 and segment <= SEGMENT and (first_N is None or page_NP is None), segment
    assert page_NP is None or (page_NP.dtype == torch.int32 and page_NP.stride(1) == 1 and len(page_NP) == N), page_NP
    if topk < 1 or (segment < M and 2 * topk > segment):
        raise ValueError(f"topk must be positive, and at most {segment // 2} for more than {segment} keys: {topk}")
    if N == 0 or M == 0:
        return torch.full((N, topk), -1, dtype=torch.int32, device=score_NM.device)
    count_N, first_N = _plain(count_N), _plain(first_N)
    value, name, pages = score_NM, None, 0 if page_NP is None else page_NP.stride(0)
    while True:
        width = value.shape[1]
        block = max(64, min(segment, triton.next_power_of_2(width)))
        segments = triton.cdiv(width, block)
        above, tied = (torch.empty(N, segments * block // 32, dtype=torch.uint32, device=value.device) for _ in "at")
        ids = torch.empty(N, segments * topk, dtype=torch.int32, device=value.device)
        best = torch.empty(ids.shape, dtype=torch.float32, device=value.device) if segments > 1 else None
        grid, stride = (N, segments), value.stride(0)
        warps = max(1, min(16, block // 1024))
        _mark_kernel[grid](value, count_N, above, tied, width, stride, topk, block, num_warps=warps)
        _write_kernel[grid](
            above, tied, value, name, first_N, page_NP, ids, best, stride, pages, topk, block // 32, page_size,
            num_warps=4,
        )  # fmt: skip
        if best is None:
            return ids
        value, name, count_N, first_N, page_NP = best, ids, None, None, None


def _plain(x_N: Tensor | None) -> Tensor | None:
    """As a kernel reads it: one int32 after another."""
    assert x_N is None or (x_N.dtype == torch.int32 and x_N.ndim == 1), x_N
    return None if x_N is None else x_N.contiguous()
