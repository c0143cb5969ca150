"""The policy-gradient side of the objective. Expectations are summed over all sequences, never sampled."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trimtab.grpo.estimators import (
    GrpoLoss,
    clipped_surrogate,
    drift,
    drift_percentile,
    group_advantage,
    grpo_loss,
    off_policy_keep,
)

EXACT = {"rtol": 0.0, "atol": 1e-9}
VOCABULARY, LENGTH = 3, 2
SEQUENCES = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
TOKEN_S = torch.tensor(SEQUENCES).flatten()
FIRST_S = torch.tensor(SEQUENCES)[:, :1].expand(-1, LENGTH).flatten()
IS_FIRST_S = torch.tensor([True, False]).repeat(len(SEQUENCES))


def float64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_policy(seed: int) -> Tensor:
    """Logits of a policy over sequences of two tokens: row 0 for the first, row 1 + v for the second after v."""
    return torch.randn(1 + VOCABULARY, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_logp_S(policy: Tensor) -> Tensor:
    """Log-probability of each token of every sequence, packed."""
    row_S = torch.where(IS_FIRST_S, 0, 1 + FIRST_S)
    return policy.log_softmax(-1)[row_S, TOKEN_S]


def sequence_probability_B(policy: Tensor) -> Tensor:
    return token_logp_S(policy).view(-1, LENGTH).sum(-1).exp()


def loss_of(logp_S, old_logp_S, ref_logp_S, lengths, advantages, **settings) -> GrpoLoss:
    """grpo_loss over trajectories that lie one after another; settings are numbers or one number a trajectory."""
    B = len(lengths)
    filled = {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.0, "delta": math.inf} | settings
    num_trajectories = filled.pop("num_trajectories", B)
    rows = {f"{name}_B": torch.as_tensor(value, dtype=logp_S.dtype).expand(B) for name, value in filled.items()}
    return grpo_loss(
        logp_S,
        old_logp_S,
        ref_logp_S,
        sequence_S=torch.repeat_interleave(torch.tensor(lengths)),
        advantage_B=torch.as_tensor(advantages, dtype=logp_S.dtype),
        length_B=torch.tensor(lengths),
        num_trajectories=num_trajectories,
        **rows,
    )


# Advantages


def test_group_advantage_centres_without_dividing_by_the_deviation():
    # mean of 1, 0, 0, 3 is 1
    assert group_advantage(float64([1.0, 0.0, 0.0, 3.0])).tolist() == [0.0, -1.0, -1.0, 2.0]


@given(st.floats(-10, 10), st.integers(2, 16))
def test_equal_rewards_have_no_advantage_at_all(reward, size):
    assert not group_advantage(torch.full((size,), reward, dtype=torch.float64)).any()


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=16), st.floats(-10, 10))
def test_advantages_sum_to_zero_and_ignore_a_constant_added_to_every_reward(rewards, constant):
    advantage_G = group_advantage(float64(rewards))
    assert float(advantage_G.sum()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(group_advantage(float64(rewards) + constant), advantage_G, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rewards", "message"), [([1.0], "at least 2 rewards"), ([1.0, math.nan], "not finite")])
def test_a_group_that_cannot_be_centred_is_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        group_advantage(float64(rewards))


# Surrogate


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [  # clip 0.2 below, 0.3 above; slope = d value / d logp = r A where the clip does not bind, else 0
        (1.0, 2.0, 2.0, 2.0),
        (1.0, -2.0, -2.0, -2.0),
        (1.2, 2.0, 2.4, 2.4),
        (1.5, 2.0, 2.6, 0.0),  # already pushed up enough
        (1.5, -2.0, -3.0, -3.0),  # pushed the wrong way: never clipped
        (0.5, 2.0, 1.0, 1.0),
        (0.5, -2.0, -1.6, 0.0),  # already pushed down enough
    ],
)
def test_the_clip_removes_the_gradient_only_where_the_policy_already_moved_as_asked(ratio, advantage, value, slope):
    logp_S = float64([math.log(ratio)]).requires_grad_()
    objective_S = clipped_surrogate(logp_S, float64([0.0]), float64([advantage]), float64(0.2), float64(0.3))
    objective_S.sum().backward()
    assert float(objective_S.detach()) == pytest.approx(value)
    assert float(logp_S.grad) == pytest.approx(slope)


def test_the_on_policy_gradient_of_the_loss_is_the_true_gradient_of_the_expected_reward():
    # One group: every sequence once, weighted by its probability through its advantage (the surrogate is linear in
    # it). J / |o| is maximised, so the loss has -1/2 of the gradient of sum_o pi(o) R(o), whatever the baseline.
    policy = random_policy(0).requires_grad_()
    reward_B = torch.linspace(-1.0, 2.0, len(SEQUENCES), dtype=torch.float64).square()
    logp_S, probability_B = token_logp_S(policy), sequence_probability_B(policy)
    (true_gradient,) = torch.autograd.grad((probability_B * reward_B).sum(), policy, retain_graph=True)
    for baseline in (0.0, 1.7):
        advantages = probability_B.detach() * (reward_B - baseline)
        lengths = [LENGTH] * len(SEQUENCES)
        loss = loss_of(logp_S, logp_S.detach(), None, lengths, advantages, num_trajectories=1).loss
        (gradient,) = torch.autograd.grad(loss, policy, retain_graph=True)
        torch.testing.assert_close(gradient, -true_gradient / LENGTH, **EXACT)


def test_over_all_groups_of_two_the_expected_gradient_is_half_the_true_one():
    # Centring with the mean over G samples, the own one included, scales the gradient by (G - 1) / G exactly.
    policy = random_policy(1).requires_grad_()
    reward_B = torch.arange(len(SEQUENCES), dtype=torch.float64)
    logp_S, probability_B = token_logp_S(policy), sequence_probability_B(policy)
    (true_gradient,) = torch.autograd.grad((probability_B * reward_B).sum(), policy, retain_graph=True)

    expected = torch.zeros_like(policy)
    for i, j in itertools.product(range(len(SEQUENCES)), repeat=2):
        pair_S = logp_S.view(-1, LENGTH)[[i, j]].flatten()
        loss = loss_of(pair_S, pair_S.detach(), None, [LENGTH] * 2, group_advantage(reward_B[[i, j]])).loss
        (gradient,) = torch.autograd.grad(loss, policy, retain_graph=True)
        expected += probability_B[i].detach() * probability_B[j].detach() * gradient
    torch.testing.assert_close(expected, -true_gradient / LENGTH / 2, **EXACT)


def test_off_policy_the_kl_term_is_the_kl_of_each_token_given_the_prefixes_the_sampler_wrote():
    # The ratio is per token, so pi_old's prefixes stay: sum over t of E_{prefix ~ pi_old} KL(pi(.|prefix) || pi_ref).
    policy, old_policy, reference = random_policy(2).requires_grad_(), random_policy(3), random_policy(4)
    prefix_probability = torch.cat([torch.ones(1, dtype=torch.float64), old_policy[0].softmax(-1)])
    kl_by_prefix = (policy.softmax(-1) * (policy.log_softmax(-1) - reference.log_softmax(-1))).sum(-1)
    true_kl = (prefix_probability * kl_by_prefix).sum() / LENGTH

    packed = [token_logp_S(p) for p in (policy, old_policy, reference)]
    lengths, weights = [LENGTH] * len(SEQUENCES), sequence_probability_B(old_policy)
    loss = loss_of(*packed, lengths, torch.zeros(len(SEQUENCES)), beta=weights, num_trajectories=1).loss
    torch.testing.assert_close(loss, true_kl, **EXACT)
    (gradient,) = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(gradient, torch.autograd.grad(true_kl, policy)[0], **EXACT)


# Off-policy mask


@pytest.mark.parametrize(
    ("advantage", "drift_value", "kept"),
    [
        (1.0, 0.9, True),  # succeeded
        (0.0, 0.9, True),  # neither
        (-1.0, 0.25, True),  # at the bound: strictly above is needed
        (-1.0, 0.250001, False),
        (-1.0, -0.9, True),  # moved towards the sample
    ],
)
def test_only_failed_trajectories_above_the_bound_lose_their_surrogate(advantage, drift_value, kept):
    assert off_policy_keep(float64([drift_value]), float64([advantage]), float64([0.25])).tolist() == [kept]


def test_the_decision_is_one_for_the_whole_trajectory_even_over_several_segments():
    # Trajectory 0 lies in two segments around trajectory 1: tokens drift by 0.9 and -0.3, 0.0. Their mean is 0.2, so
    # neither the first token alone (0.9 > 0.5) nor the first segment decides; trajectory 1 drifts by 0.6.
    old_logp_S = float64([-1.0, -1.0, -1.0, -1.0])
    logp_S = old_logp_S - float64([0.9, 0.6, -0.3, 0.0])
    drift_B = drift(logp_S, old_logp_S, torch.tensor([0, 1, 0, 0]), 2)
    torch.testing.assert_close(drift_B, float64([0.2, 0.6]))
    assert off_policy_keep(drift_B, float64([-1.0, -1.0]), float64([0.5, 0.5])).tolist() == [True, False]


def test_the_drift_carries_no_gradient():
    logp_S = float64([-1.0, -2.0]).requires_grad_()
    assert not drift(logp_S, logp_S.detach(), torch.tensor([0, 0]), 1).requires_grad


@given(st.lists(st.floats(-20, 0), min_size=1, max_size=20))
def test_a_ratio_of_one_is_no_drift(logps):
    logp_S = float64(logps)
    assert drift(logp_S, logp_S, torch.zeros(len(logps), dtype=torch.int64), 1).tolist() == [0.0]


def test_delta_from_a_percentile_masks_the_failed_trajectories_above_it():
    drift_B = float64([0.0, 0.1, 0.2, 0.3, 0.4])
    assert drift_percentile(drift_B, 75) == pytest.approx(0.3)
    assert drift_percentile(-drift_B, 75) == 0.0
    delta_B = torch.full((5,), drift_percentile(drift_B, 75), dtype=torch.float64)
    assert off_policy_keep(drift_B, -torch.ones(5), delta_B).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("drifts", "q", "message"),
    [([0.1], 101, "percentage"), ([0.1], -1, "percentage"), ([], 50, "at least one"), ([math.inf], 50, "not finite")],
)
def test_a_percentile_of_nothing_is_refused(drifts, q, message):
    with pytest.raises(ValueError, match=message):
        drift_percentile(float64(drifts), q)


@pytest.mark.parametrize(
    ("sequence", "message"), [([0, 0, 0], "trajectory 1 of 2 has no sampled token"), ([0, 1, 2], "names trajectory 2")]
)
def test_tokens_and_trajectories_that_do_not_match_are_refused(sequence, message):
    with pytest.raises(ValueError, match=message):
        drift(torch.zeros(3), torch.zeros(3), torch.tensor(sequence), 2)


# The whole objective

# Mixed signs, different lengths, ratios on both sides of the clip, one masked trajectory (the third), two domains.
LENGTHS = [3, 1, 4, 2]
ADVANTAGES = [1.0, -0.5, -2.0, 1.5]
BETAS = [0.1, 0.0, 0.3, 0.0]
DELTAS = [0.1, 0.1, 0.1, math.inf]


def mixed_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    old_logp_S = -3 * torch.rand(10, dtype=torch.float64, generator=generator)
    logp_S = old_logp_S + 0.3 * torch.randn(10, dtype=torch.float64, generator=generator)
    logp_S[4:8] = old_logp_S[4:8] - float64([0.4, -0.1, 0.3, 0.2])  # drift 0.2
    ref_logp_S = logp_S + 0.5 * torch.randn(10, dtype=torch.float64, generator=generator)
    return logp_S, old_logp_S, ref_logp_S


def mixed_loss(logp_S, old_logp_S, ref_logp_S, chosen=range(4)) -> GrpoLoss:
    starts = [0, 3, 4, 8, 10]
    at_S = torch.tensor([t for i in chosen for t in range(starts[i], starts[i + 1])])
    lengths, advantages, beta, delta = ([row[i] for i in chosen] for row in (LENGTHS, ADVANTAGES, BETAS, DELTAS))
    packed = (logp_S[at_S], old_logp_S[at_S], ref_logp_S[at_S])
    return loss_of(*packed, lengths, advantages, beta=beta, delta=delta, num_trajectories=4)


def test_the_loss_is_its_equation_written_as_loops():
    logp_S, old_logp_S, ref_logp_S = mixed_batch()
    total, t = 0.0, 0
    for length, advantage, beta, delta in zip(LENGTHS, ADVANTAGES, BETAS, DELTAS, strict=True):
        steps = [(float(logp_S[i]), float(old_logp_S[i]), float(ref_logp_S[i])) for i in range(t, t + length)]
        masked = advantage < 0 and sum(old - new for new, old, _ in steps) / length > delta
        for new, old, ref in steps:
            ratio = math.exp(new - old)
            surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            kl = ratio * (math.exp(ref - new) - (ref - new) - 1)
            total += (beta * kl - (0 if masked else surrogate)) / length / 4
        t += length
    result = mixed_loss(logp_S, old_logp_S, ref_logp_S)
    assert result.keep_B.tolist() == [True, True, False, True]
    assert float(result.loss) == pytest.approx(total, abs=1e-12)


def test_a_masked_trajectory_keeps_its_kl_and_only_its_kl():
    logp_S, old_logp_S, ref_logp_S = mixed_batch()
    logp_S.requires_grad_()
    (gradient_S,) = torch.autograd.grad(mixed_loss(logp_S, old_logp_S, ref_logp_S).loss, logp_S)
    # d/dlogp of beta KL / |o| / 4 = -beta r log(pi_ref / pi) / |o| / 4; the third trajectory holds tokens 4 to 7
    ratio_S = (logp_S.detach() - old_logp_S).exp()
    expected_S = -0.3 * ratio_S * (ref_logp_S - logp_S.detach()) / 4 / 4
    torch.testing.assert_close(gradient_S[4:8], expected_S[4:8], **EXACT)


@pytest.mark.parametrize("split", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[3, 0], [2, 1]], [[1, 2, 3], [0]]])
def test_splitting_a_batch_into_micro_batches_changes_neither_loss_nor_gradient(split):
    logp_S, old_logp_S, ref_logp_S = mixed_batch()
    logp_S.requires_grad_()
    whole = mixed_loss(logp_S, old_logp_S, ref_logp_S).loss
    parts = [mixed_loss(logp_S, old_logp_S, ref_logp_S, chosen).loss for chosen in split]
    torch.testing.assert_close(sum(parts), whole, **EXACT)
    (whole_gradient,) = torch.autograd.grad(whole, logp_S)
    (parts_gradient,) = torch.autograd.grad(sum(parts), logp_S)
    torch.testing.assert_close(parts_gradient, whole_gradient, **EXACT)


@given(st.permutations(range(10)))
def test_the_order_of_the_packed_tokens_does_not_matter(order):
    logp_S, old_logp_S, ref_logp_S = mixed_batch()
    sequence_S = torch.repeat_interleave(torch.tensor(LENGTHS))
    at_S = torch.tensor(order)
    rows = {"advantage_B": ADVANTAGES, "beta_B": BETAS, "delta_B": DELTAS, "clip_low_B": [0.2] * 4}
    arguments = {name: float64(row) for name, row in rows.items()} | {
        "clip_high_B": float64([0.2] * 4),
        "length_B": torch.tensor(LENGTHS),
        "num_trajectories": 4,
    }
    permuted = grpo_loss(logp_S[at_S], old_logp_S[at_S], ref_logp_S[at_S], sequence_S=sequence_S[at_S], **arguments)
    assert float(permuted.loss) == pytest.approx(float(mixed_loss(logp_S, old_logp_S, ref_logp_S).loss), abs=1e-12)


def test_the_statistics_are_of_each_trajectory_and_carry_no_gradient():
    # ratios 1, 1.5 | 0.5 with advantages 1 | -1, clip 0.2: surrogates 1, 1.2 | -0.8, clipped: the 2nd and the 3rd.
    old_logp_S = float64([-1.0, -1.0, -1.0])
    logp_S = (old_logp_S + float64([1.0, 1.5, 0.5]).log()).requires_grad_()
    result = loss_of(logp_S, old_logp_S, logp_S.detach(), [2, 1], [1.0, -1.0], beta=0.1, delta=0.5)
    torch.testing.assert_close(result.surrogate_B, float64([1.1, -0.8]))
    torch.testing.assert_close(result.kl_B, float64([0.0, 0.0]))
    torch.testing.assert_close(result.drift_B, float64([-math.log(1.5) / 2, math.log(2)]))
    torch.testing.assert_close(result.clip_share_B, float64([0.5, 1.0]))
    assert result.keep_B.tolist() == [True, False]  # log 2 = 0.69
    assert result.loss.requires_grad
    assert not any(row.requires_grad for row in (result.surrogate_B, result.kl_B, result.drift_B, result.clip_share_B))


def test_beta_zero_needs_no_reference_and_an_unused_reference_changes_nothing():
    logp_S, old_logp_S, ref_logp_S = mixed_batch()
    without = loss_of(logp_S, old_logp_S, None, LENGTHS, ADVANTAGES)
    with_reference = loss_of(logp_S, old_logp_S, ref_logp_S, LENGTHS, ADVANTAGES)
    assert torch.equal(without.loss, with_reference.loss)
    assert not without.kl_B.any()
    assert with_reference.kl_B.all()


def test_each_way_to_misuse_the_loss_is_refused_with_a_reason():
    logp_S, old_logp_S, _ = mixed_batch()
    broken_S = logp_S.clone()
    broken_S[2] = math.nan

    def refused(message: str, *packed, lengths=LENGTHS, **settings) -> None:
        with pytest.raises(ValueError, match=message):
            loss_of(*packed, lengths, ADVANTAGES, **settings)

    refused("beta is 0.5 but ref_logp_S is None", logp_S, old_logp_S, None, beta=[0.0, 0.5, 0.0, 0.0])
    refused("^logp_S holds 1 of 10 values that are not finite", broken_S, old_logp_S, None)
    refused("old_logp_S holds 1 of 10", logp_S, broken_S, None)
    refused("ref_logp_S holds 1 of 10", logp_S, old_logp_S, broken_S, beta=0.1)
    refused("num_trajectories .* got 0", logp_S, old_logp_S, None, num_trajectories=0)


def test_a_trajectory_of_which_only_a_part_is_here_is_refused():
    numbers = {name: torch.ones(1) for name in ("advantage_B", "clip_low_B", "clip_high_B", "beta_B", "delta_B")}
    with pytest.raises(ValueError, match="trajectory 0 has 5 sampled tokens but 3 are here"):
        grpo_loss(
            torch.zeros(3),
            torch.zeros(3),
            torch.zeros(3),
            sequence_S=torch.zeros(3, dtype=torch.int64),
            length_B=torch.tensor([5]),
            num_trajectories=1,
            **numbers,
        )
