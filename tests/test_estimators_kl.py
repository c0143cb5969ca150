"""Every expectation here is summed over the vocabulary, never sampled, so the checks are exact.

Shape suffix V: one packed trajectory of one token per vocabulary entry, weighted by the probability of sampling it.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.grpo.estimators import full_kl, k1, k2, k3, mismatch_kl, unbiased_kl
from trimtab.kernels.reference import kept_logp

EXACT = {"rtol": 0.0, "atol": 1e-9}


def random_logits(seed: int, *, on_policy: bool, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits over 8 tokens of the policy (a leaf), of its sampler and of the reference."""
    generator = torch.Generator().manual_seed(seed)
    logits_V, old_logits_V, ref_logits_V = scale * torch.randn(3, 8, dtype=torch.float64, generator=generator)
    return logits_V.requires_grad_(), logits_V.detach() if on_policy else old_logits_V, ref_logits_V


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def kl(logits_V: Tensor, ref_logits_V: Tensor) -> Tensor:
    """KL(pi || pi_ref) from its definition, independent of the code under test."""
    p_V, ref_p_V = logits_V.softmax(-1), ref_logits_V.softmax(-1)
    return sum(p * torch.log(p / q) for p, q in zip(p_V, ref_p_V, strict=True))


def expectation(estimate_V: Tensor, old_logits_V: Tensor) -> Tensor:
    return (old_logits_V.softmax(-1) * estimate_V).sum()


# Whether (value, gradient) of each estimator are the KL's, when the tokens come from pi and when they do not.
#   k1: value sum p log(p/q); gradient sum p s = 0.     k2: gradient sum p log(p/q) s = grad KL, value is another.
#   k3: value sum p (q/p - 1) + KL = KL; gradient sum p (1 - q/p) s = -E_ref[s], which is grad KL(ref || pi).
#   unbiased: under pi_old, sum p_old (p/p_old) k3 = KL, and the same sum is differentiated.
TRUTH = [
    ("unbiased", True, True, True),
    ("unbiased", False, True, True),
    ("k1", True, True, False),
    ("k1", False, False, False),
    ("k2", True, False, True),
    ("k2", False, False, False),
    ("k3", True, True, False),
    ("k3", False, False, False),
]


@pytest.mark.parametrize(("name", "on_policy", "value_is_right", "gradient_is_right"), TRUTH)
@pytest.mark.parametrize("seed", range(3))
def test_only_the_unbiased_kl_has_value_and_gradient_of_the_kl_on_and_off_policy(
    name, on_policy, value_is_right, gradient_is_right, seed
):
    logits_V, old_logits_V, ref_logits_V = random_logits(seed, on_policy=on_policy)
    logp_V, old_logp_V, ref_logp_V = (x.log_softmax(-1) for x in (logits_V, old_logits_V, ref_logits_V))
    if name == "unbiased":
        estimate_V = unbiased_kl(logp_V, old_logp_V, ref_logp_V)
    else:
        estimate_V = {"k1": k1, "k2": k2, "k3": k3}[name](logp_V, ref_logp_V)
    value, exact = expectation(estimate_V, old_logits_V), kl(logits_V, ref_logits_V)
    grad_V, exact_grad_V = gradient(value, logits_V), gradient(exact, logits_V)

    if value_is_right:
        torch.testing.assert_close(value, exact, **EXACT)
    else:
        assert (value - exact).abs() > 0.02
    if gradient_is_right:
        torch.testing.assert_close(grad_V, exact_grad_V, **EXACT)
    else:
        assert (grad_V - exact_grad_V).norm() > 0.2 * exact_grad_V.norm()


def test_the_expected_gradient_of_k3_on_policy_is_that_of_the_reversed_kl():
    logits_V, old_logits_V, ref_logits_V = random_logits(0, on_policy=True)
    k3_grad_V = gradient(
        expectation(k3(logits_V.log_softmax(-1), ref_logits_V.log_softmax(-1)), old_logits_V), logits_V
    )
    torch.testing.assert_close(k3_grad_V, gradient(kl(ref_logits_V, logits_V), logits_V), **EXACT)


