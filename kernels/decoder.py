"""What a layer of the engine's DSA policy computes between its matrix products, each part in one launch.

A step of a small policy is as long as its launches. Roundings are those of the plain PyTorch in rollout/engine/
dsa/modules.py, which is the spec: sums in fp32, a result of each named operation in the type of its input.

Shape suffixes: N = tokens of a step, H = heads, R = rope width, C = latent width, Q = compressed query width,
W = C + R, D = index head width or any width, E = experts, K = experts a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_norm_kernel(
    x_ptr, delta_ptr, gain_ptr, sum_ptr, out_ptr, wide_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = n * D + d
    x = tl.load(x_ptr + at, mask=d < D, other=0.0)
    if delta_ptr is not None:
        x = (x.to(tl.float32) + tl.load(delta_ptr + at, mask=d < D, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at, x, mask=d < D)
    y = _rms_norm(x, gain_ptr, d, eps, D)
    tl.store(out_ptr + at, y, mask=d < D)
    if wide_ptr is not None:
        tl.store(wide_ptr + at, y.to(tl.float32), mask=d < D)


@triton.jit
def _rms_norm(x, gain_ptr, d, eps, D: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * gain, of a row that is zero past D, in x's type."""
    gain = tl.load(gain_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    return (wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps) * gain).to(x.dtype)


