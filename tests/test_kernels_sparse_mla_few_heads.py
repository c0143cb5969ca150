import pytest
import torch
from kernel_checks import FORWARD, GRADIENT, HAS_GPU, poisoned, relative_error

from trimtab.kernels import reference

HOPPER = HAS_GPU and torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
SCALE = 576**-0.5


def inputs(N, H, K, M, dtype, stride=576):
    """The first query has all its keys, the second starts with an unused block, the third has no keys at all."""
    generator = torch.Generator("cuda").manual_seed(N + H + K)
    q_NHC = torch.randn(N, H, 576, device="cuda", generator=generator).to(dtype)
    kv_MC = torch.randn(M, stride, device="cuda", generator=generator).to(dtype)[:, :576]
    grad_NHV = torch.randn(N, H, 512, device="cuda", generator=generator).to(dtype)
    ids_NK = torch.rand(N, M, device="cuda", generator=generator).topk(K).indices.int()
    ids_NK[3:].masked_fill_(torch.rand(N - 3, K, device="cuda", generator=generator) < 0.2, -1)
    ids_NK[1, :64] = -1
    ids_NK[2] = -1
    ids_NK[3, K // 2 :] = -1
    return q_NHC, kv_MC, ids_NK, grad_NHV


def computed(q_NHC, kv_MC, ids_NK, grad_NHV):
    """O, lse, dq and the rows of slots."""
    from trimtab.kernels.hopper import sparse_mla_few_heads as kernels

    assert kernels.supported(q_NHC, kv_MC, 512)
    with poisoned():
        out, lse, dq = torch.empty_like(grad_NHV), q_NHC.new_empty(q_NHC.shape[:2]).float(), torch.empty_like(q_NHC)
        row_EC = q_NHC.new_empty(ids_NK.numel(), 576)
    kernels.forward(q_NHC, kv_MC, ids_NK, SCALE, out, lse)
    delta = (out.float() * grad_NHV.float()).sum(-1)
    kernels.gradients(q_NHC, kv_MC, ids_NK, grad_NHV, lse, delta, SCALE, dq, row_EC)
    return out, lse, dq, row_EC


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [65, 128, 2048])
@pytest.mark.parametrize("H", [1, 16, 17, 32])
def test_output_and_gradients_are_those_of_the_reference(H, K, dtype):
    q_NHC, kv_MC, ids_NK, grad_NHV = inputs(5, H, K, 2500, dtype, stride=640)
    out, lse, dq, row_EC = computed(q_NHC, kv_MC, ids_NK, grad_NHV)
    q, kv = q_NHC.double().requires_grad_(), kv_MC.double().requires_grad_()
    expected_out, expected_lse = reference.sparse_mla(q, kv, ids_NK.long(), 512, SCALE)
    expected_dq, expected_dkv = torch.autograd.grad(expected_out, (q, kv), grad_NHV.double())
    used = ids_NK.flatten() >= 0
    dkv = torch.zeros_like(expected_dkv).index_add_(0, ids_NK.flatten()[used].long(), row_EC[used].double())
    assert relative_error(out, expected_out) < FORWARD[dtype]
    assert relative_error(lse, expected_lse) < FORWARD[dtype]
    assert relative_error(dq, expected_dq) < GRADIENT[dtype]
    assert relative_error(dkv, expected_dkv) < GRADIENT[dtype]
    assert (lse[2] == float("-inf")).all() and not out[2].any() and not dq[2].any()
    assert not row_EC.view(5, K, 576)[1, :64].any()


@pytest.mark.parametrize("H", [16, 32])
def test_results_are_the_same_every_time(H):
    case = inputs(200, H, 1000, 3000, torch.bfloat16)
    used = case[2].flatten() >= 0
    first = None
    for _ in range(25):
        out, lse, dq, row_EC = computed(*case)
        result = (out, lse, dq, row_EC[used])
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))
