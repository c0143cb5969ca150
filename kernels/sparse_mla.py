"""Absorbed multi-query attention over selected rows, forward and deterministic backward. Spec: reference.sparse_mla.

Shape suffixes: N = query tokens, M = key tokens, H = heads, V = value width, R = rope width, C = V + R = width of a
row, K = selected keys per query.

A row has a value part, which also serves as the value, and a rope part. Kernels treat each part in blocks whose
widths are powers of two: V = 512 and R = 64 become columns [0, 256), [256, 512) and [512, 576).
"""

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels.by_key import slots_by_key, sum_by_key

LOG2E = 1.4426950408889634
WORKSPACE = 2 << 30
"""Bytes that the backward pass may use for what it keeps per selected key."""
HEADS_BACKWARD = 128
"""Heads whose gradients fit into the registers of one program; more are taken in turns."""
DQ_TILES = {16: (2, 64, 4), 32: (1, 64, 8), 64: (2, 64, 4), 128: (2, 128, 8)}
"""Programs per query, keys at once and warps of _dq_kernel by its heads: the fastest of those measured on an H200."""


@triton.jit(do_not_specialize=["N", "K", "SPLITS"])
def _forward_kernel(
    q_ptr, kv_ptr, ids_ptr, used_ptr, out_ptr, lse_ptr, N, H, K, SPLITS, kv_stride, scale,
    V: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, WIDTH_R: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_h = tl.cdiv(H, BLOCK_H)
    n = (tl.program_id(0) // blocks_h).to(tl.int64)
    h = (tl.program_id(0) % blocks_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    split = tl.program_id(1)
    c0 = tl.arange(0, WIDTH)
    c1 = WIDTH + tl.arange(0, WIDTH)
    r = tl.arange(0, WIDTH_R)
    j = tl.arange(0, BLOCK_K)
    C: tl.constexpr = V + R

    q_row = q_ptr + (n * H + h[:, None]) * C
    q0 = tl.load(q_row + c0, mask=(h < H)[:, None] & (c0 < V), other=0.0)
    q1 = tl.load(q_row + c1, mask=(h < H)[:, None] & (c1 < V), other=0.0)
    qr = tl.load(q_row + V + r, mask=(h < H)[:, None] & (r < R), other=0.0)
    o0 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    o1 = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)

    tiles = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    begin, end = split * tiles * BLOCK_K, tl.minimum((split + 1) * tiles * BLOCK_K, K)
    if used_ptr is not None:
        end = tl.minimum(end, tl.load(used_ptr + n))
    ids = tl.load(ids_ptr + n * K + begin + j, mask=begin + j < end, other=-1)
    for first in range(begin, end, BLOCK_K):
        k_row = kv_ptr + tl.maximum(ids, 0).to(tl.int64)[:, None] * kv_stride
        hidden = ids < 0
        used = ~hidden[:, None]
        k0 = tl.load(k_row + c0, mask=used & (c0 < V)[None, :], other=0.0)
        k1 = tl.load(k_row + c1, mask=used & (c1 < V)[None, :], other=0.0)
        kr = tl.load(k_row + V + r, mask=used & (r < R)[None, :], other=0.0)
        after = first + BLOCK_K + j
        ids = tl.load(ids_ptr + n * K + after, mask=after < end, other=-1)  # ahead of the rows it points to
        score = tl.dot(qr, tl.trans(kr), input_precision=PRECISION)
        score = tl.dot(q0, tl.trans(k0), score, input_precision=PRECISION)
        score = tl.dot(q1, tl.trans(k1), score, input_precision=PRECISION)
        score = tl.where(hidden[None, :], float("-inf"), score * scale)
        new_top = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        prob = tl.exp2(score - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(prob, 1)
        prob = prob.to(k0.dtype)
        o0 = tl.dot(prob, k0, o0 * shrink[:, None], input_precision=PRECISION)
        o1 = tl.dot(prob, k1, o1 * shrink[:, None], input_precision=PRECISION)
        top = new_top

    total = tl.where(total > 0.0, total, 1.0)  # no key: O = 0, lse = -inf
    norm = (1.0 / total)[:, None]
    row = (split * N + n) * H + h
    tl.store(lse_ptr + row, (top + tl.log2(total)) / 1.4426950408889634, mask=h < H)
    out_row = out_ptr + row[:, None] * V
    dtype = out_ptr.dtype.element_ty
    tl.store(out_row + c0, (o0 * norm).to(dtype), mask=(h < H)[:, None] & (c0 < V))
    tl.store(out_row + c1, (o1 * norm).to(dtype), mask=(h < H)[:, None] & (c1 < V))


@triton.jit(do_not_specialize=["ROWS", "SPLITS"])
def _combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, ROWS, SPLITS,
    V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    s, v = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    lse = tl.load(part_lse_ptr + s * ROWS + row, mask=s < SPLITS, other=float("-inf"))
    top = tl.max(lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse - shift), 0)
    total = tl.where(total > 0.0, total, 1.0)  # no key: O = 0, lse = -inf
    out = tl.zeros((BLOCK_V,), tl.float32)
    for split in range(0, SPLITS):
        weight = tl.exp(tl.load(part_lse_ptr + split * ROWS + row) - shift)
        width = tl.where(weight > 0.0, V, 0)  # most parts of a short sequence hold no key
        out += weight * tl.load(part_ptr + (split * ROWS + row) * V + v, mask=v < width, other=0.0)
    tl.store(out_ptr + row * V + v, (out / total).to(out_ptr.dtype.element_ty), mask=v < V)
    tl.store(lse_ptr + row, top + tl.log(total))


def _forward(
    q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, value_dim: int, scale: float, splits: int | None = None,
    used_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention and its log-sum-exp; the keys of a query are split over programs where there are few queries.

    Args:
        used_N: int32; no id at or after this position of a row is used.
    """
    (N, H, C), K = q_NHC.shape, ids_NK.shape[1]
    half = q_NHC.element_size() == 2
    BLOCK_H = _heads_at_once(H) if half else 16
    BLOCK_K = 64 if half else 16
    programs = N * triton.cdiv(H, BLOCK_H)
    if splits is None:
        splits = _splits(programs, triton.cdiv(K, BLOCK_K), q_NHC.device)
    out_NHV = torch.empty(N, H, value_dim, dtype=q_NHC.dtype, device=q_NHC.device)
    lse_NH = torch.empty(N, H, dtype=torch.float32, device=q_NHC.device)
    if programs == 0:
        return out_NHV, lse_NH
    hopper = _hopper(q_NHC, kv_MC, value_dim)
    if hopper is not None and splits == 1:
        hopper.forward(q_NHC, kv_MC, ids_NK, scale, out_NHV, lse_NH)
        return out_NHV, lse_NH
    part, part_lse = out_NHV, lse_NH
    if splits > 1:
        part = torch.empty(splits, N, H, value_dim, dtype=torch.float32, device=q_NHC.device)
        part_lse = torch.empty(splits, N, H, dtype=torch.float32, device=q_NHC.device)
    _forward_kernel[(programs, splits)](
        q_NHC, kv_MC, ids_NK, used_N, part, part_lse, N, H, K, splits, kv_MC.stride(0), scale * LOG2E,
        value_dim, C - value_dim, _width(value_dim, 2), _width(C - value_dim, 1),
        BLOCK_H, BLOCK_K, _precision(q_NHC), num_warps=8 if BLOCK_H == 64 else 4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(N * H,)](
            part, part_lse, out_NHV, lse_NH, N * H, splits, value_dim, triton.next_power_of_2(value_dim),
            max(16, triton.next_power_of_2(splits)),
        )  # fmt: skip
    return out_NHV, lse_NH


def _hopper(q_NHC: Tensor, kv_MC: Tensor, value_dim: int) -> ModuleType | None:
    """The kernels for Hopper, where they can run."""
    if not q_NHC.is_cuda:
        return None
    from trimtab.kernels.hopper import sparse_mla, sparse_mla_few_heads  # Gluon, which only newer Tritons have

    modules = (sparse_mla, sparse_mla_few_heads)
    return next((module for module in modules if module.supported(q_NHC, kv_MC, value_dim)), None)


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Parts into which the keys of a query are split so that few programs still fill the GPU, two a multiprocessor: a
    power of two, of the sizes of the call and the GPU alone, so that equal calls have equal bits."""
    if device.type != "cuda":
        return 1
    room = 2 * torch.cuda.get_device_properties(device).multi_processor_count // max(1, programs)
    return 1 << (max(1, min(tiles, room)).bit_length() - 1)


def _heads_at_once(H: int) -> int:
    return min(64, max(16, triton.next_power_of_2(H)))


def _width(columns: int, parts: int) -> int:
    """Width of one of the blocks that cover some columns."""
    return max(16, triton.next_power_of_2(triton.cdiv(columns, parts)))


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _delta_kernel(out_ptr, grad_ptr, delta_ptr, V: tl.constexpr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    out = tl.load(out_ptr + row * V + v, mask=v < V, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * V + v, mask=v < V, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(out * grad, 0))


def _delta(out_NHV: Tensor, grad_NHV: Tensor) -> Tensor:
    """delta[n, h] = O[n, h] . dO[n, h] in fp32."""
    N, H, V = out_NHV.shape
    assert grad_NHV.shape == out_NHV.shape and out_NHV.is_contiguous() and grad_NHV.is_contiguous()
    delta_NH = torch.empty(N, H, dtype=torch.float32, device=out_NHV.device)
    _delta_kernel[(N * H,)](out_NHV, grad_NHV, delta_NH, V, triton.next_power_of_2(V), num_warps=1)
    return delta_NH


@triton.jit
def _row_grad_kernel(
    q_ptr, kv_ptr, ids_ptr, grad_ptr, lse_ptr, delta_ptr, dscore_ptr, out_ptr, H, K, first_h, kv_stride, scale,
    V: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_k = tl.cdiv(K, BLOCK_K)
    n = (tl.program_id(0) // blocks_k).to(tl.int64)
    j = (tl.program_id(0) % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    h = first_h + tl.arange(0, HEADS)
    C: tl.constexpr = V + R
    dtype = q_ptr.dtype.element_ty
    ids = tl.load(ids_ptr + n * K + j, mask=j < K, other=-1)
    slot = n * K + j
    dscore_row = dscore_ptr + slot[:, None] * HEADS + tl.arange(0, HEADS)
    if tl.max(ids, 0) < 0:  # nobody reads these rows
        tl.store(dscore_row, tl.zeros((BLOCK_K, HEADS), dtype), mask=(j < K)[:, None])
        return
    k_row = kv_ptr + tl.maximum(ids, 0).to(tl.int64)[:, None] * kv_stride
    q_row = q_ptr + (n * H + h[:, None]) * C
    grad_row = grad_ptr + (n * H + h[:, None]) * V
    used_h = (h < H)[:, None]

    used = (ids >= 0)[:, None]
    score = tl.zeros((BLOCK_K, HEADS), tl.float32)
    dprob = tl.zeros((BLOCK_K, HEADS), tl.float32)
    for first in tl.range(0, V, BLOCK_C, num_stages=STAGES):
        c = first + tl.arange(0, BLOCK_C)
        k = tl.load(k_row + c, mask=used & (c < V)[None, :], other=0.0)
        q = tl.load(q_row + c, mask=used_h & (c < V), other=0.0)
        grad = tl.load(grad_row + c, mask=used_h & (c < V), other=0.0)
        score = tl.dot(k, tl.trans(q), score, input_precision=PRECISION)
        dprob = tl.dot(k, tl.trans(grad), dprob, input_precision=PRECISION)
    for first in tl.range(V, C, BLOCK_C, num_stages=1):
        c = first + tl.arange(0, BLOCK_C)
        k = tl.load(k_row + c, mask=used & (c < C)[None, :], other=0.0)
        q = tl.load(q_row + c, mask=used_h & (c < C), other=0.0)
        score = tl.dot(k, tl.trans(q), score, input_precision=PRECISION)

    lse = tl.load(lse_ptr + n * H + h, mask=h < H, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + n * H + h, mask=h < H, other=0.0)
    prob = tl.exp2(score * (scale * 1.4426950408889634) - lse[None, :])
    prob = tl.where((ids >= 0)[:, None] & (h < H), prob, 0.0)
    dscore = (prob * (dprob - delta[None, :]) * scale).to(dtype)
    prob = prob.to(dtype)
    tl.store(dscore_row, dscore, mask=(j < K)[:, None])

    out_row = out_ptr + slot[:, None] * C
    for first in tl.range(0, V, BLOCK_C, num_stages=STAGES):
        c = first + tl.arange(0, BLOCK_C)
        q = tl.load(q_row + c, mask=used_h & (c < V), other=0.0)
        grad = tl.load(grad_row + c, mask=used_h & (c < V), other=0.0)
        row = tl.dot(dscore, q, input_precision=PRECISION)
        row = tl.dot(prob, grad, row, input_precision=PRECISION)
        tl.store(out_row + c, row.to(dtype), mask=used & (c < V))
    for first in tl.range(V, C, BLOCK_C, num_stages=1):
        c = first + tl.arange(0, BLOCK_C)
        q = tl.load(q_row + c, mask=used_h & (c < C), other=0.0)
        row = tl.dot(dscore, q, input_precision=PRECISION)
        tl.store(out_row + c, row.to(dtype), mask=used & (c < C))


@triton.jit
def _dq_kernel(
    dscore_ptr, kv_ptr, ids_ptr, dq_ptr, H, K, first_h, kv_stride,
    V: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, WIDTH_R: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % PARTS
    n = (tl.program_id(0) // PARTS).to(tl.int64)
    h = tl.arange(0, HEADS)
    c = part * WIDTH + tl.arange(0, WIDTH)
    r = part * WIDTH_R + tl.arange(0, WIDTH_R)
    j = tl.arange(0, BLOCK_K)
    dq = tl.zeros((HEADS, WIDTH), tl.float32)
    dqr = tl.zeros((HEADS, WIDTH_R), tl.float32)
    ids = tl.load(ids_ptr + n * K + j, mask=j < K, other=-1)
    for first in range(0, K, BLOCK_K):
        k_row = kv_ptr + tl.maximum(ids, 0).to(tl.int64)[:, None] * kv_stride
        used = (ids >= 0)[:, None]
        k = tl.load(k_row + c, mask=used & (c < V)[None, :], other=0.0)
        kr = tl.load(k_row + V + r, mask=used & (r < R)[None, :], other=0.0)
        slot = n * K + first + j
        dscore = tl.load(dscore_ptr + slot[:, None] * HEADS + h, mask=(first + j < K)[:, None], other=0.0)
        after = first + BLOCK_K + j
        ids = tl.load(ids_ptr + n * K + after, mask=after < K, other=-1)  # ahead of the rows it points to
        dscore = tl.trans(dscore)
        dq = tl.dot(dscore, k, dq, input_precision=PRECISION)
        dqr = tl.dot(dscore, kr, dqr, input_precision=PRECISION)
    h += first_h
    dq_row = dq_ptr + (n * H + h[:, None]) * (V + R)
    tl.store(dq_row + c, dq.to(dq_ptr.dtype.element_ty), mask=(h < H)[:, None] & (c < V))
    tl.store(dq_row + V + r, dqr.to(dq_ptr.dtype.element_ty), mask=(h < H)[:, None] & (r < R))


def _backward_chunk(
    q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, grad_NHV: Tensor, lse_NH: Tensor, delta_NH: Tensor, scale: float,
    dq_NHC: Tensor, dkv_MC: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write dq of some queries and add their share of dkv; what lies between is kept per selected key.

        P = exp(S - lse),  dS = scale * P * (dO V^T - delta),  dq = dS K,  dkv[m] += sum of dS^T q + P^T dO

    The last sum runs over the slots of a key in a fixed order, which is what makes the gradient deterministic.
    """
    (N, H, C), (_, K), V = q_NHC.shape, ids_NK.shape, grad_NHV.shape[-1]
    half, stride, precision = q_NHC.element_size() == 2, kv_MC.stride(0), _precision(q_NHC)
    slots = slots_by_key(ids_NK, len(kv_MC))
    row_EC = torch.empty(N * K, C, dtype=q_NHC.dtype, device=q_NHC.device)
    hopper = _hopper(q_NHC, kv_MC, V)
    if hopper is not None:
        hopper.gradients(q_NHC, kv_MC, ids_NK, grad_NHV, lse_NH, delta_NH, scale, dq_NHC, row_EC)
        return sum_by_key(row_EC, slots, dkv_MC)
    heads = min(HEADS_BACKWARD if half else 16, max(16, triton.next_power_of_2(H)))
    dscore_EH = torch.empty(N * K, heads, dtype=q_NHC.dtype, device=q_NHC.device)
    BLOCK_K, BLOCK_C, warps, stages = (128, 64, 8 if heads == 128 else 4, 3) if half else (32, 16, 4, 2)
    parts, dq_block, dq_warps = DQ_TILES[heads] if half else (2, 16, 4)
    for first_h in range(0, H, heads):
        _row_grad_kernel[(N * triton.cdiv(K, BLOCK_K),)](
            q_NHC, kv_MC, ids_NK, grad_NHV, lse_NH, delta_NH, dscore_EH, row_EC, H, K, first_h, stride, scale,
            V, C - V, heads, BLOCK_K, BLOCK_C, stages, precision, num_warps=warps,
        )  # fmt: skip
        dkv_MC = sum_by_key(row_EC, slots, dkv_MC)
        _dq_kernel[(N * parts,)](
            dscore_EH, kv_MC, ids_NK, dq_NHC, H, K, first_h, stride,
            V, C - V, _width(V, parts), _width(C - V, parts), parts, heads, dq_block, precision,
            num_warps=dq_warps, num_stages=2,
        )  # fmt: skip
    assert dkv_MC is not None
    return dkv_MC


def _backward(
    q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, out_NHV: Tensor, lse_NH: Tensor, grad_NHV: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """dq and dkv (fp32), in chunks of queries whose intermediate results fit into WORKSPACE."""
    (N, H, C), K = q_NHC.shape, ids_NK.shape[1]
    dq_NHC = torch.empty_like(q_NHC)
    dkv_MC: Tensor | None = None
    if q_NHC.numel() == 0:
        return dq_NHC, torch.zeros(kv_MC.shape, dtype=torch.float32, device=kv_MC.device)
    delta_NH = _delta(out_NHV, grad_NHV)
    per_query = max(1, K) * (C + 2 * min(H, HEADS_BACKWARD)) * q_NHC.element_size()
    rows = triton.cdiv(N, triton.cdiv(N * per_query, WORKSPACE))
    for n in range(0, N, rows):
        at = slice(n, n + rows)
        dkv_MC = _backward_chunk(
            q_NHC[at], kv_MC, ids_NK[at], grad_NHV[at], lse_NH[at], delta_NH[at], scale, dq_NHC[at], dkv_MC
        )
    assert dkv_MC is not None
    return dq_NHC, dkv_MC


class _SparseMLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_NHC, kv_MC, ids_NK, value_dim, scale):
        out_NHV, lse_NH = _forward(q_NHC, kv_MC, ids_NK, value_dim, scale)
        ctx.save_for_backward(q_NHC, kv_MC, ids_NK, out_NHV, lse_NH)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_NH)
        return out_NHV, lse_NH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHV, _):
        q_NHC, kv_MC, ids_NK, out_NHV, lse_NH = ctx.saved_tensors
        dq_NHC, dkv_MC = _backward(q_NHC, kv_MC, ids_NK, out_NHV, lse_NH, grad_NHV.contiguous(), ctx.scale)
        return dq_NHC, dkv_MC.to(kv_MC.dtype), None, None, None


def sparse_mla(q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, value_dim: int, scale: float) -> tuple[Tensor, Tensor]:
    """Absorbed multi-query attention over selected rows, differentiable in q and kv through O.

        O[n, h] = sum_j softmax_j(scale * q[n, h] . kv[ids[n, j]]) * kv[ids[n, j], :value_dim]

    [DeepSeek-V3.2-Exp, section 2]. The backward pass is deterministic. A query without keys gives O = 0, lse = -inf.

    Args:
        kv_MC: cached rows; the row stride may exceed C (a view of a wider cache).
        ids_NK: rows to attend to, distinct within a query, in any order; -1 marks an unused slot anywhere.
        value_dim: width of the value part; the rest of a row is its rope part.

    Returns:
        O [N, H, value_dim] in q's dtype, lse [N, H] float32 (natural logarithm).

    Raises:
        ValueError: widths or dtypes of q and kv differ, ids is not [N, K], or value_dim is not in 1..C.
    """
    kv_MC = _checked(q_NHC, kv_MC, ids_NK, value_dim)
    return _SparseMLA.apply(q_NHC.contiguous(), kv_MC, ids_NK.contiguous(), value_dim, scale)


@torch.no_grad()
def decode_mla(q_BHC: Tensor, kv_MC: Tensor, ids_BK: Tensor, used_B: Tensor, value_dim: int, scale: float) -> Tensor:
    """sparse_mla of a decoding step, without gradient: shapes and launches depend on those of the arguments alone, so
    a CUDA graph can hold the call, and the same call outside has the same bits.

    Args:
        used_B: int32; no id at or after this position of a row is used. It is read on the device.

    Returns:
        O [B, H, value_dim]; zero for a query without keys.

    Raises:
        ValueError: as sparse_mla does.
    """
    kv_MC = _checked(q_BHC, kv_MC, ids_BK, value_dim)
    assert used_B.dtype == torch.int32 and used_B.is_contiguous() and len(used_B) == len(q_BHC), used_B
    return _forward(q_BHC.contiguous(), kv_MC, ids_BK.contiguous(), value_dim, scale, used_N=used_B)[0]


def _checked(q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, value_dim: int) -> Tensor:
    """kv with its columns side by side. Raises what sparse_mla does."""
    (N, _, C), dtype = q_NHC.shape, q_NHC.dtype
    if kv_MC.shape[-1] != C or kv_MC.dtype != dtype:
        raise ValueError(f"q {tuple(q_NHC.shape)} {dtype} does not fit kv {tuple(kv_MC.shape)} {kv_MC.dtype}")
    if ids_NK.ndim != 2 or len(ids_NK) != N:
        raise ValueError(f"ids must be [{N}, K], not {tuple(ids_NK.shape)}")
    if not 1 <= value_dim <= C:
        raise ValueError(f"value_dim must be in 1..{C}, not {value_dim}")
    return kv_MC if kv_MC.stride(1) == 1 else kv_MC.contiguous()