def test_detaching_the_ratio_or_clamping_the_product_turns_the_gradient_away_from_the_kls():
    # The reference holds tokens at thousands of times the policy's probability: where the KL is largest, the clamp
    # at 10 is constant and pushes nothing; a detached ratio keeps the value and has the gradient of k3.
    logits_V, old_logits_V, ref_logits_V = random_logits(3, on_policy=False, scale=4.0)
    logp_V, old_logp_V, ref_logp_V = (x.log_softmax(-1) for x in (logits_V, old_logits_V, ref_logits_V))
    exact_grad_V = gradient(kl(logits_V, ref_logits_V), logits_V)
    product_V = unbiased_kl(logp_V, old_logp_V, ref_logp_V)
    detached_V = (logp_V - old_logp_V).exp().detach() * k3(logp_V, ref_logp_V)

    def cosine(estimate_V: Tensor) -> float:
        grad_V = gradient(expectation(estimate_V, old_logits_V), logits_V)
        return float(torch.nn.functional.cosine_similarity(grad_V, exact_grad_V, dim=0))

    assert cosine(product_V) == pytest.approx(1.0, abs=1e-9)
    assert cosine(product_V.clamp(max=10)) < 0.9
    assert cosine(detached_V) < 0.9


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5, 6, 7], [1, 4, 6], [5, 2]])
def test_over_kept_sets_the_unbiased_kl_is_the_kl_of_the_policies_renormalised_over_the_set(on_policy, kept):
    # The sampler drew from old renormalised over the kept set, so the tokens of the set are the whole sample space.
    logits_V, old_logits_V, ref_logits_V = random_logits(1, on_policy=on_policy)
    set_K = torch.tensor(kept)
    K = len(kept)

    def logp_K(logits_V: Tensor) -> Tensor:  # a hidden state of 1 and a head of one column give these logits
        hidden_K1 = torch.ones(K, 1, dtype=torch.float64)
        return kept_logp(hidden_K1, logits_V[:, None], set_K, set_K.repeat(K), torch.arange(K + 1) * K, 1.0).double()

    estimate_K = unbiased_kl(logp_K(logits_V), logp_K(old_logits_V), logp_K(ref_logits_V))
    value = (old_logits_V[set_K].softmax(-1) * estimate_K).sum()
    exact = kl(logits_V[set_K], ref_logits_V[set_K])
    rounding = {"rtol": 1e-5, "atol": 2e-6}  # kept_logp returns float32
    torch.testing.assert_close(value, exact, **rounding)
    torch.testing.assert_close(gradient(value, logits_V), gradient(exact, logits_V), **rounding)
    if K < 8:
        assert (exact - kl(logits_V, ref_logits_V)).abs() > 0.01  # it is not the KL over the vocabulary


@pytest.mark.parametrize("on_policy", [True, False])
def test_renormalised_over_a_kept_set_value_and_gradient_are_exact(on_policy):
    logits_V, old_logits_V, ref_logits_V = random_logits(2, on_policy=on_policy)
    set_K = torch.tensor([0, 3, 5])
    logp_K, old_logp_K, ref_logp_K = (x[set_K].log_softmax(-1) for x in (logits_V, old_logits_V, ref_logits_V))
    value = (old_logp_K.exp() * unbiased_kl(logp_K, old_logp_K, ref_logp_K)).sum()
    exact = kl(logits_V[set_K], ref_logits_V[set_K])
    torch.testing.assert_close(value, exact, **EXACT)
    torch.testing.assert_close(gradient(value, logits_V), gradient(exact, logits_V), **EXACT)


