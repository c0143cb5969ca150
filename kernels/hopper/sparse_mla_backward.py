"""Backward of sparse_mla on Hopper, in Gluon, in two kernels. Spec: reference.sparse_mla.

The first makes probabilities, gradients of scores and dq for one query and 64 heads, with tiles of 32 keys: one
consumer warp group computes scores, the other dO V^T, and dq of a tile overlaps both for the next. The second sums
over heads what each slot of a query gives to its row; trimtab.kernels.by_key sums that by key.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trimtab.kernels.hopper.tiles import (
    HALF,
    HEADS,
    KEYS,
    LOG2E,
    PRODUCER_THREADS,
    ROPE,
    STAGES,
    barrier,
    gather_rows,
    padded,
    store_half,
    store_piece,
    used_tiles,
)

FEW = gl.constexpr(32)  # keys of a tile


@gluon.jit
def _produce_twice(
    q_ptr, grad_ptr, kv_ptr, kv_stride, ids_ptr, heads, tiles, K,
    q_l, q_r, q_t, g_l, g_r, k_l, k_r, k_t, still, full_l, full_r, full_t, empty_l, empty_r, empty_t,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    head = gl.arange(0, HEADS, layout=rows)
    real = (head < heads)[:, None]
    q_row = q_ptr + head * (2 * HALF + ROPE)
    g_row = grad_ptr + head * (2 * HALF)
    gather_rows(q_l, q_row, 0, real, layout, HALF)
    gather_rows(q_r, q_row, HALF, real, layout, HALF)
    gather_rows(q_t, q_row, 2 * HALF, real, layout, ROPE)
    gather_rows(g_l, g_row, 0, real, layout, HALF)
    gather_rows(g_r, g_row, HALF, real, layout, HALF)
    async_copy.mbarrier_arrive(still, increment_count=False)
    slot = gl.arange(0, FEW, layout=rows)
    ids = gl.load(ids_ptr + slot, mask=slot < K, other=0)
    for i in range(tiles):
        stage = i % STAGES
        free = ((i // STAGES) & 1) ^ 1
        row_ptr = kv_ptr + gl.maximum(ids, 0).to(gl.int64) * kv_stride
        slot += FEW
        ids = gl.load(ids_ptr + slot, mask=slot < K, other=0)
        mbarrier.wait(empty_l.index(stage), free)
        gather_rows(k_l.index(stage), row_ptr, 0, None, layout, HALF)
        async_copy.mbarrier_arrive(full_l.index(stage), increment_count=False)
        mbarrier.wait(empty_r.index(stage), free)
        gather_rows(k_r.index(stage), row_ptr, HALF, None, layout, HALF)
        async_copy.mbarrier_arrive(full_r.index(stage), increment_count=False)
        mbarrier.wait(empty_t.index(stage), free)
        gather_rows(k_t.index(stage), row_ptr, 2 * HALF, None, layout, ROPE)
        async_copy.mbarrier_arrive(full_t.index(stage), increment_count=False)


@gluon.jit
def _store_tile(smem, out_ptr, stride, heads, first):
    """[HEADS, FEW] of shared memory into the rows of the heads."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, layout))
    slot = first + gl.arange(0, FEW, layout=gl.SliceLayout(0, layout))
    gl.store(out_ptr + head[:, None] * stride + slot[None, :], smem.load(layout), mask=(head < heads)[:, None])


