"""What the kernels of sparse_mla for Hopper share: rows of 512 + 64 numbers, gathered in tiles of 64 keys."""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

gather = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # the older name
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the older name
HEADS = gl.constexpr(64)
KEYS = gl.constexpr(64)
STAGES = gl.constexpr(2)
HALF = gl.constexpr(256)
ROPE = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)
PRODUCER_THREADS = gl.constexpr(128)


@gluon.jit
def used_tiles(ids_ptr, K, K_PADDED: gl.constexpr):
    """Tiles of keys up to the last used id."""
    slot = gl.arange(0, K_PADDED, layout=gl.BlockedLayout([4], [32], [4], [0]))
    used = gl.load(ids_ptr + slot, mask=slot < K, other=-1) >= 0
    return gl.cdiv(gl.max(gl.where(used, slot + 1, 0), 0), KEYS)


@gluon.jit
def gather_rows(smem, row_ptr, first_column, mask, layout: gl.constexpr, WIDTH: gl.constexpr):
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    pointer = row_ptr[:, None] + (first_column + column)[None, :]
    gather(smem, pointer, mask=mask)


@gluon.jit
def store_half(smem, out, out_ptr, out_stride, heads, WIDTH: gl.constexpr):
    """Through shared memory, so that the stores to memory are wide."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    smem.store(out)
    barrier()
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    pointer = out_ptr + head[:, None] * out_stride + column[None, :]
    gl.store(pointer, smem.load(layout), mask=(head < heads)[:, None])


@gluon.jit
def store_piece(out, smem, row_ptr, column, slots):
    """64 columns of the rows of a tile, through shared memory, so that the stores to memory are wide."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    smem.store(out.to(smem.dtype))
    slot = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    at = column + gl.arange(0, ROPE, layout=gl.SliceLayout(0, layout))
    pointer = row_ptr + (slot * (2 * HALF + ROPE))[:, None] + at[None, :]
    gl.store(pointer, smem.load(layout), mask=(slot < slots)[:, None])


def padded(K: int) -> int:
    return max(512, 1 << (K - 1).bit_length())


def fits(q_NHC: Tensor, kv_MC: Tensor, value_dim: int) -> bool:
    """Whether the kernels for Hopper can run: such a GPU, and aligned 16-bit rows of 512 + 64."""
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(q_NHC.device)[0] == 9
        and q_NHC.element_size() == 2
        and (q_NHC.shape[-1], value_dim) == (576, 512)
        and kv_MC.stride(0) % 16 == kv_MC.data_ptr() % 16 == 0
    )