def test_a_position_with_a_single_kept_id_pulls_on_nothing():
    hidden_SD = torch.randn(2, 4, requires_grad=True)
    weight_VD = torch.randn(5, 4, requires_grad=True)
    logp_S = kept_logp(hidden_SD, weight_VD, torch.tensor([3, 0]), torch.tensor([3, 0]), torch.arange(3), 1.3)
    assert logp_S.tolist() == [0.0, 0.0]
    unbiased_kl(logp_S, torch.zeros(2), torch.zeros(2)).sum().backward()
    assert not hidden_SD.grad.any()
    assert not weight_VD.grad.any()


def test_full_kl_has_the_value_and_gradient_of_the_kl():
    logits_V, _, ref_logits_V = random_logits(4, on_policy=True)
    value, exact = full_kl(logits_V[None], ref_logits_V[None]), kl(logits_V, ref_logits_V)
    torch.testing.assert_close(value, exact[None], **EXACT)
    torch.testing.assert_close(gradient(value.sum(), logits_V), gradient(exact, logits_V), **EXACT)


def test_full_kl_refuses_logits_that_are_not_finite():
    logits_SV = torch.zeros(2, 3)
    logits_SV[1, 2] = float("-inf")
    with pytest.raises(ValueError, match="logits_SV holds 1 of 6 values that are not finite"):
        full_kl(logits_SV, torch.zeros(2, 3))


@pytest.mark.parametrize("log_ratio", [-20.0, -1.0, -0.01, 0.0, 0.01, 1.0, 20.0])
def test_in_single_precision_the_gradient_survives_a_reference_that_differs_by_orders_of_magnitude(log_ratio):
    # d/dlogp (pi/pi_old) (delta - log delta - 1) = -(pi/pi_old) log delta. At log delta = 20 the product as written
    # in the paper makes autograd subtract 4.85e8 from 4.85e8, and the gradient comes out as -32.
    logp_S = torch.tensor([-22.0], requires_grad=True)
    (grad_S,) = torch.autograd.grad(
        unbiased_kl(logp_S, torch.tensor([-22.0]), logp_S.detach() + log_ratio).sum(), logp_S
    )
    assert float(grad_S) == pytest.approx(-log_ratio, rel=1e-4, abs=1e-6)


def test_mismatch_kl_is_the_kl_from_sampler_to_trainer_and_carries_no_gradient():
    logits_V, old_logits_V, _ = random_logits(5, on_policy=False)
    estimate_V = mismatch_kl(logits_V.log_softmax(-1), old_logits_V.log_softmax(-1))
    torch.testing.assert_close(expectation(estimate_V, old_logits_V), kl(old_logits_V, logits_V).detach(), **EXACT)
    assert not estimate_V.requires_grad


logps = st.floats(-8, 0)


@given(logps, logps, logps)
def test_every_token_of_the_non_negative_estimators_is_non_negative(logp, old_logp, ref_logp):
    x = torch.tensor([[logp], [old_logp], [ref_logp]], dtype=torch.float64)
    rounding = 1e-12 * float((x[2] - x[1]).exp() + (x[0] - x[1]).exp() + 1)
    for estimate_S in (unbiased_kl(*x), k2(x[0], x[2]), k3(x[0], x[2]), mismatch_kl(x[0], x[1])):
        assert float(estimate_S) >= -10 * rounding


@given(logps, logps)
def test_on_policy_the_unbiased_kl_has_the_value_of_k3(logp, ref_logp):
    logp_S, ref_logp_S = torch.tensor([[logp], [ref_logp]], dtype=torch.float64)
    torch.testing.assert_close(unbiased_kl(logp_S, logp_S, ref_logp_S), k3(logp_S, ref_logp_S), rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10_000), st.floats(0.1, 3))
def test_the_exact_kl_is_never_negative_and_zero_for_equal_policies(seed, scale):
    logits_V, _, ref_logits_V = random_logits(seed, on_policy=True, scale=scale)
    assert full_kl(logits_V, ref_logits_V) >= 0
    torch.testing.assert_close(full_kl(logits_V, logits_V + 3.0), torch.zeros((), dtype=torch.float64), **EXACT)