@gluon.jit
def _write_prob(i, ids_ptr, K, lse, scale, q_l, q_r, q_t, k_l, k_r, k_t, p_mem, full_l, full_r, full_t, p_ready):
    """The probabilities of tile i."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16])
    stage = i % STAGES
    phase = (i // STAGES) & 1
    slot = i * FEW + gl.arange(0, FEW, layout=gl.SliceLayout(0, layout))
    ids = gl.load(ids_ptr + slot, mask=slot < K, other=-1)
    score = gl.zeros([HEADS, FEW], gl.float32, layout=layout)
    mbarrier.wait(full_l.index(stage), phase)
    fence_async_shared()
    score = warpgroup_mma(q_l, k_l.index(stage).permute((1, 0)), score, use_acc=False)
    mbarrier.wait(full_r.index(stage), phase)
    mbarrier.wait(full_t.index(stage), phase)
    fence_async_shared()
    score = warpgroup_mma(q_r, k_r.index(stage).permute((1, 0)), score, is_async=True)
    score = warpgroup_mma(q_t, k_t.index(stage).permute((1, 0)), score, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    prob = gl.where((ids >= 0)[None, :], gl.exp2(score * scale - lse[:, None]), 0.0)
    p_mem.index(stage).store(prob.to(p_mem.dtype))
    mbarrier.arrive(p_ready.index(stage))


@gluon.jit
def _gradient_left(
    ids_ptr, lse_ptr, dq_ptr, prob_ptr, stride, heads, tiles, K, scale, q_l, q_r, q_t, k_l, k_r, k_t, p_mem, ds_mem,
    still, full_l, full_r, full_t, empty_l, empty_t, p_ready, ds_ready,
):  # fmt: skip
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    rope_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, score_layout))
    lse = gl.load(lse_ptr + head, mask=head < heads, other=float("inf"))
    lse = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    dq_l = gl.zeros([HEADS, HALF], gl.float32, layout=out_layout)
    dq_t = gl.zeros([HEADS, ROPE], gl.float32, layout=rope_layout)
    mbarrier.wait(still, 0)
    for i in range(tiles + 1):
        if i < tiles:
            _write_prob(i, ids_ptr, K, lse, scale, q_l, q_r, q_t, k_l, k_r, k_t, p_mem, full_l, full_r, full_t, p_ready)
            _store_tile(p_mem.index(i % STAGES), prob_ptr, stride, heads, i * FEW)
        if i > 0:
            stage = (i - 1) % STAGES
            mbarrier.wait(ds_ready.index(stage), ((i - 1) // STAGES) & 1)
            dq_l = warpgroup_mma(ds_mem.index(stage), k_l.index(stage), dq_l)
            mbarrier.arrive(empty_l.index(stage))
            dq_t = warpgroup_mma(ds_mem.index(stage), k_t.index(stage), dq_t)
            mbarrier.arrive(empty_t.index(stage))
    store_half(q_l, dq_l.to(q_l.dtype), dq_ptr, 2 * HALF + ROPE, heads, HALF)
    store_half(q_t, dq_t.to(q_t.dtype), dq_ptr + 2 * HALF, 2 * HALF + ROPE, heads, ROPE)


@gluon.jit
def _dprob(i, g_l, g_r, k_l, k_r, full_l, full_r):
    """dO V^T of tile i."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16])
    stage = i % STAGES
    phase = (i // STAGES) & 1
    dprob = gl.zeros([HEADS, FEW], gl.float32, layout=layout)
    mbarrier.wait(full_l.index(stage), phase)
    fence_async_shared()
    dprob = warpgroup_mma(g_l, k_l.index(stage).permute((1, 0)), dprob, use_acc=False)
    mbarrier.wait(full_r.index(stage), phase)
    fence_async_shared()
    return warpgroup_mma(g_r, k_r.index(stage).permute((1, 0)), dprob)


@gluon.jit
def _write_dscore(i, dprob, delta, scale, p_mem, ds_mem, p_ready, ds_ready):
    stage = i % STAGES
    mbarrier.wait(p_ready.index(stage), (i // STAGES) & 1)
    prob = p_mem.index(stage).load(dprob.type.layout).to(gl.float32)
    ds_mem.index(stage).store((prob * (dprob - delta[:, None]) * scale).to(ds_mem.dtype))
    fence_async_shared()
    mbarrier.arrive(ds_ready.index(stage))


@gluon.jit
def _gradient_right(
    delta_ptr, dq_ptr, dscore_ptr, stride, heads, tiles, scale, g_l, g_r, k_l, k_r, p_mem, ds_mem,
    still, full_l, full_r, empty_r, p_ready, ds_ready,
):  # fmt: skip
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, score_layout))
    delta = gl.load(delta_ptr + head, mask=head < heads, other=0.0)
    dq_r = gl.zeros([HEADS, HALF], gl.float32, layout=out_layout)
    mbarrier.wait(still, 0)
    dprob = _dprob(0, g_l, g_r, k_l, k_r, full_l, full_r)
    for i in range(tiles):
        _write_dscore(i, dprob, delta, scale, p_mem, ds_mem, p_ready, ds_ready)
        stage = i % STAGES
        _store_tile(ds_mem.index(stage), dscore_ptr, stride, heads, i * FEW)
        if i + 1 < tiles:
            dprob = _dprob(i + 1, g_l, g_r, k_l, k_r, full_l, full_r)
        dq_r = warpgroup_mma(ds_mem.index(stage), k_r.index(stage), dq_r)
        mbarrier.arrive(empty_r.index(stage))
    store_half(g_r, dq_r.to(g_r.dtype), dq_ptr + HALF, 2 * HALF + ROPE, heads, HALF)


@gluon.jit
def _gradient_kernel(
    q_ptr, kv_ptr, kv_stride, ids_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, prob_ptr, dscore_ptr, stride, H, K, scale,
    K_PADDED: gl.constexpr,
):  # fmt: skip
    blocks = gl.cdiv(H, HEADS)
    n = (gl.program_id(0) // blocks).to(gl.int64)
    first_head = (gl.program_id(0) % blocks) * HEADS
    heads = H - first_head
    row = n * H + first_head
    width: gl.constexpr = 2 * HALF + ROPE
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    ids_ptr += n * K
    K = gl.to_tensor(K)
    tiles = gl.maximum(used_tiles(ids_ptr, K, K_PADDED) * (KEYS // FEW), 1)  # a query without keys gets zeros

    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, HALF], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, ROPE], dtype)
    thin: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, FEW], dtype)
    q_l = gl.allocate_shared_memory(dtype, [HEADS, HALF], wide)
    q_r = gl.allocate_shared_memory(dtype, [HEADS, HALF], wide)
    q_t = gl.allocate_shared_memory(dtype, [HEADS, ROPE], narrow)
    g_l = gl.allocate_shared_memory(dtype, [HEADS, HALF], wide)
    g_r = gl.allocate_shared_memory(dtype, [HEADS, HALF], wide)
    k_l = gl.allocate_shared_memory(dtype, [STAGES, FEW, HALF], wide)
    k_r = gl.allocate_shared_memory(dtype, [STAGES, FEW, HALF], wide)
    k_t = gl.allocate_shared_memory(dtype, [STAGES, FEW, ROPE], narrow)
    p_mem = gl.allocate_shared_memory(dtype, [STAGES, HEADS, FEW], thin)
    ds_mem = gl.allocate_shared_memory(dtype, [STAGES, HEADS, FEW], thin)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    still = gl.allocate_shared_memory(gl.int64, [1], bars)
    full_l = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    full_r = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    full_t = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty_l = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty_r = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty_t = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    p_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    ds_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    mbarrier.init(still, count=PRODUCER_THREADS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_l.index(i), count=PRODUCER_THREADS)
        mbarrier.init(full_r.index(i), count=PRODUCER_THREADS)
        mbarrier.init(full_t.index(i), count=PRODUCER_THREADS)
        mbarrier.init(empty_l.index(i), count=1)
        mbarrier.init(empty_r.index(i), count=1)
        mbarrier.init(empty_t.index(i), count=1)
        mbarrier.init(p_ready.index(i), count=1)
        mbarrier.init(ds_ready.index(i), count=1)
    fence_async_shared()
    barrier()
    dq_ptr += row * width
    left = (
        ids_ptr, lse_ptr + row, dq_ptr, prob_ptr + row * stride, stride, heads, tiles, K, scale * LOG2E,
        q_l, q_r, q_t, k_l, k_r, k_t, p_mem, ds_mem,
        still, full_l, full_r, full_t, empty_l, empty_t, p_ready, ds_ready,
    )  # fmt: skip
    right = (
        delta_ptr + row, dq_ptr, dscore_ptr + row * stride, stride, heads, tiles, scale,
        g_l, g_r, k_l, k_r, p_mem, ds_mem, still, full_l, full_r, empty_r, p_ready, ds_ready,
    )  # fmt: skip
    sources = (
        q_ptr + row * width, grad_ptr + row * (2 * HALF), kv_ptr, kv_stride, ids_ptr, heads, tiles, K,
        q_l, q_r, q_t, g_l, g_r, k_l, k_r, k_t, still, full_l, full_r, full_t, empty_l, empty_r, empty_t,
    )  # fmt: skip
    gl.warp_specialize([(_gradient_left, left), (_gradient_right, right), (_produce_twice, sources)], [4, 4], [192, 72])


