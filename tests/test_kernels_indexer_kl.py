"""The indexer's target and dense warm-up loss, against the plain reference in float64."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, FORWARD, GRADIENT, needs_gpu, poisoned, relative_error
from torch import Tensor

from trimtab.kernels import indexer_kl, reference
from trimtab.kernels.hopper import indexer_kl as indexer_kl_hopper
from trimtab.kernels.indexer_kl import dense_indexer_kl, dense_prob, sparse_prob


def causal_ranges(*lengths: int) -> tuple[Tensor, Tensor]:
    """Ranges of packed sequences: from the sequence's start to the token itself."""
    start_N = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    return start_N.int().to(DEVICE), torch.arange(1, sum(lengths) + 1, dtype=torch.int32, device=DEVICE)


def uneven_ranges() -> tuple[Tensor, Tensor]:
    """Neither causal nor in order; two are empty."""
    start_N = torch.tensor([70, 9, 35, 5, 90, 64, 3], dtype=torch.int32, device=DEVICE)
    return start_N, torch.tensor([99, 4, 64, 6, 90, 97, 98], dtype=torch.int32, device=DEVICE)


def visible(start_N: Tensor, end_N: Tensor, M: int) -> Tensor:
    position_M = torch.arange(M, device=start_N.device)
    return (position_M >= start_N[:, None]) & (position_M < end_N[:, None])


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M", "H", "C", "K"), [(1, 40, 1, 16, 8), (5, 70, 3, 48, 64), (3, 200, 40, 40, 100)])
def test_sparse_probabilities_match_the_reference_and_unused_ids_are_zero(N, M, H, C, K, dtype):
    torch.manual_seed(0)
    q, kv = random(N, H, C, dtype=dtype), random(M, C + 8, dtype=dtype)[:, :C]
    ids_NK = torch.stack([torch.randperm(max(M, K), device=DEVICE)[:K] for _ in range(N)])
    ids_NK = ids_NK.masked_fill((ids_NK >= M) | (torch.rand(N, K, device=DEVICE) < 0.2), -1)
    ids_NK[-1] = -1 if N > 1 else ids_NK[-1]
    _, lse64 = reference.sparse_mla(q.double(), kv.double(), ids_NK, C, C**-0.5)
    with poisoned():
        prob = sparse_prob(q, kv, ids_NK.int(), lse64.float(), C**-0.5)
    expected = reference.sparse_prob(q.double(), kv.double(), ids_NK, lse64, C**-0.5)
    assert relative_error(prob, expected) < FORWARD[dtype]
    assert torch.equal(prob[ids_NK < 0], torch.zeros_like(prob[ids_NK < 0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "D"), [(1, 12), (3, 24), (5, 16)])
def test_dense_probabilities_match_the_reference_and_invisible_keys_are_zero(H, D, dtype):
    torch.manual_seed(0)
    for start_N, end_N in (causal_ranges(20, 1, 22), torch.stack(uneven_ranges(), 1).unbind(1)):  # strided
        N, M = len(start_N), int(end_N.max())
        q, k = random(N, H, D, dtype=dtype), random(M, H, D, dtype=dtype)
        seen_NM = visible(start_N, end_N, M)
        score_NHM = torch.einsum("nhd,mhd->nhm", q.double(), k.double()) * D**-0.5
        lse_NH = score_NHM.masked_fill(~seen_NM[:, None], float("-inf")).logsumexp(-1).float()
        with poisoned():
            prob = dense_prob(q, k, lse_NH, start_N, end_N, D**-0.5)
        expected = reference.masked_prob(q.double(), k.double(), seen_NM, D**-0.5).sum(0).masked_fill(~seen_NM, 0.0)
        assert relative_error(prob, expected) < FORWARD[dtype]
        assert torch.equal(prob[~seen_NM], torch.zeros_like(prob[~seen_NM]))


def worst_error(
    start_N: Tensor, end_N: Tensor, index_heads: int, index_dim: int, H: int, D: int, dtype: torch.dtype
) -> float:
    """The largest error of dense_indexer_kl and its gradients against float64; 1 is the most that is allowed."""
    N, M = len(start_N), int(end_N.max())
    index_q, index_k = random(N, index_heads, index_dim, dtype=dtype), random(M, index_dim, dtype=dtype)
    index_w = random(N, index_heads, dtype=torch.float32) * index_heads**-0.5 * index_dim**-0.5
    q, k = random(N, H, D, dtype=dtype), random(M, H, D, dtype=dtype)
    seen_NM = visible(start_N, end_N, M)
    score_NHM = torch.einsum("nhd,mhd->nhm", q.double(), k.double()) * D**-0.5
    lse_NH = score_NHM.masked_fill(~seen_NM[:, None], float("-inf")).logsumexp(-1).float()

    inputs = [x.requires_grad_() for x in (index_q, index_k, index_w)]
    with poisoned():
        kl = dense_indexer_kl(*inputs, q, k, lse_NH, start_N, end_N, D**-0.5)
        grads = torch.autograd.grad(kl.sum() / 7, inputs)

    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    # reference.index_scores and indexer_kl compute in fp32: the same in float64
    dot_NHM = torch.einsum("nhd,md->nhm", inputs64[0], inputs64[1]).relu()
    score_NM = torch.einsum("nh,nhm->nm", inputs64[2], dot_NHM).masked_fill(~seen_NM, -1e300)
    prob_NM = reference.masked_prob(q.double(), k.double(), seen_NM, D**-0.5).double().sum(0) * seen_NM
    target_NM = prob_NM / prob_NM.sum(-1, keepdim=True).clamp(min=1e-300)
    expected = (torch.special.xlogy(target_NM, target_NM) - target_NM * score_NM.log_softmax(-1)).sum(-1)
    expected_grads = torch.autograd.grad(expected.sum() / 7, inputs64)
    assert relative_error(reference.indexer_kl(score_NM, prob_NM, seen_NM), expected) < 1e-5
    errors = [relative_error(*pair) / GRADIENT[dtype] for pair in zip(grads, expected_grads, strict=True)]
    return max(relative_error(kl, expected) / FORWARD[dtype], *errors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("index_heads", "index_dim", "H", "D"), [(1, 16, 1, 16), (3, 8, 2, 24), (70, 16, 1, 12)])
def test_the_dense_loss_and_its_gradients_match_float64(index_heads, index_dim, H, D, dtype, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(indexer_kl, "SCORES_AT_ONCE", 43 * 28)  # chunks that cut a sequence
    assert worst_error(*causal_ranges(19, 1, 23), index_heads, index_dim, H, D, dtype) < 1


def test_ranges_need_not_be_causal_or_ordered_and_a_query_without_keys_gives_zero():
    torch.manual_seed(2)
    start_N, end_N = uneven_ranges()
    assert worst_error(start_N, end_N, 4, 16, 2, 16, torch.float32) < 1
    empty_N = torch.zeros_like(start_N)
    index_q, index_k = torch.randn(7, 2, 16, device=DEVICE), torch.randn(9, 16, device=DEVICE, requires_grad=True)
    q, k = torch.randn(7, 1, 16, device=DEVICE), torch.randn(9, 1, 16, device=DEVICE)
    lse = torch.full((7, 1), float("-inf"), device=DEVICE)
    kl = dense_indexer_kl(index_q, index_k, index_q[:, :, 0], q, k, lse, empty_N, empty_N, 1.0)
    (grad,) = torch.autograd.grad(kl.sum(), index_k)
    assert torch.equal(kl, torch.zeros_like(kl)) and torch.equal(grad, torch.zeros_like(grad))


def test_only_queries_with_keys_must_weigh_the_same():
    index_q, index_k = torch.randn(3, 2, 16, device=DEVICE), torch.randn(3, 16, device=DEVICE, requires_grad=True)
    q, lse = torch.randn(3, 1, 16, device=DEVICE), torch.zeros(3, 1, device=DEVICE)
    start_N, end_N = causal_ranges(3)
    start_N[1] = end_N[1]
    kl = dense_indexer_kl(index_q, index_k, index_q[:, :, 0], q, q, lse, start_N, end_N, 1.0)
    weights = (torch.tensor(x, device=DEVICE) for x in ([2.0, 0.0, 2.0], [1.0, 1.0, 1.0], [2.0, 2.0, 1.0]))
    twice, once, uneven = ((kl * w).sum() for w in weights)
    (grad,) = torch.autograd.grad(twice, index_k, retain_graph=True)
    (half,) = torch.autograd.grad(once, index_k, retain_graph=True)
    assert torch.equal(grad, 2 * half) and grad.abs().max() > 0
    with pytest.raises(ValueError, match="empty range"):
        torch.autograd.grad(uneven, index_k)


@needs_gpu
@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("H", [1, 16, 40, 64, 128])
def test_sparse_probabilities_match_at_full_width(H, hopper, monkeypatch):
    torch.manual_seed(3)
    if not hopper:
        monkeypatch.setattr(indexer_kl_hopper, "supported", lambda q, widths: False)
    q, kv = random(20, H, 576, dtype=torch.bfloat16), random(5000, 576, dtype=torch.bfloat16)
    ids_NK = torch.randint(-1, 5000, (20, 1000), device=DEVICE)
    ids_NK[3, 100:], ids_NK[4] = -1, -1
    _, lse64 = reference.sparse_mla(q.double(), kv.double(), ids_NK, 512, 0.04)
    expected = reference.sparse_prob(q.double(), kv.double(), ids_NK, lse64, 0.04)
    assert relative_error(sparse_prob(q, kv, ids_NK, lse64.float(), 0.04), expected) < 5e-3


@needs_gpu
@pytest.mark.parametrize("hopper", [True, False])
def test_the_dense_loss_matches_at_full_width(hopper, monkeypatch):
    torch.manual_seed(4)
    monkeypatch.setattr(indexer_kl, "SCORES_AT_ONCE", 1 << 18)
    if not hopper:
        monkeypatch.setattr(indexer_kl_hopper, "supported", lambda q, widths: False)
    assert worst_error(*causal_ranges(600, 200, 77), 64, 128, 16, 192, torch.bfloat16) < 1
    assert worst_error(*uneven_ranges(), 64, 128, 3, 64, torch.bfloat16) < 1


@needs_gpu
def test_a_repeated_run_gives_the_same_bits(monkeypatch):
    torch.manual_seed(5)
    monkeypatch.setattr(indexer_kl, "SCORES_AT_ONCE", 1 << 20)
    start_N, end_N = causal_ranges(1500, 548)
    index = [random(2048, 64, 128, dtype=torch.bfloat16), random(2048, 128, dtype=torch.bfloat16)]
    index = [x.requires_grad_() for x in (*index, random(2048, 64, dtype=torch.float32) * 0.01)]
    q, k = random(2048, 16, 192, dtype=torch.bfloat16), random(2048, 16, 192, dtype=torch.bfloat16)
    lse_NH = torch.full((2048, 16), 9.0, device=DEVICE)
    ids_NK = torch.randint(-1, 2048, (2048, 512), device=DEVICE)

    def run() -> list[Tensor]:
        kl = dense_indexer_kl(*index, q, k, lse_NH, start_N, end_N, 0.07)
        return [sparse_prob(q, k[:, 0], ids_NK, lse_NH, 0.07), kl, *torch.autograd.grad(kl.sum(), index)]

    first = run()
    assert all(torch.equal(a, b) for _ in range(24) for a, b in zip(first, run(), strict=True))
