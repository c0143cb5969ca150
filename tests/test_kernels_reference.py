"""The specification itself, against enumeration, exact numbers and independent formulations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.grpo import estimators
from trimtab.kernels import reference

NEVER = float("-inf")
tied_rows = st.lists(st.sampled_from([NEVER, -1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=24)


def test_index_scores_of_a_hand_computed_case():
    """Two heads: relu(q1.k) * 2 + relu(q2.k) * (-1). Key 0: q1.k = 1, q2.k = 3 -> 2 - 3. Key 1: -1 and 2 -> -2."""
    q_THD = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    k_MD = torch.tensor([[1.0, 3.0], [-1.0, 2.0], [9.0, 9.0]])
    visible_TM = torch.tensor([[True, True, False]])
    score_TM = reference.index_scores(q_THD, k_MD, torch.tensor([[2.0, -1.0]]), visible_TM)
    assert score_TM.tolist() == [[-1.0, -2.0, NEVER]]


@settings(deadline=None)
@given(row=tied_rows, k=st.integers(1, 30))
def test_select_equals_a_stable_sort_on_plateaus_of_ties(row, k):
    score_M = torch.tensor(row)
    best = torch.sort(score_M, descending=True, stable=True).indices[:k]
    expected = {int(i) for i in best if score_M[i] > NEVER}
    assert set(reference.select(score_M, k).nonzero().flatten().tolist()) == expected


@settings(deadline=None)
@given(row=tied_rows, k=st.integers(1, 30), extra=st.integers(0, 9))
def test_select_does_not_depend_on_invisible_keys_behind_the_row(row, k, extra):
    score_M = torch.tensor(row)
    longer = torch.cat([score_M, torch.full((extra,), NEVER)])
    assert torch.equal(reference.select(longer, k)[: len(row)], reference.select(score_M, k))
    assert not reference.select(longer, k)[len(row) :].any()


@settings(deadline=None)
@given(row=tied_rows, k=st.integers(1, 30))
def test_selected_ids_are_the_selected_positions_ascending_then_unused(row, k):
    selected_M = reference.select(torch.tensor(row), k)
    ids_K = reference.selected_ids(selected_M, k).tolist()
    positions = selected_M.nonzero().flatten().tolist()
    assert ids_K == positions + [-1] * (min(k, len(row)) - len(positions))


def _mla_case(T: int = 5, M: int = 9, H: int = 3, C: int = 6) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q_THC = torch.randn(2, T, H, C, requires_grad=True)
    kv_MC = torch.randn(2, M, C, requires_grad=True)
    selected_TM = torch.rand(2, T, M) < 0.4
    selected_TM[0, 0] = False
    selected_TM[1, 2] = True
    return q_THC, kv_MC, selected_TM


def test_sparse_mla_equals_masked_mha_over_the_same_rows_forward_and_backward():
    q_THC, kv_MC, selected_TM = _mla_case()
    ids_TK = reference.selected_ids(selected_TM, 9)
    sparse_THV, _ = reference.sparse_mla(q_THC, kv_MC, ids_TK, 4, 0.3)
    k_MHC = kv_MC[:, :, None].expand(-1, -1, 3, -1)
    dense_THV = reference.masked_mha(q_THC, k_MHC, k_MHC[..., :4], selected_TM, 0.3)
    torch.testing.assert_close(sparse_THV, dense_THV, rtol=0, atol=1e-6)
    weight_THV = torch.randn_like(dense_THV)
    for ours, theirs in zip(
        torch.autograd.grad((sparse_THV * weight_THV).sum(), (q_THC, kv_MC)),
        torch.autograd.grad((dense_THV * weight_THV).sum(), (q_THC, kv_MC)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_query_without_keys_gives_zero_and_finite_gradients():
    q_THC, kv_MC, selected_TM = _mla_case()
    sparse_THV, lse_TH = reference.sparse_mla(q_THC, kv_MC, reference.selected_ids(selected_TM, 9), 4, 0.3)
    k_MHC = kv_MC[:, :, None].expand(-1, -1, 3, -1)
    dense_THV = reference.masked_mha(q_THC, k_MHC, k_MHC[..., :4], selected_TM, 0.3)
    assert not sparse_THV[0, 0].any() and not dense_THV[0, 0].any()
    assert (lse_TH[0, 0] == NEVER).all() and lse_TH[0, 1:].isfinite().all()
    for out in (sparse_THV, dense_THV):
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q_THC, kv_MC)))


def test_unused_ids_never_count_even_if_row_zero_is_enormous():
    q_THC, kv_MC, selected_TM = _mla_case()
    selected_TM[..., 0] = False
    ids_TK = reference.selected_ids(selected_TM, 9)
    spoilt_MC = kv_MC.detach().clone()
    spoilt_MC[:, 0] = 1e30
    before, _ = reference.sparse_mla(q_THC, kv_MC, ids_TK, 4, 0.3)
    after, _ = reference.sparse_mla(q_THC, spoilt_MC, ids_TK, 4, 0.3)
    assert torch.equal(before, after)


def test_sparse_prob_is_masked_prob_summed_over_heads():
    q_THC, kv_MC, selected_TM = _mla_case()
    selected_TM[0, 0, 3] = True
    ids_TK = reference.selected_ids(selected_TM, 9)
    _, lse_TH = reference.sparse_mla(q_THC, kv_MC, ids_TK, 4, 0.3)
    prob_TK = reference.sparse_prob(q_THC, kv_MC, ids_TK, lse_TH, 0.3)
    dense_TM = reference.masked_prob(q_THC, kv_MC[:, :, None].expand(-1, -1, 3, -1), selected_TM, 0.3).sum(1)
    expected_TK = dense_TM.gather(-1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0.0)
    torch.testing.assert_close(prob_TK, expected_TK, rtol=0, atol=1e-6)


def test_indexer_kl_of_a_hand_computed_case():
    """p = (3, 1) / 4, softmax(0, log 3) = (1, 3) / 4: KL = 3/4 log 3 - 1/4 log 3 = log(3) / 2; gradient q - p."""
    score_TM = torch.tensor([[0.0, math.log(3.0), 7.0], [NEVER, NEVER, NEVER]], requires_grad=True)
    prob_TM = torch.tensor([[1.5, 0.5, 9.0], [0.2, 0.2, 0.2]], requires_grad=True)
    selected_TM = torch.tensor([[True, True, False], [False, False, False]])
    kl_T = reference.indexer_kl(score_TM, prob_TM, selected_TM)
    torch.testing.assert_close(kl_T, torch.tensor([math.log(3.0) / 2, 0.0]), rtol=0, atol=1e-6)
    kl_T.sum().backward()
    assert prob_TM.grad is None
    torch.testing.assert_close(score_TM.grad, torch.tensor([[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]), rtol=0, atol=1e-6)


def test_indexer_kl_is_zero_where_the_indexer_already_agrees():
    prob_TM = torch.rand(4, 7)
    kl_T = reference.indexer_kl(prob_TM.log() + 3.0, prob_TM, torch.ones(4, 7, dtype=torch.bool))
    torch.testing.assert_close(kl_T, torch.zeros(4), rtol=0, atol=1e-6)


def _head_case(S: int = 12, D: int = 5, V: int = 11) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    hidden_SD, weight_VD = torch.randn(S, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return hidden_SD, weight_VD, torch.randint(0, V, (S,))


def test_kept_logp_equals_enumeration_of_the_vocabulary_forward_and_backward():
    hidden_SD, weight_VD, token_S = _head_case()
    kept_SV = torch.rand(12, 11) < 0.3
    kept_SV[torch.arange(12), token_S] = True
    kept_id_E, offset_S = kept_SV.nonzero()[:, 1], torch.nn.functional.pad(kept_SV.sum(1).cumsum(0), (1, 0))
    logp_S = reference.kept_logp(hidden_SD, weight_VD, token_S, kept_id_E, offset_S, 1.3)
    logit_SV = (hidden_SD @ weight_VD.T / 1.3).masked_fill(~kept_SV, NEVER)
    expected_S = logit_SV.log_softmax(-1)[torch.arange(12), token_S]
    torch.testing.assert_close(logp_S, expected_S, rtol=0, atol=1e-6)
    weight_S = torch.randn(12)
    for ours, theirs in zip(
        torch.autograd.grad(logp_S @ weight_S, (hidden_SD, weight_VD)),
        torch.autograd.grad(expected_S @ weight_S, (hidden_SD, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_a_singleton_kept_set_gives_exactly_zero_with_exactly_zero_gradient():
    hidden_SD, weight_VD, token_S = _head_case()
    logp_S = reference.kept_logp(hidden_SD, weight_VD, token_S, token_S, torch.arange(13), 0.7)
    assert not logp_S.any()
    assert not any(grad.any() for grad in torch.autograd.grad(logp_S.sum(), (hidden_SD, weight_VD)))


@pytest.mark.parametrize(
    ("kept", "offsets"),
    [([1, 2], [0, 1, 2]), ([0, 3, 4], [0, 1, 3]), ([0, 0, 2], [0, 2, 3]), ([0], [0, 1, 1])],
    ids=["first token outside", "second token outside", "twice and never", "empty set"],
)
def test_kept_logp_refuses_a_token_outside_its_kept_set(kept, offsets):
    hidden_SD, weight_VD = torch.randn(2, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match="outside its kept set"):
        reference.kept_logp(hidden_SD, weight_VD, torch.tensor([0, 1]), torch.tensor(kept), torch.tensor(offsets), 1.0)


@pytest.mark.parametrize("logits_at_once", [1, 11 * 5, 1 << 23])
def test_full_logp_equals_log_softmax_in_one_part_or_many(monkeypatch, logits_at_once):
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", logits_at_once)
    hidden_SD, weight_VD, token_S = _head_case()
    logp_S = reference.full_logp(hidden_SD, weight_VD, token_S, 1.3)
    expected_S = (hidden_SD @ weight_VD.T / 1.3).log_softmax(-1)[torch.arange(12), token_S]
    torch.testing.assert_close(logp_S, expected_S, rtol=0, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(logp_S.sum(), (hidden_SD, weight_VD)),
        torch.autograd.grad(expected_S.sum(), (hidden_SD, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_entropies_equal_enumeration_and_carry_no_gradient():
    hidden_SD, weight_VD, token_S = _head_case()
    kept_SV = torch.rand(12, 11) < 0.3
    kept_SV[torch.arange(12), token_S] = True
    kept_SV[3] = torch.arange(11) == 4
    kept_id_E, offset_S = kept_SV.nonzero()[:, 1], torch.nn.functional.pad(kept_SV.sum(1).cumsum(0), (1, 0))
    logit_SV = hidden_SD @ weight_VD.T / 1.3
    kept_S = reference.kept_entropy(hidden_SD, weight_VD, kept_id_E, offset_S, 1.3)
    full_S = reference.full_entropy(hidden_SD, weight_VD, 1.3)
    expected_S = torch.special.entr(logit_SV.masked_fill(~kept_SV, NEVER).softmax(-1)).sum(-1)
    torch.testing.assert_close(kept_S, expected_S.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(full_S, torch.special.entr(logit_SV.softmax(-1)).sum(-1).detach(), rtol=0, atol=2e-6)
    assert kept_S[3] == 0 and not kept_S.requires_grad and not full_S.requires_grad


def test_kept_entropy_refuses_an_empty_set():
    hidden_SD, weight_VD, _ = _head_case()
    with pytest.raises(ValueError, match="kept no id"):
        reference.kept_entropy(hidden_SD[:2], weight_VD, torch.tensor([3]), torch.tensor([0, 1, 1]), 1.0)


@pytest.mark.parametrize("logits_at_once", [1, 11 * 5, 1 << 23])
def test_full_kl_equals_the_estimator_of_the_logits_in_one_part_or_many(monkeypatch, logits_at_once):
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", logits_at_once)
    hidden_SD, weight_VD, _ = _head_case()
    ref_hidden_SD = (hidden_SD + 0.3 * torch.randn_like(hidden_SD)).detach().requires_grad_()
    ref_weight_VD = (weight_VD * 1.2).detach().requires_grad_()
    kl_S = reference.full_kl(hidden_SD, ref_hidden_SD, weight_VD, ref_weight_VD, 1.3)
    logit_SV, ref_logit_SV = hidden_SD @ weight_VD.T / 1.3, (ref_hidden_SD @ ref_weight_VD.T / 1.3).detach()
    expected_S = estimators.full_kl(logit_SV, ref_logit_SV)
    torch.testing.assert_close(kl_S, expected_S, rtol=0, atol=2e-6)
    inputs = hidden_SD, weight_VD, ref_hidden_SD, ref_weight_VD
    for ours, theirs in zip(
        torch.autograd.grad(kl_S.sum(), inputs, allow_unused=True),
        torch.autograd.grad(expected_S.sum(), inputs, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)
