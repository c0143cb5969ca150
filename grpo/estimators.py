"""The estimators of DeepSeek-V3.2's GRPO (arXiv 2512.02556), as pure functions of log-probabilities.

Shape suffixes: S = sampled tokens of all trajectories of a micro-batch, one after another; B = its trajectories;
G = episodes of one prompt; V = vocabulary. `sequence_S` (int64) holds the trajectory each token belongs to.

A trajectory is everything that shares one reward. Context management may split it into several segments; they
stay one sequence here, so a micro-batch must hold all of them: a mean over part of a trajectory is another number.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KlEstimator = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class GrpoLoss:
    """The loss of a micro-batch and, without gradient, what to log of each trajectory."""

    loss: Tensor
    """Scalar, to be minimised; the micro-batches of a batch add up to the batch's loss."""
    surrogate_B: Tensor
    """Mean clipped surrogate over the trajectory's tokens, before the off-policy mask."""
    kl_B: Tensor
    """Mean unbiased KL over the trajectory's tokens; 0 without a reference."""
    keep_B: Tensor
    """Whether the surrogate counted."""
    drift_B: Tensor
    """Mean of log(pi_old / pi) over the trajectory's tokens."""
    clip_share_B: Tensor
    """Share of the trajectory's tokens whose gradient the clip removed ..."""
    clip_low_share_B: Tensor
    """... of them those at the lower bound, of trajectories that failed."""

    def without_graph(self) -> "GrpoLoss":
        """The same without what a backward pass needs."""
        return replace(self, loss=self.loss.detach(), kl_B=self.kl_B.detach())


def group_advantage(reward_G: Tensor) -> Tensor:
    """Centre the rewards of one prompt's episodes: A_i = R_i - mean(R), not divided by the deviation.

    [DeepSeek-V3.2, eq. 5-6]. Equal rewards give exactly 0.

    Raises:
        ValueError: fewer than two rewards, or one that is not finite.

    Returns:
        [G].
    """
    if len(reward_G) < 2:
        raise ValueError(f"a group needs at least 2 rewards to centre them, got {len(reward_G)}")
    _check_finite(reward_G=reward_G)
    shifted_G = reward_G - reward_G[0]  # the mean of equal numbers may round; the mean of zeros does not
    return shifted_G - shifted_G.mean()


def clipped_surrogate(
    logp_S: Tensor, old_logp_S: Tensor, advantage_S: Tensor, clip_low_S: Tensor, clip_high_S: Tensor
) -> Tensor:
    """Clipped policy-gradient objective of each token, to be maximised.

        min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),   r = pi / pi_old

    [DeepSeek-V3.2, eq. 5-6]. pi_old is the probability the rollout engine returned. Scalars broadcast.

    Returns:
        [S].
    """
    ratio_S = (logp_S - old_logp_S).exp()
    clipped_S = ratio_S.clamp(1 - clip_low_S, 1 + clip_high_S)
    return torch.minimum(ratio_S * advantage_S, clipped_S * advantage_S)


def unbiased_kl(logp_S: Tensor, old_logp_S: Tensor, ref_logp_S: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) of each position from a token that pi_old sampled.

        (pi / pi_old) * (pi_ref / pi - log(pi_ref / pi) - 1)

    [DeepSeek-V3.2, eq. 7]. The mean under pi_old has the value and the gradient of the KL, because the leading
    ratio is in the graph and nothing is clamped. Which KL depends on what is passed: with all three normalised
    over the sampler's kept set it is the KL between the renormalised policies, with full-vocabulary
    log-probabilities (and a sampler without truncation) it is the KL over the vocabulary.

    Computed as pi_ref / pi_old - (pi / pi_old) * (1 + log(pi_ref / pi)): the first term is a constant, so autograd
    never subtracts two numbers of size pi_ref / pi to find a gradient of size log(pi_ref / pi).

    Returns:
        [S], non-negative but for rounding.
    """
    ratio_S = (logp_S - old_logp_S).exp()
    return (ref_logp_S - old_logp_S).exp() - ratio_S * (1 + ref_logp_S - logp_S)


def k1(logp_S: Tensor, ref_logp_S: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) as log(pi / pi_ref) from tokens that pi sampled. For comparison only.

    [Schulman, Approximating KL Divergence, 2020]. On-policy the mean is right; its gradient has mean 0.
    """
    return logp_S - ref_logp_S


