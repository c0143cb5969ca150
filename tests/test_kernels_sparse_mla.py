import pytest
import torch
from kernel_checks import DEVICE, DTYPES, FORWARD, GRADIENT, needs_gpu, poisoned, relative_error

from trimtab.kernels import reference
from trimtab.kernels import sparse_mla as kernels
from trimtab.kernels.sparse_mla import sparse_mla

SIZES = [  # N, H, K, M, value, rope
    (1, 1, 64, 70, 32, 16),
    (4, 3, 64, 20, 24, 16),  # more slots than keys, widths that are no powers of two
    (3, 16, 100, 120, 32, 16),
    (3, 40, 64, 70, 32, 8),
]
if DEVICE == "cuda":
    SIZES += [
        (63, 16, 512, 900, 512, 64),
        (63, 32, 512, 900, 512, 64),
        (130, 64, 192, 700, 512, 64),
        (33, 128, 256, 700, 512, 64),
    ]


def random_ids(N, K, M, seed=0):
    """Distinct keys in each row with -1 anywhere; one query in four has none, another's first 64 slots are unused."""
    generator = torch.Generator().manual_seed(seed)
    ids_NK = torch.full((N, K), -1)
    for n in range(N):
        ids_NK[n, : min(K, M)] = torch.randperm(M, generator=generator)[:K]
    ids_NK = ids_NK.masked_fill(torch.rand(ids_NK.shape, generator=generator) < 0.2, -1)
    ids_NK[1::4] = -1
    ids_NK[2::4, : min(64, K - 8)] = -1
    return ids_NK.int().to(DEVICE)


