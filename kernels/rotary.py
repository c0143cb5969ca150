"""Rotary position embedding of queries and keys in one launch, with the norm of each head before it where there is one.
Spec: reference.rotate_halves, reference.normed_rotation.

Shape suffixes: N = tokens, H = heads of queries and keys together, D = head width, R = its half, P = parts of a sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_N = 16
PARTS = 1024
"""Sums over tokens that the gradient of a norm's weight is first made of."""


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr,
    q_row, k_row, N, Q, K, R, eps, sign,
    NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, head): x rotated by sign times the angle."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    h, r = tl.program_id(1), tl.arange(0, BLOCK_R)[None]
    live = (n < N) & (r < R)
    if h < Q:
        x, out, weight = q_ptr + n * q_row + h * 2 * R + r, q_out_ptr + (n * Q + h) * 2 * R + r, q_weight_ptr + r
    else:
        h -= Q
        x, out, weight = k_ptr + n * k_row + h * 2 * R + r, k_out_ptr + (n * K + h) * 2 * R + r, k_weight_ptr + r
    dtype = q_out_ptr.dtype.element_ty
    first = tl.load(x, mask=live, other=0.0).to(tl.float32)
    second = tl.load(x + R, mask=live, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * R) + eps)[:, None]
        first = (first * scale * tl.load(weight, mask=r < R, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        second = (second * scale * tl.load(weight + R, mask=r < R, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    cos = tl.load(cos_ptr + n * R + r, mask=live, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + n * R + r, mask=live, other=0.0).to(tl.float32) * sign
    # each product rounded, as torch and vLLM do in half precision, as far as the compiler does not fuse them
    a = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    b = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    tl.store(out, a.to(dtype), mask=live)
    tl.store(out + R, b.to(dtype), mask=live)


@triton.jit
def _norm_gradient_kernel(
    x_ptr, cos_ptr, sin_ptr, weight_ptr, dout_ptr, dx_ptr, part_ptr, row, N, H, R, eps,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program p of P: rows of (token, head) p, p + P, ... in blocks; dx, and this program's share of dweight."""
    r = tl.arange(0, BLOCK_R)[None]
    w_first = tl.load(weight_ptr + r, mask=r < R, other=0.0).to(tl.float32)
    w_second = tl.load(weight_ptr + R + r, mask=r < R, other=0.0).to(tl.float32)
    sum_first = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    sum_second = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N * H, BLOCK_N), tl.num_programs(0)):
        i = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        n, live = i // H, (i < N * H) & (r < R)
        x = x_ptr + n * row + (i % H) * 2 * R + r
        first = tl.load(x, mask=live, other=0.0).to(tl.float32)
        second = tl.load(x + R, mask=live, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + n * R + r, mask=live, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + n * R + r, mask=live, other=0.0).to(tl.float32)
        d_first = tl.load(dout_ptr + i * 2 * R + r, mask=live, other=0.0).to(tl.float32)
        d_second = tl.load(dout_ptr + i * 2 * R + R + r, mask=live, other=0.0).to(tl.float32)
        g_first, g_second = d_first * cos + d_second * sin, d_second * cos - d_first * sin
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * R) + eps)[:, None]
        first, second = first * scale, second * scale
        sum_first += g_first * first
        sum_second += g_second * second
        g_first, g_second = g_first * w_first, g_second * w_second
        mean = ((tl.sum(g_first * first, 1) + tl.sum(g_second * second, 1)) / (2 * R))[:, None]
        dtype = dx_ptr.dtype.element_ty
        tl.store(dx_ptr + i * 2 * R + r, ((g_first - first * mean) * scale).to(dtype), mask=live)
        tl.store(dx_ptr + i * 2 * R + R + r, ((g_second - second * mean) * scale).to(dtype), mask=live)
    part = part_ptr + tl.program_id(0) * 2 * R + tl.arange(0, BLOCK_R)
    tl.store(part, tl.sum(sum_first, 0), mask=tl.arange(0, BLOCK_R) < R)
    tl.store(part + R, tl.sum(sum_second, 0), mask=tl.arange(0, BLOCK_R) < R)


def _rotate(
    q_NHD: Tensor,
    k_NHD: Tensor,
    cos_NR: Tensor,
    sin_NR: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    sign: int,
) -> tuple[Tensor, Tensor]:
    (N, Q, _), K, R = q_NHD.shape, k_NHD.shape[1], cos_NR.shape[1]
    q_out, k_out = q_NHD.new_empty(q_NHD.shape), k_NHD.new_empty(k_NHD.shape)
    q_weight, k_weight = weights or (q_NHD, k_NHD)
    _rotate_kernel[triton.cdiv(N, BLOCK_N), Q + K](
        q_NHD, k_NHD, cos_NR, sin_NR, q_weight, k_weight, q_out, k_out,
        q_NHD.stride(0), k_NHD.stride(0), N, Q, K, R, eps, sign,
        weights is not None, BLOCK_N, triton.next_power_of_2(R),
    )  # fmt: skip
    return q_out, k_out


def _norm_gradient(
    x_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, weight_D: Tensor, dout_NHD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    (N, H, D), R = x_NHD.shape, cos_NR.shape[1]
    parts = min(PARTS, triton.cdiv(N * H, BLOCK_N))
    dx_NHD, part_PD = x_NHD.new_empty(x_NHD.shape), x_NHD.new_empty(parts, D, dtype=torch.float32)
    _norm_gradient_kernel[parts,](
        x_NHD, cos_NR, sin_NR, weight_D, dout_NHD.contiguous(), dx_NHD, part_PD, x_NHD.stride(0), N, H, R, eps,
        BLOCK_N, triton.next_power_of_2(R),
    )  # fmt: skip
    return dx_NHD, part_PD.sum(0).to(weight_D.dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_NR, sin_NR)
        return _rotate(q_NHD, k_NHD, cos_NR, sin_NR, None, 0.0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_NHD: Tensor, dk_NHD: Tensor) -> tuple[Tensor | None, ...]:
        cos_NR, sin_NR = ctx.saved_tensors
        return *_rotate(dq_NHD.contiguous(), dk_NHD.contiguous(), cos_NR, sin_NR, None, 0.0, -1), None, None


class _NormedRotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NHD: Tensor, k_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, q_D: Tensor, k_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q_NHD, k_NHD, cos_NR, sin_NR, q_D, k_D)
        ctx.eps = eps
        return _rotate(q_NHD, k_NHD, cos_NR, sin_NR, (q_D, k_D), eps, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_NHD: Tensor, dk_NHD: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NHD, cos_NR, sin_NR, q_D, k_D = ctx.saved_tensors
        dq_NHD, dq_D = _norm_gradient(q_NHD, cos_NR, sin_NR, q_D, dq_NHD, ctx.eps)
        dk_NHD, dk_D = _norm_gradient(k_NHD, cos_NR, sin_NR, k_D, dk_NHD, ctx.eps)
        return dq_NHD, dk_NHD, None, None, dq_D, dk_D, None


def _rows(x_NHD: Tensor) -> Tensor:
    """x with its heads side by side in each row; rows may lie apart."""
    _, H, D = x_NHD.shape
    return x_NHD if x_NHD.stride()[1:] == (D, 1) or (H == 1 and x_NHD.stride(2) == 1) else x_NHD.contiguous()


def rotate_halves(q_NHD: Tensor, k_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE of queries and keys that pairs element i with i + R, over the whole head. Differentiable; saves the angles.

    [Su et al., RoFormer, 2021]. Keys may have fewer heads. The angles carry no gradient.

    Returns:
        Two tensors of the inputs' shapes and dtype.
    """
    _check(q_NHD, k_NHD, cos_NR, sin_NR)
    if not len(q_NHD):
        return q_NHD, k_NHD
    return _Rotation.apply(_rows(q_NHD), _rows(k_NHD), cos_NR.contiguous(), sin_NR.contiguous())


def normed_rotation(
    q_NHD: Tensor, k_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """rotate_halves of RMSNorm(q) and RMSNorm(k), each head for itself, as Qwen3 has it. The angles carry no gradient.

    Differentiable; saves its inputs, and norms them again in the backward pass.

    Returns:
        Two tensors of the inputs' shapes and dtype.
    """
    _check(q_NHD, k_NHD, cos_NR, sin_NR)
    assert q_weight_D.shape == k_weight_D.shape == q_NHD.shape[2:]
    if not len(q_NHD):
        return q_NHD, k_NHD
    q_NHD, k_NHD = _rows(q_NHD), _rows(k_NHD)
    return _NormedRotation.apply(
        q_NHD, k_NHD, cos_NR.contiguous(), sin_NR.contiguous(), q_weight_D.contiguous(), k_weight_D.contiguous(), eps
    )


def _check(q_NHD: Tensor, k_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> None:
    (N, _, D), R = q_NHD.shape, cos_NR.shape[-1]
    assert k_NHD.shape[0] == N and k_NHD.shape[2] == D == 2 * R, (q_NHD.shape, k_NHD.shape, cos_NR.shape)
    assert cos_NR.shape == sin_NR.shape == (N, R) and q_NHD.dtype == k_NHD.dtype