def k2(logp_S: Tensor, ref_logp_S: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) as log(pi / pi_ref)^2 / 2 from tokens that pi sampled. For comparison only.

    [Schulman, Approximating KL Divergence, 2020]. The mean is biased; the gradient is right on-policy.
    """
    return (logp_S - ref_logp_S).square() / 2


def k3(logp_S: Tensor, ref_logp_S: Tensor) -> Tensor:
    """Estimate KL(pi || pi_ref) as pi_ref / pi - log(pi_ref / pi) - 1 from tokens that pi sampled. For comparison only.

    [Schulman, Approximating KL Divergence, 2020]. On-policy the mean is right; its gradient is that of
    KL(pi_ref || pi). Off-policy both are biased.
    """
    log_ratio_S = ref_logp_S - logp_S
    return log_ratio_S.expm1() - log_ratio_S


def mismatch_kl(logp_S: Tensor, old_logp_S: Tensor) -> Tensor:
    """Estimate KL(pi_old || pi) by k3 from tokens that pi_old sampled; on unchanged weights, engine against trainer.

    For logging: carries no gradient.

    Returns:
        [S], non-negative.
    """
    return k3(old_logp_S, logp_S.detach())


def full_kl(logits_SV: Tensor, ref_logits_SV: Tensor) -> Tensor:
    """Compute KL(pi || pi_ref) of each position exactly, over the whole vocabulary.

        sum_v pi(v) * log(pi(v) / pi_ref(v))

    Logits are those after temperature.

    Raises:
        ValueError: logits that are not finite.

    Returns:
        [S].
    """
    _check_finite(logits_SV=logits_SV, ref_logits_SV=ref_logits_SV)
    logp_SV, ref_logp_SV = logits_SV.log_softmax(-1), ref_logits_SV.log_softmax(-1)
    return (logp_SV.exp() * (logp_SV - ref_logp_SV)).sum(-1)


def drift(logp_S: Tensor, old_logp_S: Tensor, sequence_S: Tensor, num_trajectories: int) -> Tensor:
    """Mean over each trajectory's tokens of log(pi_old / pi): how far the policy moved away from what it sampled.

    [DeepSeek-V3.2, eq. 9]. Carries no gradient.

    Raises:
        ValueError: a trajectory without tokens, a token of no trajectory, log-probabilities that are not finite.

    Returns:
        [B], nats a token.
    """
    _check_finite(logp_S=logp_S, old_logp_S=old_logp_S)
    count_B = _token_counts(sequence_S, num_trajectories)
    return _sum_by_trajectory(old_logp_S - logp_S.detach(), sequence_S, num_trajectories) / count_B


def drift_percentile(drift_B: Tensor, q: float) -> float:
    """Choose delta from data: the value that q percent of the trajectories' drifts do not exceed.

    Raises:
        ValueError: q outside [0, 100], no trajectory, or a drift that is not finite.

    Returns:
        At least 0: a policy that only moved towards its samples has not drifted.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q is a percentage in [0, 100], got {q}")
    if len(drift_B) == 0:
        raise ValueError("no drift to take a percentile of: pass the drift of at least one trajectory")
    _check_finite(drift_B=drift_B)
    return max(0.0, float(torch.quantile(drift_B.double(), q / 100)))


def off_policy_keep(drift_B: Tensor, advantage_B: Tensor, delta_B: Tensor) -> Tensor:
    """Say which trajectories keep their surrogate: all but those that failed and drifted.

        M_i = 0  iff  A_i < 0  and  1/|o_i| sum_t log(pi_old / pi) > delta

    [DeepSeek-V3.2, eq. 8-9]. One decision for a whole trajectory, all its segments together, from its `drift`.

    Returns:
        [B] booleans, True to keep.
    """
    return (advantage_B >= 0) | (drift_B <= delta_B)


def grpo_loss(
    logp_S: Tensor,
    old_logp_S: Tensor,
    ref_logp_S: Tensor | None,
    *,
    sequence_S: Tensor,
    advantage_B: Tensor,
    length_B: Tensor,
    num_trajectories: int,
    clip_low_B: Tensor,
    clip_high_B: Tensor,
    beta_B: Tensor,
    delta_B: Tensor,
    kl: KlEstimator = unbiased_kl,
    kl_S: Tensor | None = None,
) -> GrpoLoss:
    """The objective of DeepSeek-V3.2, negated, over one micro-batch.

        1/num_trajectories sum_i 1/|o_i| sum_t ( beta_i KL_it - M_i min(r A_i, clip(r) A_i) )

    [DeepSeek-V3.2, eq. 5-9]. M multiplies the surrogate alone: the KL of a masked trajectory stays, and so do the
    divisors. Settings come per trajectory, because one batch mixes domains.

    Args:
        ref_logp_S: None when every beta is 0.
        length_B: |o_i|, sampled tokens of the whole trajectory.
        num_trajectories: the divisor, of the whole batch: over all micro-batches and ranks.
        delta_B: inf keeps every trajectory.
        kl: another estimator from (logp, old_logp, ref_logp), to compare.
        kl_S: the KL itself in place of an estimate, such as full_kl; ref_logp_S is not needed then.

    Raises:
        ValueError: log-probabilities that are not finite; a beta above 0 without a reference; a trajectory of
            which only a part is here.
    """
    reference_S = ref_logp_S if kl_S is None else kl_S
    _check_grpo_inputs(logp_S, old_logp_S, reference_S, sequence_S, length_B, num_trajectories, beta_B)
    return unchecked_grpo_loss(
        logp_S,
        old_logp_S,
        ref_logp_S,
        sequence_S=sequence_S,
        advantage_B=advantage_B,
        length_B=length_B,
        num_trajectories=num_trajectories,
        clip_low_B=clip_low_B,
        clip_high_B=clip_high_B,
        beta_B=beta_B,
        delta_B=delta_B,
        kl=kl,
        kl_S=kl_S,
    )