@gluon.jit
def _produce_rows(
    q_ptr, grad_ptr, prob_ptr, dscore_ptr, stride, first_column, H, tiles,
    q_l, q_r, q_t, g_l, g_r, p_mem, ds_mem, still, full, empty,
):  # fmt: skip
    BLOCK_H: gl.constexpr = q_l.shape[0]
    WIDTH: gl.constexpr = q_l.shape[1]
    DEPTH: gl.constexpr = full.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, layout))
    real = (head < H)[:, None]
    q_row = q_ptr + head * (2 * HALF + ROPE)
    g_row = grad_ptr + head * (2 * HALF)
    gather_rows(q_l, q_row, first_column, real, layout, WIDTH)
    gather_rows(q_r, q_row, first_column + WIDTH, real, layout, WIDTH)
    gather_rows(q_t, q_row, 2 * HALF, real, layout, ROPE)
    gather_rows(g_l, g_row, first_column, real, layout, WIDTH)
    gather_rows(g_r, g_row, first_column + WIDTH, real, layout, WIDTH)
    async_copy.mbarrier_arrive(still, increment_count=False)
    for i in range(tiles):
        stage = i % DEPTH
        mbarrier.wait(empty.index(stage), ((i // DEPTH) & 1) ^ 1)
        gather_rows(ds_mem.index(stage), dscore_ptr + head * stride, i * KEYS, real, layout, KEYS)
        gather_rows(p_mem.index(stage), prob_ptr + head * stride, i * KEYS, real, layout, KEYS)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _halves(x):
    """[A, 2 * B] -> two [A, B], within registers."""
    HALF_WIDTH: gl.constexpr = x.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, HALF_WIDTH]), (0, 2, 1)))


