"""Forward of sparse_mla on Hopper, in Gluon: one producer and two consumer warp groups. Spec: reference.sparse_mla.

A program serves one query and 64 heads. The producer gathers rows into two buffers of 64 keys with cp.async. The
first consumer computes scores and probabilities and the left half of the values, the second the right half; so the
tensor cores multiply for one while the other waits. Probabilities travel through the rope part of the key buffer,
which nobody needs any more by then.
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

from trimtab.kernels.hopper.sparse_mla_backward import gradients
from trimtab.kernels.hopper.tiles import (
    HALF,
    HEADS,
    KEYS,
    LOG2E,
    PRODUCER_THREADS,
    ROPE,
    STAGES,
    barrier,
    fits,
    gather_rows,
    padded,
    store_half,
    used_tiles,
)

__all__ = ["forward", "gradients", "supported"]


@gluon.jit
def _produce(
    q_ptr, q_stride, kv_ptr, kv_stride, ids_ptr, heads, tiles, K, q_l, q_r, q_t, k_l, k_r, k_t, q_full, full, empty,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    head = gl.arange(0, HEADS, layout=rows)
    head_ptr = q_ptr + head * q_stride
    real = (head < heads)[:, None]
    gather_rows(q_l, head_ptr, 0, real, layout, HALF)
    gather_rows(q_r, head_ptr, HALF, real, layout, HALF)
    gather_rows(q_t, head_ptr, 2 * HALF, real, layout, ROPE)
    async_copy.mbarrier_arrive(q_full, increment_count=False)
    slot = gl.arange(0, KEYS, layout=rows)
    ids = gl.load(ids_ptr + slot, mask=slot < K, other=0)
    for i in range(tiles):
        stage = i % STAGES
        row_ptr = kv_ptr + gl.maximum(ids, 0).to(gl.int64) * kv_stride
        slot += KEYS
        ids = gl.load(ids_ptr + slot, mask=slot < K, other=0)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        gather_rows(k_l.index(stage), row_ptr, 0, None, layout, HALF)
        gather_rows(k_r.index(stage), row_ptr, HALF, None, layout, HALF)
        gather_rows(k_t.index(stage), row_ptr, 2 * HALF, None, layout, ROPE)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _attend_left(
    ids_ptr, out_ptr, out_stride, lse_ptr, heads, tiles, K, scale,
    q_l, q_r, q_t, k_l, k_r, k_t, factor, q_full, full, empty, ready, done,
):  # fmt: skip
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    slot = gl.arange(0, KEYS, layout=gl.SliceLayout(0, score_layout))
    top = gl.full([HEADS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, score_layout))
    total = gl.full([HEADS], 0.0, gl.float32, layout=gl.SliceLayout(1, score_layout))
    none = gl.zeros([HEADS, KEYS], gl.float32, layout=score_layout)
    out = gl.zeros([HEADS, HALF], gl.float32, layout=out_layout)
    ids = gl.load(ids_ptr + slot, mask=slot < K, other=-1)
    mbarrier.wait(q_full, 0)
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        fence_async_shared()
        score = warpgroup_mma(q_l, k_l.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        score = warpgroup_mma(q_r, k_r.index(stage).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma(q_t, k_t.index(stage).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])
        score = gl.where((ids >= 0)[None, :], score * scale, float("-inf"))
        slot += KEYS
        ids = gl.load(ids_ptr + slot, mask=slot < K, other=-1)
        new_top = gl.maximum(top, gl.max(score, 1))
        finite_top = gl.where(new_top == float("-inf"), 0.0, new_top)
        prob = gl.exp2(score - finite_top[:, None])
        rescale = gl.exp2(top - finite_top)
        top = new_top
        total = total * rescale + gl.sum(prob, 1)
        k_t.index(stage).store(prob.to(k_t.dtype))
        factor.index(stage).store(rescale)
        fence_async_shared()
        mbarrier.arrive(ready.index(stage))
        out = out * gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
        out = warpgroup_mma(k_t.index(stage), k_l.index(stage), out)
        mbarrier.arrive(empty.index(stage))
    inverse = gl.where(total > 0, 1.0 / total, 0.0)
    factor.index(STAGES).store(inverse)
    mbarrier.arrive(done)
    out = out * gl.convert_layout(inverse, gl.SliceLayout(1, out_layout))[:, None]
    store_half(q_l, out.to(q_l.dtype), out_ptr, out_stride, heads, HALF)
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, score_layout))
    lse = gl.where(total > 0, (top + gl.log2(total)) / LOG2E, float("-inf"))
    gl.store(lse_ptr + head, lse, mask=head < heads)


@gluon.jit
def _attend_right(out_ptr, out_stride, heads, tiles, q_r, k_r, k_t, factor, full, empty, ready, done):
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    row: gl.constexpr = gl.SliceLayout(1, out_layout)
    out = gl.zeros([HEADS, HALF], gl.float32, layout=out_layout)
    for i in range(tiles):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(full.index(stage), phase)
        mbarrier.wait(ready.index(stage), phase)
        fence_async_shared()
        out = out * factor.index(stage).load(row)[:, None]
        out = warpgroup_mma(k_t.index(stage), k_r.index(stage), out)
        mbarrier.arrive(empty.index(stage))
    mbarrier.wait(done, 0)
    out = out * factor.index(STAGES).load(row)[:, None]
    store_half(q_r, out.to(q_r.dtype), out_ptr + HALF, out_stride, heads, HALF)


@gluon.jit
def _forward_kernel(
    q_ptr, kv_ptr, kv_stride, ids_ptr, out_ptr, lse_ptr, H, K, scale,
    K_PADDED: gl.constexpr,
):  # fmt: skip
    blocks = gl.cdiv(H, HEADS)
    n = (gl.program_id(0) // blocks).to(gl.int64)
    first_head = (gl.program_id(0) % blocks) * HEADS
    heads = H - first_head
    width: gl.constexpr = 2 * HALF + ROPE
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_ptr += (n * H + first_head) * width
    out_ptr += (n * H + first_head) * (2 * HALF)
    lse_ptr += n * H + first_head
    ids_ptr += n * K
    K = gl.to_tensor(K)  # 1 would be a constant, which no partition takes
    tiles = used_tiles(ids_ptr, K, K_PADDED)

    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, HALF], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, ROPE], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_l = gl.allocate_shared_memory(dtype, [HEADS, HALF], wide)
    q_r = gl.allocate_shared_memory(dtype, [HEADS, HALF], wide)
    q_t = gl.allocate_shared_memory(dtype, [HEADS, ROPE], narrow)
    k_l = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HALF], wide)
    k_r = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HALF], wide)
    k_t = gl.allocate_shared_memory(dtype, [STAGES, KEYS, ROPE], narrow)
    factor = gl.allocate_shared_memory(gl.float32, [STAGES + 1, HEADS], flat)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], bars)
    done = gl.allocate_shared_memory(gl.int64, [1], bars)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    mbarrier.init(q_full, count=PRODUCER_THREADS)
    mbarrier.init(done, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=PRODUCER_THREADS)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    barrier()
    left = (
        ids_ptr, out_ptr, 2 * HALF, lse_ptr, heads, tiles, K, scale * LOG2E,
        q_l, q_r, q_t, k_l, k_r, k_t, factor, q_full, full, empty, ready, done,
    )  # fmt: skip
    right = (out_ptr, 2 * HALF, heads, tiles, q_r, k_r, k_t, factor, full, empty, ready, done)
    sources = (
        q_ptr, width, kv_ptr, kv_stride, ids_ptr, heads, tiles, K,
        q_l, q_r, q_t, k_l, k_r, k_t, q_full, full, empty,
    )  # fmt: skip
    gl.warp_specialize([(_attend_left, left), (_attend_right, right), (_produce, sources)], [4, 4], [176, 88])


def supported(q_NHC: Tensor, kv_MC: Tensor, value_dim: int) -> bool:
    """Whether these kernels can run, with heads that fill a block."""
    return fits(q_NHC, kv_MC, value_dim) and 32 < q_NHC.shape[1] <= 128


def forward(q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, scale: float, out_NHV: Tensor, lse_NH: Tensor) -> None:
    """Write O and lse of reference.sparse_mla."""
    (N, H, _), K = q_NHC.shape, ids_NK.shape[1]
    _forward_kernel[(N * -(-H // 64),)](
        q_NHC, kv_MC, kv_MC.stride(0), ids_NK, out_NHV, lse_NH, H, K, scale, padded(K), num_warps=4,
    )  # fmt: skip