def unchecked_grpo_loss(
    logp_S: Tensor,
    old_logp_S: Tensor,
    ref_logp_S: Tensor | None,
    *,
    sequence_S: Tensor,
    advantage_B: Tensor,
    length_B: Tensor,
    num_trajectories: int,
    clip_low_B: Tensor,
    clip_high_B: Tensor,
    beta_B: Tensor,
    delta_B: Tensor,
    kl: KlEstimator = unbiased_kl,
    kl_S: Tensor | None = None,
) -> GrpoLoss:
    """grpo_loss of what is known to be whole: nothing is checked, because the host would wait for a GPU each time."""
    B = len(advantage_B)
    advantage_S, low_S, high_S = advantage_B[sequence_S], clip_low_B[sequence_S], clip_high_B[sequence_S]
    surrogate_S = clipped_surrogate(logp_S, old_logp_S, advantage_S, low_S, high_S)
    if kl_S is None:
        kl_S = torch.zeros_like(logp_S) if ref_logp_S is None else kl(logp_S, old_logp_S, ref_logp_S)
    drift_B = _sum_by_trajectory(old_logp_S - logp_S.detach(), sequence_S, B) / length_B
    keep_B = off_policy_keep(drift_B, advantage_B, delta_B)

    loss_S = beta_B[sequence_S] * kl_S - keep_B[sequence_S] * surrogate_S
    loss = (loss_S / length_B[sequence_S]).sum() / num_trajectories

    def mean_B(x_S: Tensor) -> Tensor:
        return _sum_by_trajectory(x_S.detach().to(logp_S.dtype), sequence_S, B) / length_B

    clipped_S = surrogate_S.detach() < (logp_S.detach() - old_logp_S).exp() * advantage_S
    clipped_low_S = clipped_S & (advantage_S < 0)
    return GrpoLoss(
        loss=loss,
        surrogate_B=mean_B(surrogate_S),
        kl_B=mean_B(kl_S),
        keep_B=keep_B,
        drift_B=drift_B,
        clip_share_B=mean_B(clipped_S),
        clip_low_share_B=mean_B(clipped_low_S),
    )


def _check_grpo_inputs(
    logp_S: Tensor,
    old_logp_S: Tensor,
    ref_logp_S: Tensor | None,
    sequence_S: Tensor,
    length_B: Tensor,
    num_trajectories: int,
    beta_B: Tensor,
) -> None:
    _check_finite(logp_S=logp_S, old_logp_S=old_logp_S, beta_B=beta_B)
    if ref_logp_S is not None:
        _check_finite(ref_logp_S=ref_logp_S)
    elif (beta_B > 0).any():
        raise ValueError(f"beta is {float(beta_B.max())} but ref_logp_S is None: pass the reference, or set beta to 0")
    if num_trajectories < 1:
        raise ValueError(f"num_trajectories divides the loss and must be at least 1, got {num_trajectories}")
    here_B = _token_counts(sequence_S, len(length_B))
    if not torch.equal(here_B, length_B.to(here_B.dtype)):
        i = int((here_B != length_B).nonzero()[0])
        raise ValueError(
            f"trajectory {i} has {int(length_B[i])} sampled tokens but {int(here_B[i])} are here: "
            "keep all segments of a trajectory in one micro-batch"
        )


def _check_finite(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        finite = tensor.isfinite()
        if not finite.all():
            count = tensor.numel() - int(finite.sum())
            raise ValueError(f"{name} holds {count} of {tensor.numel()} values that are not finite")


def _token_counts(sequence_S: Tensor, num_trajectories: int) -> Tensor:
    count_B = torch.bincount(sequence_S, minlength=num_trajectories)
    if len(count_B) > num_trajectories:
        raise ValueError(f"sequence_S names trajectory {len(count_B) - 1} but there are {num_trajectories}")
    if (count_B == 0).any():
        i = int((count_B == 0).nonzero()[0])
        raise ValueError(f"trajectory {i} of {num_trajectories} has no sampled token: drop it before packing")
    return count_B


def _sum_by_trajectory(x_S: Tensor, sequence_S: Tensor, num_trajectories: int) -> Tensor:
    return x_S.new_zeros(num_trajectories).index_add(0, sequence_S, x_S)