@gluon.jit
def _sum_heads(
    row_ptr, column, with_rope, tiles, K, q_mem, q_t, g_mem, p_mem, ds_mem, out_mem, still, full, empty,
):  # fmt: skip
    WIDTH: gl.constexpr = q_mem.shape[1]
    DEPTH: gl.constexpr = full.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    rope_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROPE, 16])
    mbarrier.wait(still, 0)
    for i in range(tiles):
        stage = i % DEPTH
        mbarrier.wait(full.index(stage), (i // DEPTH) & 1)
        fence_async_shared()
        dscore = ds_mem.index(stage).permute((1, 0))
        out = gl.zeros([KEYS, WIDTH], gl.float32, layout=layout)
        out = warpgroup_mma(dscore, q_mem, out, use_acc=False, is_async=True)
        out = warpgroup_mma(p_mem.index(stage).permute((1, 0)), g_mem, out, is_async=True)
        out = warpgroup_mma_wait(0, deps=[out])
        if with_rope:
            rope = gl.zeros([KEYS, ROPE], gl.float32, layout=rope_layout)
            rope = warpgroup_mma(dscore, q_t, rope, use_acc=False)
            store_piece(rope, out_mem, row_ptr, 2 * HALF, K - i * KEYS)
        mbarrier.arrive(empty.index(stage))
        low, high = _halves(out)
        if WIDTH == 2 * ROPE:
            store_piece(low, out_mem, row_ptr, column, K - i * KEYS)
            store_piece(high, out_mem, row_ptr, column + ROPE, K - i * KEYS)
        else:
            low_low, low_high = _halves(low)
            high_low, high_high = _halves(high)
            store_piece(low_low, out_mem, row_ptr, column, K - i * KEYS)
            store_piece(low_high, out_mem, row_ptr, column + ROPE, K - i * KEYS)
            store_piece(high_low, out_mem, row_ptr, column + 2 * ROPE, K - i * KEYS)
            store_piece(high_high, out_mem, row_ptr, column + 3 * ROPE, K - i * KEYS)
        row_ptr += KEYS * (2 * HALF + ROPE)


@gluon.jit
def _row_kernel(
    q_ptr, ids_ptr, grad_ptr, prob_ptr, dscore_ptr, stride, row_ptr, H, K,
    K_PADDED: gl.constexpr, BLOCK_H: gl.constexpr, WIDTH: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    parts: gl.constexpr = HALF // WIDTH
    n = (gl.program_id(0) // parts).to(gl.int64)
    part = gl.program_id(0) % parts
    column = part * 2 * WIDTH
    K = gl.to_tensor(K)
    tiles = used_tiles(ids_ptr + n * K, K, K_PADDED)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, WIDTH], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, ROPE], dtype)
    q_l = gl.allocate_shared_memory(dtype, [BLOCK_H, WIDTH], wide)
    q_r = gl.allocate_shared_memory(dtype, [BLOCK_H, WIDTH], wide)
    q_t = gl.allocate_shared_memory(dtype, [BLOCK_H, ROPE], narrow)
    g_l = gl.allocate_shared_memory(dtype, [BLOCK_H, WIDTH], wide)
    g_r = gl.allocate_shared_memory(dtype, [BLOCK_H, WIDTH], wide)
    p_mem = gl.allocate_shared_memory(dtype, [DEPTH, BLOCK_H, KEYS], narrow)
    ds_mem = gl.allocate_shared_memory(dtype, [DEPTH, BLOCK_H, KEYS], narrow)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROPE], dtype)
    out_l = gl.allocate_shared_memory(dtype, [KEYS, ROPE], square)
    out_r = gl.allocate_shared_memory(dtype, [KEYS, ROPE], square)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    still = gl.allocate_shared_memory(gl.int64, [1], bars)
    full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], bars)
    mbarrier.init(still, count=PRODUCER_THREADS)
    for i in gl.static_range(DEPTH):
        mbarrier.init(full.index(i), count=PRODUCER_THREADS)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    barrier()
    row_ptr += n * K * (2 * HALF + ROPE)
    left = (
        row_ptr, column, part == 0, tiles, K, q_l, q_t, g_l, p_mem, ds_mem, out_l, still, full, empty,
    )  # fmt: skip
    right = (
        row_ptr, column + WIDTH, part < 0, tiles, K, q_r, q_t, g_r, p_mem, ds_mem, out_r, still, full, empty,
    )  # fmt: skip
    load = (
        q_ptr + n * H * (2 * HALF + ROPE), grad_ptr + n * H * (2 * HALF),
        prob_ptr + n * H * stride, dscore_ptr + n * H * stride, stride, column, H, tiles,
        q_l, q_r, q_t, g_l, g_r, p_mem, ds_mem, still, full, empty,
    )  # fmt: skip
    gl.warp_specialize([(_sum_heads, left), (_sum_heads, right), (_produce_rows, load)], [4, 4], [192, 72])


