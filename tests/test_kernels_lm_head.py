"""The LM head over kept ids and over the whole vocabulary, against enumeration in float64."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, FORWARD, GRADIENT, needs_gpu, poisoned, relative_error

from trimtab.grpo import estimators
from trimtab.kernels import lm_head, reference, segment_sum

NEVER = float("-inf")
T = 1.3


def head_case(S: int, D: int, V: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(S + D + V)
    hidden_SD = (torch.randn(S, D) * 1.5).to(DEVICE, dtype).requires_grad_()
    weight_VD = (torch.randn(V, D) / D**0.5).to(DEVICE, dtype).requires_grad_()
    return hidden_SD, weight_VD, torch.randint(0, V, (S,), device=DEVICE)


def kept_case(kept_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The CSR of a mask, each row's ids in a scrambled order: kept ids need not be sorted."""
    row_E, id_E = kept_SV.cpu().nonzero().T
    scrambled_E = (row_E + torch.rand(len(row_E))).argsort()
    offset_S = torch.nn.functional.pad(kept_SV.cpu().sum(1).cumsum(0), (1, 0))
    return id_E[scrambled_E].to(DEVICE), offset_S.to(DEVICE)


def logits64(hidden_SD: torch.Tensor, weight_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_SD, weight_VD = (x.detach().double().cpu().requires_grad_() for x in (hidden_SD, weight_VD))
    return hidden_SD, weight_VD, hidden_SD @ weight_VD.T / T


def check_gradients(result_S, inputs, expected_S, expected_inputs, dtype) -> None:
    upstream_S = torch.randn(len(result_S), generator=torch.Generator().manual_seed(3))
    with poisoned():
        ours = torch.autograd.grad(result_S, inputs, upstream_S.to(DEVICE))
    theirs = torch.autograd.grad(expected_S, expected_inputs, upstream_S.double())
    for our, their, x in zip(ours, theirs, inputs, strict=True):
        assert our.dtype == x.dtype
        assert relative_error(our, their) < GRADIENT[dtype]


def random_sets(token_S: torch.Tensor, V: int) -> torch.Tensor:
    """About half singletons, else a tenth of the vocabulary, and one row that keeps it all."""
    S = len(token_S)
    kept_SV = (torch.rand(S, V) < 0.1) & (torch.rand(S, 1) < 0.5)
    kept_SV[S // 2] = True
    kept_SV[torch.arange(S), token_S.cpu()] = True
    return kept_SV


def newline_in_every_row(token_S: torch.Tensor, V: int) -> torch.Tensor:
    kept_SV = random_sets(token_S, V)
    kept_SV[:, 7] = True
    return kept_SV


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("S", "D", "V", "sets"),
    [
        (1, 24, 11, random_sets),
        (130, 40, 11, random_sets),
        (23, 100, 37, newline_in_every_row),
        (6, 1030, 21, newline_in_every_row),
    ],
)
def test_kept_logp_equals_enumeration_forward_and_backward(monkeypatch, S, D, V, sets, dtype):
    monkeypatch.setattr(segment_sum, "PART", 8)  # cuts the long sets and the heavy ids
    hidden_SD, weight_VD, token_S = head_case(S, D, V, dtype)
    kept_SV = sets(token_S, V)
    kept_id_E, offset_S = kept_case(kept_SV)
    with poisoned():
        logp_S, entropy_S = lm_head.kept_logp_entropy(hidden_SD, weight_VD, token_S, kept_id_E, offset_S, T)

    hidden64_SD, weight64_VD, logit_SV = logits64(hidden_SD, weight_VD)
    kept_logp_SV = logit_SV.masked_fill(~kept_SV, NEVER).log_softmax(-1)
    expected_S = kept_logp_SV[torch.arange(S), token_S.cpu()]
    assert relative_error(logp_S, expected_S) < FORWARD[dtype]
    assert relative_error(entropy_S, torch.special.entr(kept_logp_SV.exp()).sum(-1)) < FORWARD[dtype]
    check_gradients(logp_S, (hidden_SD, weight_VD), expected_S, (hidden64_SD, weight64_VD), dtype)


def test_kept_logp_agrees_with_its_specification_and_int32_ids():
    hidden_SD, weight_VD, token_S = head_case(16, 32, 21, torch.float32)
    kept_id_E, offset_S = kept_case(random_sets(token_S, 21))
    case = hidden_SD, weight_VD, token_S, kept_id_E, offset_S, T
    narrow = hidden_SD, weight_VD, token_S.int(), kept_id_E.int(), offset_S.int(), T
    spec_S = reference.kept_logp(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in case))
    logp_S = lm_head.kept_logp(*case)
    torch.testing.assert_close(logp_S.cpu(), spec_S, rtol=0, atol=2e-6)
    assert torch.equal(logp_S, lm_head.kept_logp(*narrow))
    ours, others = (torch.autograd.grad(lm_head.kept_logp(*x).sum(), (hidden_SD, weight_VD)) for x in (case, narrow))
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_singletons_are_exactly_zero_and_read_nothing(dtype):
    """Hidden states and weight rows that only singletons have are NaN: they must not be read at all."""
    hidden_SD, weight_VD, token_S = head_case(20, 24, 30, dtype)
    token_S.remainder_(15)
    kept_SV = torch.zeros(20, 30, dtype=torch.bool)
    kept_SV[::2, 15:] = True
    token_S[::2] += 15
    kept_SV[torch.arange(20), token_S.cpu()] = True
    with torch.no_grad():
        hidden_SD[1::2] = float("nan")
        weight_VD[:15] = float("nan")
    logp_S, entropy_S = lm_head.kept_logp_entropy(hidden_SD, weight_VD, token_S, *kept_case(kept_SV), T)
    assert logp_S.isfinite().all() and not logp_S[1::2].any() and not entropy_S[1::2].any()
    dhidden_SD, dweight_VD = torch.autograd.grad(logp_S.sum(), (hidden_SD, weight_VD))
    assert dhidden_SD.isfinite().all() and not dhidden_SD[1::2].any() and dhidden_SD[::2].any()
    assert dweight_VD.isfinite().all() and not dweight_VD[:15].any() and dweight_VD[15:].any()