def add_norm(x_ND: Tensor, delta_ND: Tensor | None, gain_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta, its root-mean-square norm, and the norm again in float32.

    Returns:
        Three [N, D]; the first is x itself without a delta.
    """
    (N, D), half = x_ND.shape, x_ND.dtype != torch.float32
    assert x_ND.is_contiguous() and (delta_ND is None or (delta_ND.is_contiguous() and delta_ND.shape == x_ND.shape))
    out = torch.empty_like(x_ND)
    wide = torch.empty_like(x_ND, dtype=torch.float32) if half else None
    total = x_ND if delta_ND is None else torch.empty_like(x_ND)
    if N:
        block = triton.next_power_of_2(D)
        _add_norm_kernel[(N,)](
            x_ND, delta_ND, gain_D, total, out, wide, eps, D, block, num_warps=8 if block > 2048 else 4
        )
    return total, out, out if wide is None else wide


@triton.jit
def _latent_rows_kernel(
    down_ptr, q_gain_ptr, kv_gain_ptr, k_gain_ptr, k_bias_ptr, turn_ptr, slot_ptr, q_ptr, cache_ptr,
    stride, cache_stride, eps, Q: tl.constexpr, C: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    down_ptr += n * stride
    i = tl.arange(0, BLOCK_Q)
    q = tl.load(down_ptr + i, mask=i < Q, other=0.0)
    tl.store(q_ptr + n * Q + i, _rms_norm(q, q_gain_ptr, i, eps, Q), mask=i < Q)
    slot = tl.load(slot_ptr + n)
    if slot < 0:
        return
    row_ptr = cache_ptr + slot.to(tl.int64) * cache_stride
    dtype = row_ptr.dtype.element_ty

    i = tl.arange(0, BLOCK_C)
    latent = tl.load(down_ptr + Q + i, mask=i < C, other=0.0)
    tl.store(row_ptr + i, _rms_norm(latent, kv_gain_ptr, i, eps, C).to(dtype), mask=i < C)

    HALF: tl.constexpr = R // 2
    i = tl.arange(0, BLOCK_R)
    cos = tl.load(turn_ptr + n * R + 2 * i, mask=i < HALF, other=0.0)
    sin = tl.load(turn_ptr + n * R + 2 * i + 1, mask=i < HALF, other=0.0)
    x = tl.load(down_ptr + Q + C + 2 * i, mask=i < HALF, other=0.0).to(tl.float32)
    y = tl.load(down_ptr + Q + C + 2 * i + 1, mask=i < HALF, other=0.0).to(tl.float32)
    tl.store(row_ptr + C + 2 * i, (x * cos - y * sin).to(dtype), mask=i < HALF)
    tl.store(row_ptr + C + 2 * i + 1, (x * sin + y * cos).to(dtype), mask=i < HALF)

    key_ptr, row_ptr = down_ptr + Q + C + R, row_ptr + C + R
    d = tl.arange(0, BLOCK_D)
    key = tl.load(key_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    mean = tl.sum(key, 0) / D
    rest = tl.where(d < D, key - mean, 0.0)
    factor = tl.rsqrt(tl.sum(rest * rest, 0) / D + eps)
    x = _layer_norm(key_ptr, k_gain_ptr, k_bias_ptr, mean, factor, i, i < HALF)
    y = _layer_norm(key_ptr, k_gain_ptr, k_bias_ptr, mean, factor, HALF + i, i < HALF)
    tl.store(row_ptr + i, (x * cos - y * sin).to(dtype), mask=i < HALF)
    tl.store(row_ptr + HALF + i, (x * sin + y * cos).to(dtype), mask=i < HALF)
    plain = (d >= R) & (d < D)
    tl.store(row_ptr + d, _layer_norm(key_ptr, k_gain_ptr, k_bias_ptr, mean, factor, d, plain).to(dtype), mask=plain)


@triton.jit
def _layer_norm(x_ptr, gain_ptr, bias_ptr, mean, factor, d, mask):
    """Some columns of a layer norm, rounded to the row's type, in float32."""
    x = tl.load(x_ptr + d, mask=mask, other=0.0)
    gain = tl.load(gain_ptr + d, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    return ((x.to(tl.float32) - mean) * factor * gain + bias).to(x.dtype).to(tl.float32)


def latent_rows(
    down_NF: Tensor, q_gain_Q: Tensor, kv_gain_C: Tensor, k_gain_D: Tensor, k_bias_D: Tensor, turn_N1R: Tensor,
    slot_N: Tensor, cache: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Normalise the compressed queries, and write each token's row of the cache: the normed latent, the rope key
    rotated in pairs, the indexer's key normed and rotated in halves.

    Args:
        down_NF: compressed query, latent, rope key and indexer's key, one beside the other.
        turn_N1R: complex rotation of each token, [N, 1, R / 2].
        slot_N: int64 row of the cache; a token with -1 writes none.

    Returns:
        [N, Q].
    """
    N, R = len(down_NF), 2 * turn_N1R.shape[-1]
    Q, C, D = len(q_gain_Q), len(kv_gain_C), len(k_gain_D)
    assert down_NF.shape[1] == Q + C + R + D == cache.shape[1] + Q and down_NF.stride(1) == cache.stride(1) == 1
    assert turn_N1R.is_contiguous() and len(turn_N1R) == len(slot_N) == N and slot_N.is_contiguous() and R <= D
    q_NQ = torch.empty(N, Q, dtype=down_NF.dtype, device=down_NF.device)
    if N:
        blocks = [max(16, triton.next_power_of_2(width)) for width in (Q, C, R // 2, D)]
        _latent_rows_kernel[(N,)](
            down_NF, q_gain_Q, kv_gain_C, k_gain_D, k_bias_D, torch.view_as_real(turn_N1R), slot_N, q_NQ, cache,
            down_NF.stride(0), cache.stride(0), eps, Q, C, R, D, *blocks, num_warps=4,
        )  # fmt: skip
    return q_NQ


@triton.jit
def _rotate_queries_kernel(
    up_ptr, turn_ptr, q_ptr, index_ptr, stride, H: tl.constexpr, NOPE: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    INDEX_H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    up_ptr += n * stride
    HALF: tl.constexpr = R // 2
    i = tl.arange(0, BLOCK_R)
    cos = tl.load(turn_ptr + n * R + 2 * i, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(turn_ptr + n * R + 2 * i + 1, mask=i < HALF, other=0.0)[None, :]

    h = tl.arange(0, BLOCK_H)[:, None]
    mask = (h < H) & (i < HALF)[None, :]
    x_ptr = up_ptr + h * (NOPE + R) + NOPE + 2 * i[None, :]
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + 1, mask=mask, other=0.0).to(tl.float32)
    out_ptr = q_ptr + (n * H + h) * (C + R) + C + 2 * i[None, :]
    dtype = q_ptr.dtype.element_ty
    tl.store(out_ptr, (x * cos - y * sin).to(dtype), mask=mask)
    tl.store(out_ptr + 1, (x * sin + y * cos).to(dtype), mask=mask)

    h, d = tl.arange(0, BLOCK_I)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (h < INDEX_H) & (i < HALF)[None, :]
    head_ptr, out_ptr = up_ptr + H * (NOPE + R) + h * D, index_ptr + (n * INDEX_H + h) * D
    x = tl.load(head_ptr + i[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(head_ptr + HALF + i[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i[None, :], (x * cos - y * sin).to(dtype), mask=mask)
    tl.store(out_ptr + HALF + i[None, :], (x * sin + y * cos).to(dtype), mask=mask)
    plain = (h < INDEX_H) & (d >= R) & (d < D)
    tl.store(out_ptr + d, tl.load(head_ptr + d, mask=plain, other=0.0), mask=plain)


def rotate_queries(up_NF: Tensor, turn_N1R: Tensor, q_NHW: Tensor, nope: int, index_heads: int) -> Tensor:
    """Rotate the rope part of each query into its place in q, and make the indexer's queries.

    Args:
        up_NF: H queries of nope + R, then index_heads of D.
        turn_N1R: complex rotation of each token, [N, 1, R / 2].
        q_NHW: contiguous; its last R columns are written.

    Returns:
        The indexer's queries [N, index_heads, D].
    """
    (N, H, W), R = q_NHW.shape, 2 * turn_N1R.shape[-1]
    D = (up_NF.shape[1] - H * (nope + R)) // index_heads
    assert up_NF.shape == (N, H * (nope + R) + index_heads * D) and up_NF.stride(1) == 1 and q_NHW.is_contiguous()
    assert turn_N1R.is_contiguous() and len(turn_N1R) == N and R <= D, (turn_N1R.shape, D)
    index_NHD = torch.empty(N, index_heads, D, dtype=up_NF.dtype, device=up_NF.device)
    if N:
        blocks = [triton.next_power_of_2(width) for width in (H, index_heads, R // 2, D)]
        _rotate_queries_kernel[(N,)](
            up_NF, torch.view_as_real(turn_N1R), q_NHW, index_NHD, up_NF.stride(0),
            H, nope, W - R, R, index_heads, D, *blocks, num_warps=4,
        )  # fmt: skip
    return index_NHD


@triton.jit
def _route_kernel(
    logit_ptr, bias_ptr, id_ptr, gate_ptr, scale, E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    K: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = E // GROUPS
    g, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    e = g[:, None] * SIZE + s[None, :]
    inside = (g < GROUPS)[:, None] & (s < SIZE)[None, :]
    score = tl.sigmoid(tl.load(logit_ptr + n * E + e, mask=inside, other=0.0))
    choice = tl.where(inside, score + tl.load(bias_ptr + e, mask=inside, other=0.0), float("-inf"))
    if KEPT < GROUPS:
        first_of_group = tl.argmax(choice, 1)
        second = tl.max(tl.where(s[None, :] == first_of_group[:, None], float("-inf"), choice), 1)
        group = tl.where(g < GROUPS, tl.max(choice, 1) + second, float("-inf"))
        kept = tl.zeros((BLOCK_G,), tl.int32)
        for _ in range(0, KEPT):
            first = tl.argmax(group, 0)
            kept = tl.where(g == first, 1, kept)
            group = tl.where(g == first, float("-inf"), group)
        choice = tl.where(kept[:, None] > 0, choice, float("-inf"))

    flat, place, j = tl.reshape(choice, (BLOCK_G * BLOCK_S,)), tl.arange(0, BLOCK_G * BLOCK_S), tl.arange(0, BLOCK_K)
    flat_score = tl.reshape(score, (BLOCK_G * BLOCK_S,))
    ids, gates = tl.zeros((BLOCK_K,), tl.int32), tl.zeros((BLOCK_K,), tl.float32)
    for k in range(0, K):
        best = tl.argmax(flat, 0)
        ids = tl.where(j == k, tl.minimum(best // BLOCK_S * SIZE + best % BLOCK_S, E - 1), ids)
        gates = tl.where(j == k, tl.sum(tl.where(place == best, flat_score, 0.0), 0), gates)
        flat = tl.where(place == best, float("-inf"), flat)
    if NORMALISE:
        gates = gates / (tl.sum(gates, 0) + 1e-20)
    tl.store(id_ptr + n * K + j, ids, mask=j < K)
    tl.store(gate_ptr + n * K + j, gates * scale, mask=j < K)


def route(
    logit_NE: Tensor, bias_E: Tensor, K: int, *, groups: int, groups_kept: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Grouped sigmoid routing, best expert first, of equal ones the lower; the bias takes part in the choice only.

    Returns:
        Expert ids [N, K] int32 and their gate weights [N, K] float32.
    """
    N, E = logit_NE.shape
    assert logit_NE.dtype == bias_E.dtype == torch.float32 and logit_NE.is_contiguous() and E % groups == 0, groups
    ids = torch.empty(N, K, dtype=torch.int32, device=logit_NE.device)
    gates = torch.empty(N, K, dtype=torch.float32, device=logit_NE.device)
    if N:
        blocks = [triton.next_power_of_2(width) for width in (groups, E // groups, K)]
        _route_kernel[(N,)](
            logit_NE, bias_E, ids, gates, scale, E, groups, groups_kept, K, normalise, *blocks, num_warps=1
        )
    return ids, gates
