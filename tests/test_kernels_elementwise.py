"""Rotary embedding, gated activation and residual norm against their specification in float64."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, FORWARD, GRADIENT, needs_gpu, poisoned, relative_error

from trimtab.kernels import add_norm, reference, rotary, swiglu


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(sum(shape) for shape in shapes))
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def angles(N: int, R: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle_NR = torch.arange(N)[:, None] * 100 ** -(torch.arange(R) / R)
    return angle_NR.cos().to(DEVICE, dtype), angle_NR.sin().to(DEVICE, dtype)


def assert_meets(kernel, spec, inputs: list[torch.Tensor], constants: tuple = ()) -> None:
    """Results and gradients of kernel(*inputs, *constants), those of spec in float64 beside them."""
    dtype = inputs[0].dtype
    with poisoned():
        ours = kernel(*inputs, *constants)
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]
    theirs = spec(*exact, *(x.double().cpu() if isinstance(x, torch.Tensor) else x for x in constants))
    ours, theirs = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (ours, theirs))
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == dtype and relative_error(our, their) < FORWARD[dtype]
    upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) for x in ours]
    with poisoned():
        our_gradients = torch.autograd.grad(ours, inputs, [x.to(DEVICE, dtype) for x in upstream])
    their_gradients = torch.autograd.grad(theirs, exact, [x.to(dtype).double() for x in upstream])
    for our, their in zip(our_gradients, their_gradients, strict=True):
        assert our.dtype == dtype and relative_error(our, their) < GRADIENT[dtype]


SHAPES = [(1, 1, 1, 2), (63, 3, 1, 24), (17, 4, 2, 64), (33, 2, 2, 128)]  # N, query heads, key heads, D


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "Q", "K", "D"), SHAPES)
def test_rotation_equals_its_specification_forward_and_backward(N, Q, K, D, dtype):
    q_NHD, k_NHD = leaves(dtype, (N, Q, D), (N, K, D))
    assert_meets(rotary.rotate_halves, reference.rotate_halves, [q_NHD, k_NHD], angles(N, D // 2, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "Q", "K", "D"), SHAPES)
def test_normed_rotation_equals_its_specification_forward_and_backward(monkeypatch, N, Q, K, D, dtype):
    monkeypatch.setattr(rotary, "PARTS", 3)  # a program then adds up several blocks
    q_NHD, k_NHD, q_D, k_D = leaves(dtype, (N, Q, D), (N, K, D), (D,), (D,))
    cos_NR, sin_NR = angles(N, D // 2, dtype)
    assert_meets(
        lambda q, k, qw, kw, cos, sin: rotary.normed_rotation(q, k, cos, sin, qw, kw, 1e-6),
        lambda q, k, qw, kw, cos, sin: reference.normed_rotation(q, k, cos, sin, qw, kw, 1e-6),
        [q_NHD, k_NHD, q_D, k_D],
        (cos_NR, sin_NR),
    )


def test_queries_and_keys_may_be_parts_of_one_product():
    """Rows of a joint product lie apart: the kernel reads them where they are."""
    (qkv_NF,) = leaves(torch.float32, (9, 8 * 16))
    cos_NR, sin_NR = angles(9, 8, torch.float32)
    q_NHD, k_NHD, _ = qkv_NF.unflatten(-1, (8, 16)).split([4, 2, 2], 1)
    whole = rotary.rotate_halves(q_NHD.contiguous(), k_NHD.contiguous(), cos_NR, sin_NR)
    for ours, theirs in zip(rotary.rotate_halves(q_NHD, k_NHD, cos_NR, sin_NR), whole, strict=True):
        assert torch.equal(ours, theirs)
    ones_D = torch.ones(16, device=DEVICE)
    ours, theirs = (
        torch.autograd.grad(
            sum(x.square().sum() for x in rotary.normed_rotation(q, k, cos_NR, sin_NR, ones_D, ones_D, 0.1)), qkv_NF
        )[0]
        for q, k in ((q_NHD, k_NHD), (q_NHD.contiguous(), k_NHD.contiguous()))
    )
    assert torch.equal(ours, theirs) and ours.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "W"), [(1, 1), (63, 100), (5, 2000)])
def test_swiglu_of_one_product_and_of_two_equals_its_specification(N, W, dtype):
    (gate_up_N2W,) = leaves(dtype, (N, 2 * W))
    assert_meets(swiglu.swiglu, reference.swiglu, [gate_up_N2W])
    gate_NW, up_NW = leaves(dtype, (N, W), (N, W))
    assert_meets(swiglu.gated, lambda gate, up: reference.swiglu(torch.cat([gate, up], -1)), [gate_NW, up_NW])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D"), [(1, 1), (63, 100), (7, 2000)])
def test_a_residual_norm_equals_its_specification_forward_and_backward(monkeypatch, N, D, dtype):
    monkeypatch.setattr(add_norm, "PARTS", 5)
    x_ND, y_ND, weight_D = leaves(dtype, (N, D), (N, D), (D,))
    assert_meets(add_norm.add_rms_norm, reference.add_rms_norm, [x_ND, y_ND, weight_D], (1e-6,))


def test_nothing_in_gives_nothing_out():
    x, cos = torch.zeros(0, 2, 4, device=DEVICE), torch.zeros(0, 2, device=DEVICE)
    assert rotary.rotate_halves(x, x, cos, cos)[0].shape == (0, 2, 4)
    assert swiglu.swiglu(torch.zeros(0, 6, device=DEVICE)).shape == (0, 3)
    assert add_norm.add_rms_norm(x[:, 0], x[:, 0], torch.ones(4, device=DEVICE), 1e-6)[1].shape == (0, 4)


@needs_gpu
def test_rotation_and_activation_round_like_torch():
    """In bf16 within a rounding of each product and of their sum: at most 8, where bf16 is 2**-4 apart."""
    q_NHD, k_NHD = leaves(torch.bfloat16, (300, 8, 128), (300, 2, 128))
    cos_NR, sin_NR = angles(300, 64, torch.bfloat16)
    ours, theirs = (f.rotate_halves(q_NHD, k_NHD, cos_NR, sin_NR) for f in (rotary, reference))
    for rotated, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(rotated, expected, atol=2**-5, rtol=2**-6)
    (gate_up_N2W,) = leaves(torch.bfloat16, (300, 4096))
    same = swiglu.swiglu(gate_up_N2W) == reference.swiglu(gate_up_N2W)
    assert same.float().mean() > 0.999  # the exponentials differ in their last bit


@needs_gpu
def test_repeated_runs_are_bitwise_equal_at_size():
    q_NHD, k_NHD, q_D, k_D = leaves(torch.bfloat16, (20000, 16, 128), (20000, 8, 128), (128,), (128,))
    x_ND, y_ND, w_D = leaves(torch.bfloat16, (20000, 1024), (20000, 1024), (1024,))
    cos_NR, sin_NR = angles(20000, 64, torch.bfloat16)
    first = None
    for _ in range(10):
        rotated = rotary.normed_rotation(q_NHD, k_NHD, cos_NR, sin_NR, q_D, k_D, 1e-6)
        normed = add_norm.add_rms_norm(x_ND, y_ND, w_D, 1e-6)
        inputs = [q_NHD, k_NHD, q_D, k_D, x_ND, y_ND, w_D]
        results = [*rotated, *normed]
        results += torch.autograd.grad(sum(x.float().square().sum() for x in results), inputs)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
