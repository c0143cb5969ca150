"""dense_prob on Hopper, in Gluon: one producer and two consumer warp groups. Spec: indexer_kl.dense_prob.

A program serves 128 queries and 256 keys. The producer brings the queries and keys of a head by TMA, in columns of
64. Each consumer owns half of the queries: it multiplies while the other takes exponentials, and keeps the sums over
heads in registers. Half of the keys at a time, because the scores of all would not fit beside the sums.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

QUERIES = gl.constexpr(64)  # of one consumer
KEYS = gl.constexpr(128)  # of one half
COLUMNS = gl.constexpr(64)
SCORE_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


@gluon.jit
def _produce(q_desc, k_desc, n0, m0, heads, q_mem, k_mem, q_full, q_empty, k_full, k_empty):
    PARTS: gl.constexpr = q_mem.shape[0] // 4
    for h in range(heads):
        stage = h % 2
        mbarrier.wait(q_empty.index(stage), ((h // 2) & 1) ^ 1)
        mbarrier.expect(q_full.index(stage), 2 * PARTS * q_desc.block_type.nbytes)
        for i in gl.static_range(2 * PARTS):
            place = [n0 + i // PARTS * QUERIES, (h * PARTS + i % PARTS) * COLUMNS]
            tma.async_copy_global_to_shared(q_desc, place, q_full.index(stage), q_mem.index(stage * 2 * PARTS + i))
        for half in gl.static_range(2):
            mbarrier.wait(k_empty.index(half), (h & 1) ^ 1)
            mbarrier.expect(k_full.index(half), PARTS * k_desc.block_type.nbytes)
            for i in gl.static_range(PARTS):
                place = [m0 + half * KEYS, (h * PARTS + i) * COLUMNS]
                tma.async_copy_global_to_shared(k_desc, place, k_full.index(half), k_mem.index(half * PARTS + i))


@gluon.jit
def _add_head(
    prob, h, lse, scale_log2, q_mem, k_mem, first_q, k_full, k_empty, HALF: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    score = gl.zeros([QUERIES, KEYS], gl.float32, layout=SCORE_LAYOUT)
    mbarrier.wait(k_full.index(HALF), h & 1)
    for i in gl.static_range(PARTS):
        k = k_mem.index(HALF * PARTS + i).permute((1, 0))
        score = warpgroup_mma(q_mem.index(first_q + i), k, score, use_acc=i > 0, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    mbarrier.arrive(k_empty.index(HALF))
    return prob + gl.exp2(score * scale_log2 - lse[:, None])


@gluon.jit
def _write(prob, n, m0, start, end, prob_ptr, N, M):
    m = m0 + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORE_LAYOUT))
    seen = (m[None, :] >= start[:, None]) & (m[None, :] < end[:, None])
    place = prob_ptr + n.to(gl.int64)[:, None] * M + m[None, :]
    gl.store(place, gl.where(seen, prob, 0.0), mask=(n < N)[:, None] & (m < M)[None, :])


@gluon.jit
def _consume(
    lse_ptr, start_ptr, end_ptr, prob_ptr, m0, N, M, heads, scale_log2, which, n0, q_mem, k_mem, q_full, q_empty,
    k_full, k_empty,
):  # fmt: skip
    PARTS: gl.constexpr = q_mem.shape[0] // 4
    n = n0 + gl.arange(0, QUERIES, layout=gl.SliceLayout(1, SCORE_LAYOUT))
    left = gl.zeros([QUERIES, KEYS], gl.float32, layout=SCORE_LAYOUT)
    right = gl.zeros([QUERIES, KEYS], gl.float32, layout=SCORE_LAYOUT)
    lse = gl.load(lse_ptr + n, mask=(n < N) & (heads > 0), other=0.0)
    for h in range(heads):
        stage = h % 2
        lse_ptr += N
        next_lse = gl.load(lse_ptr + n, mask=(n < N) & (h + 1 < heads), other=0.0)
        first_q = (stage * 2 + which) * PARTS
        mbarrier.wait(q_full.index(stage), (h // 2) & 1)
        left = _add_head(left, h, lse, scale_log2, q_mem, k_mem, first_q, k_full, k_empty, 0, PARTS)
        right = _add_head(right, h, lse, scale_log2, q_mem, k_mem, first_q, k_full, k_empty, 1, PARTS)
        mbarrier.arrive(q_empty.index(stage))
        lse = next_lse
    start = gl.load(start_ptr + n, mask=n < N, other=0)
    end = gl.load(end_ptr + n, mask=n < N, other=0)
    _write(left, n, m0, start, end, prob_ptr, N, M)
    _write(right, n, m0 + KEYS, start, end, prob_ptr, N, M)


@gluon.jit
def _dense_prob_kernel(
    q_desc, k_desc, lse_ptr, start_ptr, end_ptr, prob_ptr, N, M, H, scale_log2, PARTS: gl.constexpr,
):  # fmt: skip
    n0 = gl.program_id(0) * (2 * QUERIES)
    m0 = gl.program_id(1) * (2 * KEYS)
    n = n0 + gl.arange(0, 2 * QUERIES, layout=gl.BlockedLayout([1], [32], [4], [0]))
    start = gl.load(start_ptr + n, mask=n < N, other=0)
    end = gl.load(end_ptr + n, mask=n < N, other=0)
    seen = (start < end) & (start < m0 + 2 * KEYS) & (end > m0)
    heads = gl.where(gl.max(seen.to(gl.int32), 0) > 0, H, 0)

    q_mem = gl.allocate_shared_memory(q_desc.dtype, [4 * PARTS, QUERIES, COLUMNS], q_desc.layout)
    k_mem = gl.allocate_shared_memory(k_desc.dtype, [2 * PARTS, KEYS, COLUMNS], k_desc.layout)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    memory = (q_mem, k_mem, q_full, q_empty, k_full, k_empty)
    work = (lse_ptr, start_ptr, end_ptr, prob_ptr, m0, N, M, heads, scale_log2)
    first = gl.to_tensor(0)
    gl.warp_specialize(
        [
            (_consume, work + (first, n0) + memory),
            (_consume, work + (first + 1, n0 + QUERIES) + memory),
            (_produce, (q_desc, k_desc, n0, m0, heads) + memory),
        ],
        [4, 1],
        [232, 24],
    )


def supported(q_NHD: Tensor) -> bool:
    """Whether dense_prob can run: a Hopper GPU, 16-bit values, a head width that fills columns of 64, at most 3."""
    return (
        q_NHD.is_cuda
        and torch.cuda.get_device_capability(q_NHD.device)[0] == 9
        and q_NHD.dtype in (torch.bfloat16, torch.float16)
        and q_NHD.shape[-1] in (64, 128, 192)
    )


def dense_prob(
    q_NHD: Tensor, k_MHD: Tensor, lse_NH: Tensor, start_N: Tensor, end_N: Tensor, scale_log2: float, prob_NM: Tensor
) -> None:
    """Writes prob of indexer_kl.dense_prob."""
    (N, H, D), M = q_NHD.shape, len(k_MHD)
    dtype = gl.bfloat16 if q_NHD.dtype == torch.bfloat16 else gl.float16
    q_layout = gl.NVMMASharedLayout.get_default_for([QUERIES.value, COLUMNS.value], dtype)
    k_layout = gl.NVMMASharedLayout.get_default_for([KEYS.value, COLUMNS.value], dtype)
    q_desc = TensorDescriptor.from_tensor(q_NHD.view(N, H * D), [QUERIES.value, COLUMNS.value], q_layout)
    k_desc = TensorDescriptor.from_tensor(k_MHD.view(M, H * D), [KEYS.value, COLUMNS.value], k_layout)
    lse_HN = (lse_NH * 1.4426950408889634).masked_fill(lse_NH == float("-inf"), float("inf")).t().contiguous()
    grid = (-(-N // (2 * QUERIES.value)), -(-M // (2 * KEYS.value)))
    _dense_prob_kernel[grid](
        q_desc, k_desc, lse_HN, start_N, end_N, prob_NM, N, M, H, scale_log2, D // COLUMNS.value, num_warps=4
    )
