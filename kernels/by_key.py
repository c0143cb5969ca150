"""Sums over everything that refers to a key, in a fixed order and without float atomics: the transpose of a gather.

Shape suffixes: N = query tokens, K = selected keys per query, M = key tokens, E = N * K slots, C = width of a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS_AT_ONCE = 1 << 22
"""Counters of slots_by_key: 16 MiB, which a GPU keeps in its last-level cache."""


class KeySlots(NamedTuple):
    """Slots n * K + j grouped by the key they hold.

    order_E [N * K]: slots by key, ascending within a key; what follows the last used one is undefined.
    offset_M [M + 1] int64: key m owns order_E[offset_M[m] : offset_M[m + 1]].
    """

    order_E: Tensor
    offset_M: Tensor


@triton.jit
def _place_slots_kernel(
    ids_ptr, counter_ptr, order_ptr, N, K, M, PARTS,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    for n in range(part * ROWS, tl.minimum(part * ROWS + ROWS, N)):
        for first in range(0, K, BLOCK_K):
            j = first + tl.arange(0, BLOCK_K)
            ids = tl.load(ids_ptr + n * K + j, mask=j < K, other=-1).to(tl.int64)
            used = (ids >= 0) & (ids < M)
            at = tl.atomic_add(counter_ptr + ids * PARTS + part, 1, mask=used, sem="relaxed", scope="cta")
            if STORE:
                tl.store(order_ptr + at, n * K + j, mask=used)
            tl.debug_barrier()  # the next row comes after this one


SLOTS_IN_INT32 = 2**31
"""As many slots or more are numbered in int64."""


def slots_by_key(ids_NK: Tensor, M: int) -> KeySlots:
    """Group the slots of a selection by key: a stable counting sort.

    Queries are counted in parts, each by one program; a running sum over (key, part) then gives every part the
    place of its first slot of a key, so the order depends on no race. Integer counts are the only atomics.

    Args:
        ids_NK: key ids, distinct within a row; -1 marks an unused slot.
        M: number of keys.

    Returns:
        KeySlots; order_E is int32 where N * K allows it.
    """
    N, K = ids_NK.shape
    ids_NK = ids_NK.contiguous()
    dtype = torch.int32 if N * K < SLOTS_IN_INT32 else torch.int64
    order_E = torch.empty(N * K, dtype=dtype, device=ids_NK.device)
    rows = max(8, triton.cdiv(N * M, COUNTERS_AT_ONCE))
    parts = triton.cdiv(N, rows)
    if parts == 0 or K == 0:
        return KeySlots(order_E, torch.zeros(M + 1, dtype=torch.int64, device=ids_NK.device))
    counter = torch.zeros(M * parts + 1, dtype=dtype, device=ids_NK.device)
    BLOCK_K = min(2048, max(16, triton.next_power_of_2(K)))
    sizes = dict(ROWS=rows, BLOCK_K=BLOCK_K, num_warps=8)
    _place_slots_kernel[(parts,)](ids_NK, counter[1:], order_E, N, K, M, parts, STORE=False, **sizes)
    first = counter.cumsum(0, dtype=dtype)
    offset_M = first[::parts].to(torch.int64, copy=True)  # the second pass moves them on
    _place_slots_kernel[(parts,)](ids_NK, first, order_E, N, K, M, parts, STORE=True, **sizes)
    return KeySlots(order_E, offset_M)


@triton.jit
def _sum_by_key_kernel(
    x_ptr, order_ptr, offset_ptr, out_ptr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offset_ptr + m), tl.load(offset_ptr + m + 1)
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        slot = tl.load(order_ptr + e, mask=e < end, other=0).to(tl.int64)
        mask = (e < end)[:, None] & (c < C)
        total += tl.sum(tl.load(x_ptr + slot[:, None] * C + c, mask=mask, other=0.0).to(tl.float32), 0)
    out = out_ptr + m * C + c
    if ADD:
        total += tl.load(out, mask=c < C, other=0.0)
    tl.store(out, total, mask=c < C)


def sum_by_key(x_EC: Tensor, slots: KeySlots, out_MC: Tensor | None = None) -> Tensor:
    """Sum the rows of each key's slots in fp32, in an order fixed by the slots alone.

        out[m] (+)= sum of x[e] over the slots e that hold key m

    Args:
        x_EC: one row per slot, of any float dtype; rows of unused slots are not read.
        out_MC: float32 to add to; a new tensor is returned without it.

    Returns:
        [M, C] float32.
    """
    (E, C), M = x_EC.shape, len(slots.offset_M) - 1
    assert slots.order_E.shape == (E,), (x_EC.shape, slots.order_E.shape)
    add, x_EC = out_MC is not None, x_EC.contiguous()
    if out_MC is None:
        out_MC = torch.empty(M, C, dtype=torch.float32, device=x_EC.device)
    assert out_MC.shape == (M, C) and out_MC.dtype == torch.float32 and out_MC.is_contiguous(), out_MC.shape
    if M > 0:
        BLOCK_C = max(16, triton.next_power_of_2(C))
        BLOCK_E = max(1, 4096 // BLOCK_C)
        warps = max(1, min(4, BLOCK_C // 256))
        _sum_by_key_kernel[(M,)](x_EC, slots.order_E, slots.offset_M, out_MC, C, BLOCK_C, BLOCK_E, add, num_warps=warps)
    return out_MC