def gradients(
    q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, grad_NHV: Tensor, lse_NH: Tensor, delta_NH: Tensor, scale: float,
    dq_NHC: Tensor, row_EC: Tensor,
) -> None:  # fmt: skip
    """Write dq [N, H, C], and for every slot of ids the gradient of its row [N * K, C], summed over heads.

    Args:
        delta_NH: sum of O times its gradient.

    Rows of slots behind the tile of a query's last id are not written: they belong to no key.
    """
    (N, H, _), K = q_NHC.shape, ids_NK.shape[1]
    stride = -(-K // 64) * 64
    prob, dscore = q_NHC.new_empty(N, H, stride), q_NHC.new_empty(N, H, stride)
    _gradient_kernel[(N * -(-H // 64),)](
        q_NHC, kv_MC, kv_MC.stride(0), ids_NK, grad_NHV, lse_NH, delta_NH, dq_NHC, prob, dscore, stride, H, K, scale,
        padded(K), num_warps=4,
    )  # fmt: skip
    wide = H > 64
    _row_kernel[(N * (2 if wide else 1),)](
        q_NHC, ids_NK, grad_NHV, prob, dscore, stride, row_EC, H, K,
        padded(K), 128 if wide else 64, 128 if wide else 256, 2 if wide else 4, num_warps=4,
    )  # fmt: skip
