"""The gated activation of SwiGLU in one pass over memory. Spec: reference.swiglu.

Shape suffixes: N = rows, I = width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024


@triton.jit
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, row, I, BLOCK: tl.constexpr):
    n, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + n * row + i, mask=i < I, other=0.0)
    up = tl.load(up_ptr + n * row + i, mask=i < I, other=0.0)
    g = gate.to(tl.float32)
    activated = (g / (1.0 + tl.exp(-g))).to(gate.dtype)  # rounded where torch and vLLM round
    tl.store(out_ptr + n * I + i, activated * up, mask=i < I)


@triton.jit
def _swiglu_gradient_kernel(gate_ptr, up_ptr, dout_ptr, dgate_ptr, dup_ptr, row, drow, I, BLOCK: tl.constexpr):
    n, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + n * row + i, mask=i < I, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + n * row + i, mask=i < I, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + n * I + i, mask=i < I, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dout * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_ptr + n * drow + i, dgate.to(dgate_ptr.dtype.element_ty), mask=i < I)
    tl.store(dup_ptr + n * drow + i, (dout * gate * sigmoid).to(dup_ptr.dtype.element_ty), mask=i < I)


def _forward(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    (N, I), out_NI = gate_NI.shape, gate_NI.new_empty(gate_NI.shape)
    _swiglu_kernel[N, triton.cdiv(I, BLOCK)](gate_NI, up_NI, out_NI, gate_NI.stride(0), I, BLOCK)
    return out_NI


def _gradient(gate_NI: Tensor, up_NI: Tensor, dout_NI: Tensor, dgate_NI: Tensor, dup_NI: Tensor) -> None:
    (N, I), row, drow = gate_NI.shape, gate_NI.stride(0), dgate_NI.stride(0)
    _swiglu_gradient_kernel[N, triton.cdiv(I, BLOCK)](
        gate_NI, up_NI, dout_NI.contiguous(), dgate_NI, dup_NI, row, drow, I, BLOCK
    )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NI: Tensor, up_NI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NI, up_NI)
        return _forward(gate_NI, up_NI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NI: Tensor) -> tuple[Tensor, Tensor]:
        gate_NI, up_NI = ctx.saved_tensors
        dgate_NI, dup_NI = torch.empty_like(gate_NI), torch.empty_like(up_NI)
        _gradient(gate_NI, up_NI, dout_NI, dgate_NI, dup_NI)
        return dgate_NI, dup_NI


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2I: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_N2I)
        return _forward(*gate_up_N2I.chunk(2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NI: Tensor) -> Tensor:
        (gate_up_N2I,) = ctx.saved_tensors
        d_N2I = torch.empty_like(gate_up_N2I)
        _gradient(*gate_up_N2I.chunk(2, -1), dout_NI, *d_N2I.chunk(2, -1))
        return d_N2I


def gated(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) * up of two products. Differentiable; saves its inputs and nothing else.

    Returns:
        [N, I] in the inputs' dtype.
    """
    assert gate_NI.shape == up_NI.shape and gate_NI.dtype == up_NI.dtype and gate_NI.dim() == 2
    if not gate_NI.numel():
        return gate_NI * up_NI
    return _Gated.apply(gate_NI.contiguous(), up_NI.contiguous())


def swiglu(gate_up_N2I: Tensor) -> Tensor:
    """silu(gate) * up of one product that holds both, as stacked experts do.

        out[n, i] = silu(x[n, i]) * x[n, I + i]

    Differentiable; saves its input and nothing else.

    Returns:
        [N, I] in x's dtype.
    """
    assert gate_up_N2I.dim() == 2 and gate_up_N2I.shape[1] % 2 == 0
    if not gate_up_N2I.numel():
        gate_NI, up_NI = gate_up_N2I.chunk(2, -1)
        return gate_NI * up_NI
    return _Swiglu.apply(gate_up_N2I.contiguous())
