"""dense_prob and sparse_prob on Hopper, in Gluon: one producer and two consumer warp groups. Spec: indexer_kl.

One consumer multiplies while the other takes exponentials. Tiles lie in shared memory in parts of 64 columns.

dense_prob: a program serves 128 queries and 256 keys. The producer brings the queries and keys of a head by TMA. Each
consumer owns half of the queries and keeps their sums over heads in registers. It takes half of the keys at a time,
because the scores of all would not fit beside the sums.

sparse_prob: a program serves one query and all its heads. The producer gathers rows with cp.async, the consumers take
turns with tiles of 64 keys. A third of a tile's columns is refilled as soon as it is multiplied.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the older name
gather_tile = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
QUERIES = gl.constexpr(64)  # of one consumer
KEYS = gl.constexpr(128)  # of one half
GATHERED = gl.constexpr(64)  # keys of a tile of sparse_prob
ROW_PARTS = gl.constexpr(9)  # of a cached row: 576 / 64
GROUP = gl.constexpr(3)  # parts that share a barrier
GROUPS = gl.constexpr(3)
COLUMNS = gl.constexpr(64)
LOG2_E = gl.constexpr(1.4426950408889634)
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
            load_tile(q_desc, place, q_full.index(stage), q_mem.index(stage * 2 * PARTS + i))
        for half in gl.static_range(2):
            mbarrier.wait(k_empty.index(half), (h & 1) ^ 1)
            mbarrier.expect(k_full.index(half), PARTS * k_desc.block_type.nbytes)
            for i in gl.static_range(PARTS):
                place = [m0 + half * KEYS, (h * PARTS + i) * COLUMNS]
                load_tile(k_desc, place, k_full.index(half), k_mem.index(half * PARTS + i))


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
    first = gl.to_tensor(0)
    left = (
        lse_ptr, start_ptr, end_ptr, prob_ptr, m0, N, M, heads, scale_log2, first, n0,
        q_mem, k_mem, q_full, q_empty, k_full, k_empty,
    )  # fmt: skip
    right = (
        lse_ptr, start_ptr, end_ptr, prob_ptr, m0, N, M, heads, scale_log2, first + 1, n0 + QUERIES,
        q_mem, k_mem, q_full, q_empty, k_full, k_empty,
    )  # fmt: skip
    load = (q_desc, k_desc, n0, m0, heads, q_mem, k_mem, q_full, q_empty, k_full, k_empty)
    gl.warp_specialize([(_consume, left), (_consume, right), (_produce, load)], [4, 1], [232, 24])


@gluon.jit
def _gather(q_desc, row, kv_ptr, kv_stride, ids_ptr, K, tiles, q_mem, kv_mem, q_full, full, empty):
    mbarrier.expect(q_full, ROW_PARTS * q_desc.block_type.nbytes)
    for i in gl.static_range(ROW_PARTS):
        load_tile(q_desc, [row, i * COLUMNS], q_full, q_mem.index(i))
    STAGES: gl.constexpr = kv_mem.shape[0] // ROW_PARTS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    slot = gl.arange(0, GATHERED, layout=gl.SliceLayout(1, layout))
    ids = gl.load(ids_ptr + slot, mask=slot < K, other=0)
    for t in range(tiles):
        place = (kv_ptr + gl.maximum(ids, 0).to(gl.int64) * kv_stride)[:, None] + column[None, :]
        slot += GATHERED
        ids = gl.load(ids_ptr + slot, mask=slot < K, other=0)
        stage = t % STAGES
        for group in gl.static_range(GROUPS):
            mbarrier.wait(empty.index(stage * GROUPS + group), ((t // STAGES) & 1) ^ 1)
            for i in gl.static_range(group * GROUP, group * GROUP + GROUP):
                gather_tile(kv_mem.index(stage * ROW_PARTS + i), place + i * COLUMNS)
            async_copy.mbarrier_arrive(full.index(t % 2 * GROUPS + group), increment_count=False)


@gluon.jit
def _sum_heads(
    which, lse_ptr, ids_ptr, prob_ptr, H, K, tiles, scale_log2, q_mem, kv_mem, q_full, full, empty,
):  # fmt: skip
    STAGES: gl.constexpr = kv_mem.shape[0] // ROW_PARTS
    HEADS: gl.constexpr = q_mem.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(0, layout))
    lse = gl.load(lse_ptr + head, mask=head < H, other=float("-inf"))
    real = lse > float("-inf")
    lse = gl.where(real, lse * LOG2_E, 0.0)
    mbarrier.wait(q_full, 0)
    for t in range(which, tiles, 2):
        slot = t * GATHERED + gl.arange(0, GATHERED, layout=gl.SliceLayout(1, layout))
        ids = gl.load(ids_ptr + slot, mask=slot < K, other=-1)
        score = gl.zeros([GATHERED, HEADS], gl.float32, layout=layout)
        stage = t % STAGES
        for group in gl.static_range(GROUPS):
            mbarrier.wait(full.index(which * GROUPS + group), (t // 2) & 1)
            fence_async_shared()
            for i in gl.static_range(group * GROUP, group * GROUP + GROUP):
                q = q_mem.index(i).permute((1, 0))
                score = warpgroup_mma(kv_mem.index(stage * ROW_PARTS + i), q, score, use_acc=i > 0, is_async=True)
            if group > 0:
                score = warpgroup_mma_wait(GROUP, deps=[score])
                mbarrier.arrive(empty.index(stage * GROUPS + group - 1))
        score = warpgroup_mma_wait(0, deps=[score])
        mbarrier.arrive(empty.index(stage * GROUPS + GROUPS - 1))
        prob = gl.sum(gl.where(real[None, :], gl.exp2(score * scale_log2 - lse[None, :]), 0.0), 1)
        gl.store(prob_ptr + slot, gl.where(ids >= 0, prob, 0.0), mask=slot < K)


@gluon.jit
def _sparse_prob_kernel(
    q_desc, kv_ptr, kv_stride, ids_ptr, lse_ptr, prob_ptr, H, K, scale_log2,
    K_BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    n = gl.program_id(0)
    ids_ptr += n.to(gl.int64) * K
    prob_ptr += n.to(gl.int64) * K
    lse_ptr += n.to(gl.int64) * H
    slot = gl.arange(0, K_BLOCK, layout=gl.BlockedLayout([4], [32], [4], [0]))
    used = gl.load(ids_ptr + slot, mask=slot < K, other=-1) >= 0
    tiles = gl.cdiv(gl.max(gl.where(used, slot + 1, 0), 0), GATHERED)  # up to the last used id

    HEADS: gl.constexpr = q_desc.block_type.shape[0]
    dtype: gl.constexpr = q_desc.dtype
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GATHERED, COLUMNS], dtype)
    q_mem = gl.allocate_shared_memory(dtype, [ROW_PARTS, HEADS, COLUMNS], q_desc.layout)
    kv_mem = gl.allocate_shared_memory(dtype, [STAGES * ROW_PARTS, GATHERED, COLUMNS], kv_layout)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], bars)
    full = gl.allocate_shared_memory(gl.int64, [2 * GROUPS, 1], bars)  # one set a consumer: it sees each phase
    empty = gl.allocate_shared_memory(gl.int64, [STAGES * GROUPS, 1], bars)
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(2 * GROUPS):
        mbarrier.init(full.index(i), count=128)  # the producer's threads
    for i in gl.static_range(STAGES * GROUPS):
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    first = gl.to_tensor(0)
    even = (first, lse_ptr, ids_ptr, prob_ptr, H, K, tiles, scale_log2, q_mem, kv_mem, q_full, full, empty)
    odd = (first + 1, lse_ptr, ids_ptr, prob_ptr, H, K, tiles, scale_log2, q_mem, kv_mem, q_full, full, empty)
    load = (q_desc, n * H, kv_ptr, kv_stride, ids_ptr, K, tiles, q_mem, kv_mem, q_full, full, empty)
    gl.warp_specialize([(_sum_heads, even), (_sum_heads, odd), (_gather, load)], [4, 4], [160, 96])


def supported(q: Tensor, widths: tuple[int, ...]) -> bool:
    """Whether a kernel can run: a Hopper GPU, 16-bit values, and one of its widths."""
    return (
        q.is_cuda
        and torch.version.hip is None  # AMD's gfx9 says 9 too
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] in widths
    )


def _descriptor(rows: Tensor, block: int) -> TensorDescriptor:
    """For tiles of a matrix: block rows and COLUMNS columns."""
    dtype = gl.bfloat16 if rows.dtype == torch.bfloat16 else gl.float16
    shape = [block, COLUMNS.value]
    return TensorDescriptor.from_tensor(rows, shape, gl.NVMMASharedLayout.get_default_for(shape, dtype))


def sparse_prob(
    q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, lse_NH: Tensor, scale_log2: float, prob_NK: Tensor
) -> None:
    """Writes prob of indexer_kl.sparse_prob into zeros; C = 576, at most 128 heads."""
    (N, H, C), K = q_NHC.shape, ids_NK.shape[1]
    heads = max(16, 1 << (H - 1).bit_length())
    _sparse_prob_kernel[(N,)](
        _descriptor(q_NHC.view(N * H, C), heads), kv_MC, kv_MC.stride(0), ids_NK, lse_NH, prob_NK, H, K, scale_log2,
        max(512, 1 << (K - 1).bit_length()), 1 if heads > 64 else 2, num_warps=4,
    )  # fmt: skip


def dense_prob(
    q_NHD: Tensor, k_MHD: Tensor, lse_NH: Tensor, start_N: Tensor, end_N: Tensor, scale_log2: float, prob_NM: Tensor
) -> None:
    """Writes prob of indexer_kl.dense_prob; D = 64, 128 or 192."""
    (N, H, D), M = q_NHD.shape, len(k_MHD)
    q_desc, k_desc = _descriptor(q_NHD.view(N, H * D), QUERIES.value), _descriptor(k_MHD.view(M, H * D), KEYS.value)
    lse_HN = (lse_NH * LOG2_E.value).masked_fill(lse_NH == float("-inf"), float("inf")).t().contiguous()
    grid = (-(-N // (2 * QUERIES.value)), -(-M // (2 * KEYS.value)))
    _dense_prob_kernel[grid](
        q_desc, k_desc, lse_HN, start_N, end_N, prob_NM, N, M, H, scale_log2, D // COLUMNS.value, num_warps=4
    )
