"""A residual sum and its RMSNorm in one pass over memory. Spec: reference.add_rms_norm.

Shape suffixes: N = tokens, D = hidden width, P = parts of a sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

PARTS = 1024
"""Sums over tokens that the gradient of the weight is first made of."""


@triton.jit
def _add_norm_kernel(x_ptr, y_ptr, weight_ptr, sum_ptr, out_ptr, D, eps, BLOCK_D: tl.constexpr):
    n, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    dtype = sum_ptr.dtype.element_ty
    x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    x = (x + tl.load(y_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)).to(dtype)
    tl.store(sum_ptr + n * D + d, x, mask=d < D)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * D + d, (x * scale * weight).to(dtype), mask=d < D)


@triton.jit
def _norm_gradient_kernel(
    sum_ptr, weight_ptr, dsum_ptr, dout_ptr, dx_ptr, part_ptr, N, D, eps, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Program p of P: tokens p, p + P, ...; the gradient of x and y alike, and this program's share of dweight."""
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for token in range(tl.program_id(0), N, tl.num_programs(0)):
        n = tl.cast(token, tl.int64)
        x = tl.load(sum_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        g = tl.load(dout_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x *= scale
        total += g * x
        g *= weight
        dx = (g - x * (tl.sum(g * x, 0) / D)) * scale
        dx += tl.load(dsum_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dx_ptr + n * D + d, dx.to(dx_ptr.dtype.element_ty), mask=d < D)
    tl.store(part_ptr + tl.program_id(0) * D + d, total, mask=d < D)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, y_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        (N, D), sum_ND, out_ND = x_ND.shape, torch.empty_like(x_ND), torch.empty_like(x_ND)
        BLOCK_D = triton.next_power_of_2(D)
        _add_norm_kernel[N,](x_ND, y_ND, weight_D, sum_ND, out_ND, D, eps, BLOCK_D, num_warps=_warps(BLOCK_D))
        ctx.save_for_backward(sum_ND, weight_D)
        ctx.eps = eps
        return sum_ND, out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum_ND: Tensor, dout_ND: Tensor) -> tuple[Tensor | None, ...]:
        sum_ND, weight_D = ctx.saved_tensors
        (N, D), BLOCK_D, parts = sum_ND.shape, triton.next_power_of_2(sum_ND.shape[1]), min(PARTS, len(sum_ND))
        dx_ND, part_PD = torch.empty_like(sum_ND), sum_ND.new_empty(parts, D, dtype=torch.float32)
        _norm_gradient_kernel[parts,](
            sum_ND, weight_D, dsum_ND.contiguous(), dout_ND.contiguous(), dx_ND, part_PD, N, D, ctx.eps, BLOCK_D,
            num_warps=_warps(BLOCK_D),
        )  # fmt: skip
        return dx_ND, dx_ND, part_PD.sum(0).to(weight_D.dtype), None


def _warps(BLOCK_D: int) -> int:
    return max(1, min(8, BLOCK_D // 256))


def add_rms_norm(x_ND: Tensor, y_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + y, and RMSNorm(s). Differentiable; saves s and the weight.

        out[n, d] = weight[d] * s[n, d] / sqrt(mean_d s[n, d]^2 + eps)

    s is rounded before it is normed, so that both results speak of one sum.

    Returns:
        s and out, both [N, D] in x's dtype.
    """
    assert x_ND.shape == y_ND.shape and x_ND.dtype == y_ND.dtype and weight_D.shape == x_ND.shape[1:]
    if not len(x_ND):
        return x_ND + y_ND, x_ND * weight_D
    return _AddNorm.apply(x_ND.contiguous(), y_ND.contiguous(), weight_D.contiguous(), eps)
