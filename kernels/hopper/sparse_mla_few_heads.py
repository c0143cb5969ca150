"""sparse_mla of at most 32 heads on Hopper, in Gluon: keys are the rows of every product. Spec: reference.sparse_mla.

A program serves one query and all its heads. A producer gathers tiles of 64 keys with cp.async into buffers for three
groups of columns, each refilled as soon as no product needs it: the halves of the value part, and the rope part.
Forward, one consumer multiplies, and two programs share a multiprocessor: one gathers while the other multiplies.
Backward, two consumers take tiles in turn; what each has summed is added at the end, one half of the columns by each.
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
    KEYS,
    LOG2E,
    PRODUCER_THREADS,
    ROPE,
    barrier,
    fits,
    gather_rows,
    padded,
    store_piece,
    used_tiles,
)

descriptor = gl.shared_memory_descriptor
reinterpret = getattr(descriptor, "reinterpret", None) or descriptor._reinterpret  # the older name
VALUE = gl.constexpr(512)
WIDTH = gl.constexpr(576)
ROPE_BAR = gl.constexpr(2)  # of the backward pass; barriers 0 and 1 are those of left halves
RIGHT_BAR = gl.constexpr(4)
REGISTERS = gl.constexpr([224, 56])
COPY_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _load_heads(smem, row_ptr, column, real):
    COLUMNS: gl.constexpr = smem.shape[1]
    gather_rows(smem, row_ptr, column, real, COPY_LAYOUT, COLUMNS)


@gluon.jit
def _load_ids(ids_ptr, i, K):
    slot = i * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, COPY_LAYOUT))
    return gl.load(ids_ptr + slot, mask=slot < K, other=0)


@gluon.jit
def _refill(i, smem, bar, row_ptr, column, full, empty, SLOTS: gl.constexpr):
    """Some columns of tile i, into one of SLOTS buffers."""
    mbarrier.wait(empty.index(bar), ((i // SLOTS) & 1) ^ 1)
    _load_heads(smem, row_ptr, column, None)
    async_copy.mbarrier_arrive(full.index(bar), increment_count=False)


@gluon.jit
def _await(i, bar, full, SLOTS: gl.constexpr):
    mbarrier.wait(full.index(bar), (i // SLOTS) & 1)
    fence_async_shared()


@gluon.jit
def _opaque(i):
    """i, of which the compiler knows nothing: addresses are computed in a loop, not kept in registers around it."""
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _floats(smem, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    return reinterpret(smem, gl.float32, [ROWS, COLUMNS], FLAT)


@gluon.jit
def _store_heads(out, smem, out_ptr, stride, H):
    """[columns, heads] into rows of heads, through shared memory, so that the stores to memory are wide."""
    BLOCK_H: gl.constexpr = smem.shape[0]
    COLUMNS: gl.constexpr = smem.shape[1]
    smem.permute((1, 0)).store(out.to(smem.dtype))
    barrier()
    head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, COPY_LAYOUT))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, COPY_LAYOUT))
    pointer = out_ptr + (head * stride)[:, None] + column[None, :]
    gl.store(pointer, smem.load(COPY_LAYOUT), mask=(head < H)[:, None])


@gluon.jit
def _init(still, full, empty):
    mbarrier.init(still, count=PRODUCER_THREADS)
    BARS: gl.constexpr = full.shape[0]
    for i in gl.static_range(BARS):
        mbarrier.init(full.index(i), count=PRODUCER_THREADS)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    barrier()


@gluon.jit
def _produce(q_ptr, kv_ptr, kv_stride, ids_ptr, H, K, tiles, q, q_t, k, k_t, still, full, empty):
    BLOCK_H: gl.constexpr = q.shape[1]
    head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, COPY_LAYOUT))
    ids = _load_ids(ids_ptr, 0, K)
    _load_heads(q.index(0), q_ptr + head * WIDTH, 0, (head < H)[:, None])
    _load_heads(q.index(1), q_ptr + head * WIDTH, HALF, (head < H)[:, None])
    _load_heads(q_t.index(0), q_ptr + head * WIDTH, VALUE, (head < H)[:, None])
    async_copy.mbarrier_arrive(still, increment_count=False)
    for i in range(tiles):
        row_ptr = kv_ptr + gl.maximum(ids, 0).to(gl.int64) * kv_stride
        ids = _load_ids(ids_ptr, i + 1, K)
        _refill(i, k.index(0), 0, row_ptr, 0, full, empty, 1)
        _refill(i, k.index(1), 1, row_ptr, HALF, full, empty, 1)
        _refill(i, k_t.index(0), 2, row_ptr, VALUE, full, empty, 1)


@gluon.jit
def _attend(ids_ptr, out_ptr, lse_ptr, H, K, tiles, scale, q, q_t, k, k_t, p, still, full, empty):
    BLOCK_H: gl.constexpr = q.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_H, 16])
    keys: gl.constexpr = gl.SliceLayout(1, layout)
    heads: gl.constexpr = gl.SliceLayout(0, layout)
    top = gl.full([BLOCK_H], float("-inf"), gl.float32, layout=heads)
    sums = gl.zeros([KEYS, BLOCK_H], gl.float32, layout=layout)  # over tiles; over keys at the end
    none = gl.zeros([KEYS, BLOCK_H], gl.float32, layout=layout)
    out_l = gl.zeros([HALF, BLOCK_H], gl.float32, layout=layout)
    out_r = gl.zeros([HALF, BLOCK_H], gl.float32, layout=layout)
    slot = gl.arange(0, KEYS, layout=keys)
    ids = gl.load(ids_ptr + slot, mask=slot < K, other=-1)
    mbarrier.wait(still, 0)
    for i in range(tiles):
        first = _opaque(0)
        for bar in gl.static_range(3):
            _await(i, bar, full, 1)
        score = warpgroup_mma(k.index(first), q.index(first).permute((1, 0)), none, use_acc=False, is_async=True)
        score = warpgroup_mma(k.index(first + 1), q.index(first + 1).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma(k_t.index(first), q_t.index(first).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])
        score = gl.where((ids >= 0)[:, None], score * scale, float("-inf"))
        slot += KEYS
        ids = gl.load(ids_ptr + slot, mask=slot < K, other=-1)
        new_top = gl.maximum(top, gl.max(score, 0))
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
        prob = gl.exp2(score - shift[None, :])
        second = _opaque(0)
        prob_mem = p.permute((1, 0))
        prob_mem.store(prob.to(p.dtype))
        fence_async_shared()
        shrink = gl.exp2(top - shift)[None, :]
        top = new_top
        sums = sums * shrink + prob
        out_l = out_l * shrink
        out_r = out_r * shrink
        out_l = warpgroup_mma(k.index(second).permute((1, 0)), prob_mem, out_l, is_async=True)
        out_r = warpgroup_mma(k.index(second + 1).permute((1, 0)), prob_mem, out_r, is_async=True)
        out_l, out_r = warpgroup_mma_wait(1, deps=[out_l, out_r])
        mbarrier.arrive(empty.index(0))
        out_l, out_r = warpgroup_mma_wait(0, deps=[out_l, out_r])
        mbarrier.arrive(empty.index(1))
        mbarrier.arrive(empty.index(2))
    total = gl.sum(sums, 0)
    some = gl.where(total > 0, total, 1.0)  # no key: O = 0, lse = -inf
    _store_heads(out_l / some[None, :], q.index(0), out_ptr, VALUE, H)
    _store_heads(out_r / some[None, :], q.index(1), out_ptr + HALF, VALUE, H)
    head = gl.arange(0, BLOCK_H, layout=heads)
    gl.store(lse_ptr + head, (top + gl.log2(some)) / LOG2E, mask=head < H)


@gluon.jit
def _forward_kernel(
    q_ptr, kv_ptr, kv_stride, ids_ptr, out_ptr, lse_ptr, H, K, scale,
    K_PADDED: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    n = gl.program_id(0).to(gl.int64)
    ids_ptr += n * K
    tiles = used_tiles(ids_ptr, K, K_PADDED)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, HALF], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, ROPE], dtype)
    q = gl.allocate_shared_memory(dtype, [2, BLOCK_H, HALF], wide)
    q_t = gl.allocate_shared_memory(dtype, [1, BLOCK_H, ROPE], narrow)
    k = gl.allocate_shared_memory(dtype, [2, KEYS, HALF], wide)
    k_t = gl.allocate_shared_memory(dtype, [1, KEYS, ROPE], narrow)
    if BLOCK_H == 16:
        p = gl.allocate_shared_memory(dtype, [BLOCK_H, KEYS], narrow)
    else:  # the rope part has been multiplied by then, and nothing else fits beside a second program
        p = reinterpret(k_t, dtype, [BLOCK_H, KEYS], narrow)
    producer_registers: gl.constexpr = 96 if BLOCK_H == 16 else 56
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    still = gl.allocate_shared_memory(gl.int64, [1], bars)
    full = gl.allocate_shared_memory(gl.int64, [3, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [3, 1], bars)
    _init(still, full, empty)
    heads, slots = gl.to_tensor(H), gl.to_tensor(K)  # a 1 would be a constant, which does not survive in a tuple
    use = (
        ids_ptr, out_ptr + n * H * VALUE, lse_ptr + n * H, heads, slots, tiles, scale * LOG2E,
        q, q_t, k, k_t, p, still, full, empty,
    )  # fmt: skip
    load = (q_ptr + n * H * WIDTH, kv_ptr, kv_stride, ids_ptr, heads, slots, tiles, q, q_t, k, k_t, still, full, empty)
    gl.warp_specialize([(_attend, use), (_produce, load)], [4], [producer_registers])


def supported(q_NHC: Tensor, kv_MC: Tensor, value_dim: int) -> bool:
    """Whether these kernels can run, with at most 32 heads."""
    return fits(q_NHC, kv_MC, value_dim) and q_NHC.shape[1] <= 32


def _block(H: int) -> int:
    return 16 if H <= 16 else 32


def forward(q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, scale: float, out_NHV: Tensor, lse_NH: Tensor) -> None:
    """Write O and lse of reference.sparse_mla."""
    (N, H, _), K = q_NHC.shape, ids_NK.shape[1]
    _forward_kernel[(N,)](
        q_NHC, kv_MC, kv_MC.stride(0), ids_NK, out_NHV, lse_NH, H, K, scale, padded(K), _block(H),
        num_warps=4, maxnreg=128,
    )  # fmt: skip


@gluon.jit
def _produce_twice(
    q_ptr, grad_ptr, kv_ptr, kv_stride, ids_ptr, H, K, tiles, q, q_t, g, k, k_t, still, full, empty,
):  # fmt: skip
    BLOCK_H: gl.constexpr = q.shape[1]
    head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, COPY_LAYOUT))
    ids = _load_ids(ids_ptr, 0, K)
    _load_heads(q.index(0), q_ptr + head * WIDTH, 0, (head < H)[:, None])
    _load_heads(q.index(1), q_ptr + head * WIDTH, HALF, (head < H)[:, None])
    _load_heads(q_t.index(0), q_ptr + head * WIDTH, VALUE, (head < H)[:, None])
    _load_heads(g.index(0), grad_ptr + head * VALUE, 0, (head < H)[:, None])
    _load_heads(g.index(1), grad_ptr + head * VALUE, HALF, (head < H)[:, None])
    async_copy.mbarrier_arrive(still, increment_count=False)
    for i in range(tiles):
        row_ptr = kv_ptr + gl.maximum(ids, 0).to(gl.int64) * kv_stride
        ids = _load_ids(ids_ptr, i + 1, K)
        _refill(i, k.index(i % 2), i % 2, row_ptr, 0, full, empty, 2)
        _refill(i, k.index(2 + i % 2), RIGHT_BAR + i % 2, row_ptr, HALF, full, empty, 2)
        _refill(i, k_t.index(i % 2), ROPE_BAR + i % 2, row_ptr, VALUE, full, empty, 2)


@gluon.jit
def _differentiate(
    ids_ptr, lse_ptr, delta_ptr, dq_ptr, row_ptr, H, K, tiles, scale,
    q, q_t, g, k, k_t, ds, still, full, empty, done, WHICH: gl.constexpr,
):  # fmt: skip
    BLOCK_H: gl.constexpr = q.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_H, 16])
    row_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROPE, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, row_layout, 2)
    head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, layout))
    none = gl.zeros([KEYS, BLOCK_H], gl.float32, layout=layout)
    no_row = gl.zeros([KEYS, ROPE], gl.float32, layout=row_layout)
    dq_l = gl.zeros([HALF, BLOCK_H], gl.float32, layout=layout)
    dq_r = gl.zeros([HALF, BLOCK_H], gl.float32, layout=layout)
    dq_t = gl.zeros([ROPE, BLOCK_H], gl.float32, layout=layout)
    slot = gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
    row_ptr += WHICH * KEYS * WIDTH
    mbarrier.wait(still, 0)
    for i in range(WHICH, tiles, 2):
        first = _opaque(0)
        stage = first + i % 2
        k_l = k.index(stage)
        k_r = k.index(2 + stage)
        ids = gl.load(ids_ptr + i * KEYS + slot, mask=i * KEYS + slot < K, other=-1)
        _await(i, WHICH, full, 2)
        score = warpgroup_mma(k_l, q.index(first).permute((1, 0)), none, use_acc=False, is_async=True)
        dprob = warpgroup_mma(k_l, g.index(first).permute((1, 0)), none, use_acc=False, is_async=True)
        score, dprob = warpgroup_mma_wait(0, deps=[score, dprob])
        _await(i, RIGHT_BAR + WHICH, full, 2)
        score = warpgroup_mma(k_r, q.index(first + 1).permute((1, 0)), score, is_async=True)
        dprob = warpgroup_mma(k_r, g.index(first + 1).permute((1, 0)), dprob, is_async=True)
        score, dprob = warpgroup_mma_wait(0, deps=[score, dprob])
        _await(i, ROPE_BAR + WHICH, full, 2)
        score = warpgroup_mma(k_t.index(stage), q_t.index(first).permute((1, 0)), score)
        lse = gl.load(lse_ptr + head, mask=head < H, other=float("inf"))
        lse = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        delta = gl.load(delta_ptr + head, mask=head < H, other=0.0)
        prob = gl.where((ids >= 0)[:, None], gl.exp2(score * (scale * LOG2E) - lse[None, :]), 0.0)
        dscore = (prob * (dprob - delta[None, :]) * scale).to(ds.dtype)
        stage = _opaque(i % 2)
        ds_mem = ds.index(stage).permute((1, 0))
        ds_mem.store(dscore)
        fence_async_shared()
        dq_l = warpgroup_mma(k.index(stage).permute((1, 0)), ds_mem, dq_l, is_async=True)
        dq_r = warpgroup_mma(k.index(2 + stage).permute((1, 0)), ds_mem, dq_r, is_async=True)
        dq_t = warpgroup_mma(k_t.index(stage).permute((1, 0)), ds_mem, dq_t, is_async=True)
        dq_l, dq_r, dq_t = warpgroup_mma_wait(2, deps=[dq_l, dq_r, dq_t])
        mbarrier.arrive(empty.index(WHICH))
        dq_l, dq_r, dq_t = warpgroup_mma_wait(0, deps=[dq_l, dq_r, dq_t])
        mbarrier.arrive(empty.index(RIGHT_BAR + WHICH))
        first = _opaque(0)
        tail = k_t.index(first + i % 2)
        dscore = gl.convert_layout(dscore, operand)
        prob = gl.convert_layout(prob.to(ds.dtype), operand)
        for c in gl.static_range(VALUE // ROPE):
            q_part = q.index(first + c * ROPE // HALF).slice(c * ROPE % HALF, ROPE, dim=1)
            g_part = g.index(first + c * ROPE // HALF).slice(c * ROPE % HALF, ROPE, dim=1)
            row = warpgroup_mma(dscore, q_part, no_row, use_acc=False)
            row = warpgroup_mma(prob, g_part, row)
            store_piece(row, tail, row_ptr, c * ROPE, K - i * KEYS)
        row = warpgroup_mma(dscore, q_t.index(first), no_row, use_acc=False)
        store_piece(row, tail, row_ptr, VALUE, K - i * KEYS)
        barrier()
        mbarrier.arrive(empty.index(ROPE_BAR + WHICH))
        row_ptr += 2 * KEYS * WIDTH
    if WHICH == 0:
        kept, given = dq_l, dq_r
    else:
        kept, given = dq_r, dq_l
        _floats(k_t.index(WHICH), ROPE, BLOCK_H).store(dq_t)
    _floats(k.index(WHICH), HALF, BLOCK_H).store(given)
    barrier()
    mbarrier.arrive(done)
    mbarrier.wait(done, 0)
    kept += _floats(k.index(1 - WHICH), HALF, BLOCK_H).load(layout)
    _store_heads(kept, q.index(WHICH), dq_ptr + WHICH * HALF, WIDTH, H)
    if WHICH == 0:
        dq_t += _floats(k_t.index(1), ROPE, BLOCK_H).load(layout)
        _store_heads(dq_t, q_t.index(0), dq_ptr + VALUE, WIDTH, H)


@gluon.jit
def _differentiate_even(
    ids_ptr, lse_ptr, delta_ptr, dq_ptr, row_ptr, H, K, tiles, scale, q, q_t, g, k, k_t, ds, still, full, empty, done,
):  # fmt: skip
    _differentiate(
        ids_ptr, lse_ptr, delta_ptr, dq_ptr, row_ptr, H, K, tiles, scale,
        q, q_t, g, k, k_t, ds, still, full, empty, done, 0,
    )  # fmt: skip


@gluon.jit
def _differentiate_odd(
    ids_ptr, lse_ptr, delta_ptr, dq_ptr, row_ptr, H, K, tiles, scale, q, q_t, g, k, k_t, ds, still, full, empty, done,
):  # fmt: skip
    _differentiate(
        ids_ptr, lse_ptr, delta_ptr, dq_ptr, row_ptr, H, K, tiles, scale,
        q, q_t, g, k, k_t, ds, still, full, empty, done, 1,
    )  # fmt: skip


@gluon.jit
def _gradient_kernel(
    q_ptr, kv_ptr, kv_stride, ids_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, row_ptr, H, K, scale,
    K_PADDED: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    n = gl.program_id(0).to(gl.int64)
    ids_ptr += n * K
    tiles = used_tiles(ids_ptr, K, K_PADDED)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, HALF], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, ROPE], dtype)
    q = gl.allocate_shared_memory(dtype, [2, BLOCK_H, HALF], wide)
    q_t = gl.allocate_shared_memory(dtype, [1, BLOCK_H, ROPE], narrow)
    g = gl.allocate_shared_memory(dtype, [2, BLOCK_H, HALF], wide)
    k = gl.allocate_shared_memory(dtype, [4, KEYS, HALF], wide)
    k_t = gl.allocate_shared_memory(dtype, [2, KEYS, ROPE], narrow)
    ds = gl.allocate_shared_memory(dtype, [2, BLOCK_H, KEYS], narrow)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    still = gl.allocate_shared_memory(gl.int64, [1], bars)
    done = gl.allocate_shared_memory(gl.int64, [1], bars)
    full = gl.allocate_shared_memory(gl.int64, [6, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [6, 1], bars)
    mbarrier.init(done, count=2)
    _init(still, full, empty)
    heads, slots = gl.to_tensor(H), gl.to_tensor(K)  # a 1 would be a constant, which does not survive in a tuple
    use = (
        ids_ptr, lse_ptr + n * H, delta_ptr + n * H, dq_ptr + n * H * WIDTH, row_ptr + n * K * WIDTH,
        heads, slots, tiles, scale, q, q_t, g, k, k_t, ds, still, full, empty, done,
    )  # fmt: skip
    load = (
        q_ptr + n * H * WIDTH, grad_ptr + n * H * VALUE, kv_ptr, kv_stride, ids_ptr, heads, slots, tiles,
        q, q_t, g, k, k_t, still, full, empty,
    )  # fmt: skip
    gl.warp_specialize(
        [(_differentiate_even, use), (_differentiate_odd, use), (_produce_twice, load)], [4, 4], REGISTERS
    )


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
    _gradient_kernel[(N,)](
        q_NHC, kv_MC, kv_MC.stride(0), ids_NK, grad_NHV, lse_NH, delta_NH, dq_NHC, row_EC, H, K, scale,
        padded(K), _block(H), num_warps=4,
    )  # fmt: skip
