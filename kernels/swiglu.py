"""The gated activation of SwiGLU in one pass over memory. Spec: reference.swiglu.

Shape suffixes: N = rows, W = width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, row, W, BLOCK: tl.constexpr):
    n, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + n * row + i, mask=i < W, other=0.0)
    up = tl.load(up_ptr + n * row + i, mask=i < W, other=0.0)
    g = gate.to(tl.float32)
    activated = (g / (1.0 + tl.exp(-g))).to(gate.dtype)  # rounded where torch and vLLM round
    tl.store(out_ptr + n * W + i, activated * up, mask=i < W)


@triton.jit
def _swiglu_gradient_kernel(gate_ptr, up_ptr, dout_ptr, dgate_ptr, dup_ptr, row, drow, W, BLOCK: tl.constexpr):
    n, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + n * row + i, mask=i < W, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + n * row + i, mask=i < W, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + n * W + i, mask=i < W, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dout * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_ptr + n * drow + i, dgate.to(dgate_ptr.dtype.element_ty), mask=i < W)
    tl.store(dup_ptr + n * drow + i, (dout * gate * sigmoid).to(dup_ptr.dtype.element_ty), mask=i < W)


def _forward(gate_NW: Tensor, up_NW: Tensor) -> Tensor:
    (N, W), out_NW = gate_NW.shape, gate_NW.new_empty(gate_NW.shape)
    _swiglu_kernel[N, triton.cdiv(W, BLOCK)](gate_NW, up_NW, out_NW, gate_NW.stride(0), W, BLOCK)
    return out_NW


def _gradient(gate_NW: Tensor, up_NW: Tensor, dout_NW: Tensor, dgate_NW: Tensor, dup_NW: Tensor) -> None:
    (N, W), row, drow = gate_NW.shape, gate_NW.stride(0), dgate_NW.stride(0)
    _swiglu_gradient_kernel[N, triton.cdiv(W, BLOCK)](
        gate_NW, up_NW, dout_NW.contiguous(), dgate_NW, dup_NW, row, drow, W, BLOCK
    )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NW: Tensor, up_NW: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NW, up_NW)
        return _forward(gate_NW, up_NW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NW: Tensor) -> tuple[Tensor, Tensor]:
        gate_NW, up_NW = ctx.saved_tensors
        dgate_NW, dup_NW = torch.empty_like(gate_NW), torch.empty_like(up_NW)
        _gradient(gate_NW, up_NW, dout_NW, dgate_NW, dup_NW)
        return dgate_NW, dup_NW


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2W: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_N2W)
        return _forward(*gate_up_N2W.chunk(2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NW: Tensor) -> Tensor:
        (gate_up_N2W,) = ctx.saved_tensors
        d_N2W = torch.empty_like(gate_up_N2W)
        (gate_NW, up_NW), (dgate_NW, dup_NW) = gate_up_N2W.chunk(2, -1), d_N2W.chunk(2, -1)
        _gradient(gate_NW, up_NW, dout_NW, dgate_NW, dup_NW)
        return d_N2W


def gated(gate_NW: Tensor, up_NW: Tensor) -> Tensor:
    """silu(gate) * up of two products. Differentiable; saves its inputs and nothing else.

    Returns:
        [N, W] in the inputs' dtype.
    """
    assert gate_NW.shape == up_NW.shape and gate_NW.dtype == up_NW.dtype and gate_NW.dim() == 2
    if not gate_NW.numel():
        return gate_NW * up_NW
    return _Gated.apply(gate_NW.contiguous(), up_NW.contiguous())


def swiglu(gate_up_N2W: Tensor) -> Tensor:
    """silu(gate) * up of one product that holds both, as stacked experts do.

        out[n, i] = silu(x[n, i]) * x[n, W + i]

    Differentiable; saves its input and nothing else.

    Returns:
        [N, W] in x's dtype.
    """
    assert gate_up_N2W.dim() == 2 and gate_up_N2W.shape[1] % 2 == 0
    if not gate_up_N2W.numel():
        gate_NW, up_NW = gate_up_N2W.chunk(2, -1)
        return gate_NW * up_NW
    return _Swiglu.apply(gate_up_N2W.contiguous())