def test_singletons_alone_give_zero():
    hidden_SD, weight_VD, token_S = head_case(5, 16, 9, torch.float32)
    logp_S = lm_head.kept_logp(hidden_SD, weight_VD, token_S, token_S, torch.arange(6, device=DEVICE), 0.7)
    assert not logp_S.any()
    assert not any(grad.any() for grad in torch.autograd.grad(logp_S.sum(), (hidden_SD, weight_VD)))


def test_no_positions_give_no_log_probabilities():
    hidden_SD, weight_VD, token_S = head_case(0, 16, 9, torch.float32)
    for logp_S in (
        lm_head.kept_logp(hidden_SD, weight_VD, token_S, token_S, torch.zeros(1, dtype=torch.int64, device=DEVICE), T),
        lm_head.full_logp(hidden_SD, weight_VD, token_S, T),
        lm_head.full_kl(hidden_SD, hidden_SD, weight_VD, weight_VD, T),
    ):
        assert logp_S.shape == (0,) and torch.autograd.grad(logp_S.sum(), hidden_SD)[0].shape == (0, 16)


def test_a_kept_set_that_is_the_whole_vocabulary_equals_full_logp():
    hidden_SD, weight_VD, token_S = head_case(5, 100, 29, torch.float32)
    sets = kept_case(torch.ones(5, 29, dtype=torch.bool))
    kept_S = lm_head.kept_logp(hidden_SD, weight_VD, token_S, *sets, T)
    full_S = lm_head.full_logp(hidden_SD, weight_VD, token_S, T)
    torch.testing.assert_close(kept_S, full_S, rtol=0, atol=2e-6)
    for ours, theirs in zip(
        torch.autograd.grad(kept_S.sum(), (hidden_SD, weight_VD)),
        torch.autograd.grad(full_S.sum(), (hidden_SD, weight_VD)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        lm_head.kept_entropy(hidden_SD, weight_VD, *sets, T), lm_head.full_entropy(hidden_SD, weight_VD, T)
    )


@pytest.mark.parametrize(
    ("kept", "offsets", "message"),
    [
        ([1, 2], [0, 1, 2], "outside its kept set"),
        ([0, 3, 4], [0, 1, 3], "outside its kept set"),
        ([0, 0, 2], [0, 2, 3], "outside its kept set"),
        ([0, 0, 1], [0, 2, 3], "outside its kept set"),
        ([0], [0, 1, 1], "outside its kept set"),
        ([], [0, 0, 0], "outside its kept set"),
        ([0, 5, 1], [0, 2, 3], "kept ids must lie in"),
        ([0, -1, 1], [0, 2, 3], "kept ids must lie in"),
        ([0, 1, 2], [0, 1, 2], "kept ids must lie in"),
        ([0, 1], [0, 3, 2], "kept ids must lie in"),
    ],
)
def test_kept_logp_refuses_what_is_no_kept_set_of_the_token(kept, offsets, message):
    hidden_SD, weight_VD, _ = head_case(2, 3, 5, torch.float32)
    token_S, id_E, offset_S = (torch.tensor(x, dtype=torch.int64, device=DEVICE) for x in ([0, 1], kept, offsets))
    with pytest.raises(ValueError, match=message):
        lm_head.kept_logp(hidden_SD, weight_VD, token_S, id_E, offset_S, 1.0)


def test_kept_entropy_agrees_with_its_specification_and_refuses_an_empty_set():
    hidden_SD, weight_VD, token_S = head_case(21, 48, 33, torch.float32)
    kept_id_E, offset_S = kept_case(random_sets(token_S, 33))
    spec_S = reference.kept_entropy(hidden_SD.cpu(), weight_VD.cpu(), kept_id_E.cpu(), offset_S.cpu(), T)
    entropy_S = lm_head.kept_entropy(hidden_SD, weight_VD, kept_id_E, offset_S, T)
    torch.testing.assert_close(entropy_S.cpu(), spec_S, rtol=0, atol=2e-6)
    assert not entropy_S.requires_grad
    with pytest.raises(ValueError, match="kept no id"):
        lm_head.kept_entropy(hidden_SD[:2], weight_VD, kept_id_E[:2], offset_S.new_tensor([0, 2, 2]), T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits_at_once", [1, 1 << 26], ids=["chunks of 128 columns", "one chunk"])
def test_full_logp_and_entropy_equal_enumeration_forward_and_backward(monkeypatch, logits_at_once, dtype):
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", logits_at_once)
    hidden_SD, weight_VD, token_S = head_case(7, 72, 300, dtype)
    with poisoned():
        logp_S, entropy_S = lm_head.full_logp_entropy(hidden_SD, weight_VD, token_S, T)
    hidden64_SD, weight64_VD, logit_SV = logits64(hidden_SD, weight_VD)
    logp_SV = logit_SV.log_softmax(-1)
    expected_S = logp_SV[torch.arange(7), token_S.cpu()]
    assert relative_error(logp_S, expected_S) < FORWARD[dtype]
    assert relative_error(entropy_S, torch.special.entr(logp_SV.exp()).sum(-1)) < FORWARD[dtype]
    check_gradients(logp_S, (hidden_SD, weight_VD), expected_S, (hidden64_SD, weight64_VD), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits_at_once", [1, 1 << 26], ids=["chunks of 128 columns", "one chunk"])
def test_full_kl_equals_enumeration_forward_and_backward(monkeypatch, logits_at_once, dtype):
    monkeypatch.setattr(lm_head, "LOGITS_AT_ONCE", logits_at_once)
    hidden_SD, weight_VD, _ = head_case(7, 72, 300, dtype)
    ref_hidden_SD, ref_weight_VD, _ = head_case(7, 72, 300, dtype)
    with torch.no_grad():
        ref_hidden_SD += 0.3 * torch.randn_like(ref_hidden_SD)
        ref_weight_VD *= 1.2
    with poisoned():
        kl_S = lm_head.full_kl(hidden_SD, ref_hidden_SD, weight_VD, ref_weight_VD, T)
    hidden64_SD, weight64_VD, logit_SV = logits64(hidden_SD, weight_VD)
    _, _, ref_logit_SV = logits64(ref_hidden_SD, ref_weight_VD)
    expected_S = estimators.full_kl(logit_SV, ref_logit_SV)
    assert relative_error(kl_S, expected_S) < FORWARD[dtype]
    check_gradients(kl_S, (hidden_SD, weight_VD), expected_S, (hidden64_SD, weight64_VD), dtype)
    untouched = torch.autograd.grad(
        lm_head.full_kl(hidden_SD, ref_hidden_SD, weight_VD, ref_weight_VD, T).sum(),
        (ref_hidden_SD, ref_weight_VD),
        allow_unused=True,
    )
    assert untouched == (None, None)


def test_full_kl_from_itself_is_zero_with_a_zero_gradient():
    hidden_SD, weight_VD, _ = head_case(8, 40, 200, torch.float32)
    kl_S = lm_head.full_kl(hidden_SD, hidden_SD, weight_VD, weight_VD, T)
    assert not kl_S.any()
    assert not any(grad.any() for grad in torch.autograd.grad(kl_S.sum(), (hidden_SD, weight_VD)))


def test_full_logp_refuses_a_token_outside_the_vocabulary():
    hidden_SD, weight_VD, token_S = head_case(4, 16, 9, torch.float32)
    token_S[2] = 9
    with pytest.raises(ValueError, match="must lie in"):
        lm_head.full_logp(hidden_SD, weight_VD, token_S, T)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen):
    hidden_SD, weight_VD, token_S = head_case(7, 20, 19, torch.float32)
    (hidden_SD if frozen == "hidden" else weight_VD).requires_grad_(False)
    trained = weight_VD if frozen == "hidden" else hidden_SD
    sets = kept_case(random_sets(token_S, 19))
    for logp_S in (
        lm_head.kept_logp(hidden_SD, weight_VD, token_S, *sets, T),
        lm_head.full_logp(hidden_SD, weight_VD, token_S, T),
        lm_head.full_kl(hidden_SD, hidden_SD.detach() + 1, weight_VD, weight_VD.detach(), T),
    ):
        assert torch.autograd.grad(logp_S.sum(), trained)[0].any()


@needs_gpu
def test_repeated_runs_are_bitwise_equal_at_size():
    hidden_SD, weight_VD, token_S = head_case(3000, 2000, 5000, torch.bfloat16)
    kept_SV = torch.rand(3000, 5000) < torch.rand(3000, 1) ** 4 * 0.1
    kept_SV[:, 7] = True
    kept_SV[5] = True
    kept_SV[torch.arange(3000), token_S.cpu()] = True
    sets = kept_case(kept_SV)
    ref_hidden_SD = hidden_SD.detach() + 0.1
    first = None
    for _ in range(25):
        kept_S = lm_head.kept_logp(hidden_SD, weight_VD, token_S, *sets, T)
        full_S = lm_head.full_logp(hidden_SD, weight_VD, token_S, T)
        kl_S = lm_head.full_kl(hidden_SD, ref_hidden_SD, weight_VD, weight_VD.detach(), T)
        results = [kept_S, full_S, kl_S]
        for x_S in (kept_S, full_S, kl_S):
            results += torch.autograd.grad(x_S.sum(), (hidden_SD, weight_VD))
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