def inputs(N, H, K, M, value, rope, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q_NHC = torch.randn(N, H, value + rope, generator=generator).to(DEVICE, dtype).requires_grad_()
    kv_MC = torch.randn(M, value + rope, generator=generator).to(DEVICE, dtype).requires_grad_()
    grad_NHV = torch.randn(N, H, value, generator=generator).to(DEVICE, dtype)
    return q_NHC, kv_MC, random_ids(N, K, M, seed), grad_NHV


def expected(q_NHC, kv_MC, ids_NK, grad_NHV, scale):
    q, kv = q_NHC.detach().double().requires_grad_(), kv_MC.detach().double().requires_grad_()
    out, lse = reference.sparse_mla(q, kv, ids_NK.long(), grad_NHV.shape[-1], scale)
    return out, lse, *torch.autograd.grad(out, (q, kv), grad_NHV.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_output_and_gradients_are_those_of_the_reference(size, dtype):
    q_NHC, kv_MC, ids_NK, grad_NHV = inputs(*size, dtype)
    scale = (size[-1] + size[-2]) ** -0.5
    out, lse, dq, dkv = expected(q_NHC, kv_MC, ids_NK, grad_NHV, scale)
    with poisoned():
        result, result_lse = sparse_mla(q_NHC, kv_MC, ids_NK, size[-2], scale)
        result_dq, result_dkv = torch.autograd.grad(result, (q_NHC, kv_MC), grad_NHV)
    assert result.dtype == dtype and result_lse.dtype == torch.float32 and not result_lse.requires_grad
    assert relative_error(result, out) < FORWARD[dtype]
    assert relative_error(result_lse, lse) < FORWARD[dtype]
    assert relative_error(result_dq, dq) < GRADIENT[dtype]
    assert relative_error(result_dkv, dkv) < GRADIENT[dtype]


def test_queries_without_keys_give_zero_and_no_gradient():
    q_NHC, kv_MC, ids_NK, grad_NHV = inputs(2, 2, 32, 40, 32, 16, torch.float32)
    with poisoned():
        out, lse = sparse_mla(q_NHC, kv_MC, torch.full_like(ids_NK, -1), 32, 1.0)
        dq, dkv = torch.autograd.grad(out, (q_NHC, kv_MC), grad_NHV)
    assert (lse == float("-inf")).all()
    assert not out.any() and not dq.any() and not dkv.any()


@pytest.mark.parametrize("splits", [2, 9])
def test_keys_split_over_programs_give_the_same_attention(splits):
    q_NHC, kv_MC, ids_NK, _ = inputs(3, 3, 130, 150, 32, 16, torch.float32)
    whole, whole_lse = kernels._forward(q_NHC, kv_MC, ids_NK, 32, 0.2, splits=1)
    with poisoned():
        split, split_lse = kernels._forward(q_NHC, kv_MC, ids_NK, 32, 0.2, splits=splits)
    assert relative_error(split, whole) < 1e-6
    assert relative_error(split_lse, whole_lse) < 1e-6


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoding_step_reads_on_the_device_how_many_ids_are_used(splits, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_splits", lambda *_: splits)
    q_NHC, kv_MC, _, _ = inputs(4, 3, 130, 150, 32, 16, dtype)
    used_N = torch.tensor([130, 0, 1, 65], dtype=torch.int32, device=DEVICE)
    ids_NK = torch.rand(4, 150).argsort(-1)[:, :130].int().to(DEVICE)
    used_NK = ids_NK.masked_fill(torch.arange(130, device=DEVICE) >= used_N[:, None], -1)
    out, _ = reference.sparse_mla(q_NHC.detach().double(), kv_MC.detach().double(), used_NK.long(), 32, 0.2)
    with poisoned():
        result = kernels.decode_mla(q_NHC, kv_MC, ids_NK, used_N, 32, 0.2)  # ids after the used ones mean nothing
        again = kernels.decode_mla(q_NHC, kv_MC, used_NK, torch.full_like(used_N, 200), 32, 0.2)
    assert relative_error(result, out) < FORWARD[dtype] and not result.requires_grad and not result[1].any()
    assert torch.equal(result, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unused_slot_reads_no_row(dtype):
    q_NHC, kv_MC, ids_NK, grad_NHV = inputs(4, 3, 64, 70, 24, 16, dtype)
    ids_NK = ids_NK.masked_fill(ids_NK == 0, -1)
    kv_MC = kv_MC.detach()
    kv_MC[0] = float("nan")
    kv_MC.requires_grad_()
    with poisoned():
        out, _ = sparse_mla(q_NHC, kv_MC, ids_NK, 24, 0.2)
        dq, dkv = torch.autograd.grad(out, (q_NHC, kv_MC), grad_NHV)
    assert out.isfinite().all() and dq.isfinite().all() and dkv.isfinite().all()


def test_rows_may_be_a_view_of_a_wider_cache():
    q_NHC, kv_MC, ids_NK, grad_NHV = inputs(2, 2, 32, 70, 32, 16, torch.float32)
    view_MC = torch.randn(70, 100, device=DEVICE)[:, 20:68].copy_(kv_MC.detach()).requires_grad_()
    assert view_MC.stride(0) == 100
    out, _ = sparse_mla(q_NHC, kv_MC, ids_NK, 32, 0.2)
    out_view, _ = sparse_mla(q_NHC, view_MC, ids_NK, 32, 0.2)
    assert torch.equal(out_view, out)
    assert torch.equal(
        torch.autograd.grad(out_view, view_MC, grad_NHV)[0], torch.autograd.grad(out, kv_MC, grad_NHV)[0]
    )


def test_gradients_do_not_need_all_queries_at_once(monkeypatch):
    q_NHC, kv_MC, ids_NK, grad_NHV = inputs(5, 2, 32, 40, 32, 16, torch.float32)
    out, _ = sparse_mla(q_NHC, kv_MC, ids_NK, 32, 0.2)
    whole = torch.autograd.grad(out, (q_NHC, kv_MC), grad_NHV, retain_graph=True)
    monkeypatch.setattr(kernels, "WORKSPACE", 32 * (48 + 2) * 4 * 2)  # two queries
    with poisoned():
        parts = torch.autograd.grad(out, (q_NHC, kv_MC), grad_NHV)
    assert torch.equal(parts[0], whole[0])
    assert relative_error(parts[1], whole[1]) < 1e-6


def test_what_does_not_fit_is_refused():
    q_NHC, kv_MC, ids_NK, _ = inputs(3, 2, 64, 70, 32, 16, torch.float32)
    for bad in (
        (q_NHC, kv_MC[:, :40], ids_NK, 32),
        (q_NHC, kv_MC.half(), ids_NK, 32),
        (q_NHC, kv_MC, ids_NK[:2], 32),
        (q_NHC, kv_MC, ids_NK, 49),
    ):
        with pytest.raises(ValueError):
            sparse_mla(*bad, 1.0)


@needs_gpu
@pytest.mark.parametrize("H", [16, 64, 128])
def test_gradients_are_the_same_every_time(H):
    q_NHC, kv_MC, ids_NK, grad_NHV = inputs(200, H, 1024, 3000, 512, 64, torch.bfloat16)
    first = None
    for _ in range(25):
        out, lse = sparse_mla(q_NHC, kv_MC, ids_NK, 512, 0.05)
        result = (out, lse, *torch.autograd.grad(out, (q_NHC, kv_MC), grad_NHV))
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))
