"""One policy under optimisation: minibatches in, weights and statistics out."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trimtab.grpo.batch import Packed, Trajectory, minibatches, pack
from trimtab.grpo.config import Config
from trimtab.grpo.estimators import GrpoLoss, KlEstimator, grpo_loss, k3, mismatch_kl, unbiased_kl
from trimtab.grpo.policy.policy import Policy
from trimtab.kernels import reference

OPTIMIZER_FILE = "optimizer.pt"
KL_ESTIMATORS: dict[str, KlEstimator] = {
    "unbiased": unbiased_kl,
    "k3": lambda logp_S, old_logp_S, ref_logp_S: k3(logp_S, ref_logp_S),
}


@dataclass(slots=True)
class Sums:
    """Sums over the trajectories of a step, and what they are divided by."""

    totals: dict[str, float] = field(default_factory=dict)
    trajectories: int = 0
    indexer_kl: float = 0.0
    drift: list[float] = field(default_factory=list)

    def add(self, name: str, total: float) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + total

    def add_loss(self, loss: GrpoLoss) -> None:
        self.trajectories += len(loss.keep_B)
        self.drift += loss.drift_B.tolist()
        self.add("kl", float(loss.kl_B.sum()))
        self.add("clip_share", float(loss.clip_share_B.sum()))
        self.add("masked", float((~loss.keep_B).sum()))


def schedule(step: int, config: Config) -> float:
    """The learning rate's factor: a linear rise over the warm-up, a linear fall to lr_end_share at the last step."""
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return rise * (1.0 - (1.0 - config.lr_end_share) * step / config.steps)


class Trainer:
    """The policy, its frozen reference and the optimiser of a run."""

    def __init__(self, config: Config, policy: Policy, reference_policy: Policy | None, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99))
        self.policy, self.optimizer = accelerator.prepare(policy, optimizer)
        self.reference = None if reference_policy is None else reference_policy.to(accelerator.device)

    def train_on(self, batch: Sequence[Trajectory], step: int) -> dict[str, Any]:
        """One epoch over a rollout batch in config.minibatches optimiser steps.

        The objective is a mean over the trajectories of a mini-batch. Groups without signal are not among them: they
        would only lower the learning rate of the steps in which they are many.

        Returns:
            Metrics. mismatch_kl comes from the first mini-batch alone: there the weights are those that sampled.

        Raises:
            ValueError: nothing to train on.
        """
        if not batch:
            raise ValueError("no group has rewards that differ: there is nothing to learn from")
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * schedule(step, self.config)
        sums = Sums()
        metrics: dict[str, Any] = {}
        mismatch: list[Tensor] = []
        log_ratio_max = 0.0
        norms: list[float] = []
        for i, minibatch in enumerate(minibatches(batch, self.config.minibatches, seed=self.config.seed + step)):
            self.optimizer.zero_grad()
            num_tokens = sum(trajectory.num_tokens for trajectory in minibatch)
            for packed in pack(minibatch, self.config.tokens_per_microbatch):
                logp_S = self._backward(packed, len(minibatch), num_tokens, sums)
                if i == 0:
                    old_logp_S = packed.old_logp_S.to(logp_S.device)
                    mismatch.append(mismatch_kl(logp_S, old_logp_S))
                    log_ratio_max = max(log_ratio_max, float((logp_S - old_logp_S).abs().max()))
            norms.append(float(self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)))
            if not math.isfinite(norms[-1]):
                raise RuntimeError(f"the gradient's norm is {norms[-1]} at step {step}; the last checkpoint is whole")
            self.optimizer.step()
        drift = torch.tensor(sums.drift)
        metrics |= {name: total / sums.trajectories for name, total in sums.totals.items()}
        metrics["indexer_kl"] = sums.indexer_kl / sums.trajectories
        metrics |= {f"drift_p{q}": float(drift.quantile(q / 100)) for q in (50, 90, 99)}
        metrics["mismatch_kl"] = float(torch.cat(mismatch).mean())
        metrics["mismatch_log_ratio_max"] = log_ratio_max
        metrics["grad_norm"] = sum(norms) / len(norms)
        metrics["seconds_train"] = time.perf_counter() - started
        metrics["train_tokens_per_s"] = sum(t.num_tokens for t in batch) / metrics["seconds_train"]
        return metrics

    def _backward(self, packed: Packed, num_trajectories: int, num_tokens: int, sums: Sums) -> Tensor:
        """Add one pack's share to the gradient; the counts are the whole mini-batch's, so the split does not matter."""
        packed = packed.to(self.accelerator.device)
        routes_NLK = packed.routes_NLK if self.config.keep_routing else None
        learn_indexer = self.policy.sparse and self.config.indexer_kl > 0
        out = self.policy(packed.ids_N, packed.cu_seqlens, routes_NLK=routes_NLK, with_indexer_kl=learn_indexer)
        logp_S = self._logp(self.policy, out.hidden_ND, packed)
        ref_logp_S = None
        if self.reference is not None:  # its own routing: it is a policy of its own, not a replay of this one
            with torch.no_grad():
                hidden_ND = self.reference(packed.ids_N, packed.cu_seqlens).hidden_ND
                ref_logp_S = self._logp(self.reference, hidden_ND, packed)
        loss = grpo_loss(
            logp_S,
            packed.old_logp_S,
            ref_logp_S,
            sequence_S=packed.sequence_S,
            advantage_B=packed.advantage_B,
            length_B=packed.length_B,
            num_trajectories=num_trajectories,
            clip_low_B=packed.clip_low_B,
            clip_high_B=packed.clip_high_B,
            beta_B=packed.beta_B,
            delta_B=packed.delta_B,
            kl=KL_ESTIMATORS[self.config.kl],
        )
        total = loss.loss
        if out.indexer_kl_N is not None:
            total = total + self.config.indexer_kl * out.indexer_kl_N.sum() / num_tokens
            sums.indexer_kl += float(out.indexer_kl_N.detach().mean()) * len(packed.names)
        self.accelerator.backward(total)
        sums.add_loss(loss)
        return logp_S.detach()

    def _logp(self, policy: Policy, hidden_ND: Tensor, packed: Packed) -> Tensor:
        hidden_SD = hidden_ND.index_select(0, packed.predict_S)
        temperature = self.config.sampling.temperature
        full_logp, kept_logp = reference.full_logp, reference.kept_logp
        if hidden_SD.is_cuda:
            from trimtab.kernels.lm_head import full_logp, kept_logp
        if not self.config.keep_sampling_mask:
            return full_logp(hidden_SD, policy.head_weight, packed.token_S, temperature)
        return kept_logp(
            hidden_SD, policy.head_weight, packed.token_S, packed.kept_id_E, packed.kept_offset_S, temperature
        )

    def weights(self) -> dict[str, Tensor]:
        """The policy's weights under transformers' names, on the CPU."""
        return {name: weight.cpu() for name, weight in self.accelerator.unwrap_model(self.policy).weights().items()}

    def save(self, path: Path) -> None:
        """Write a transformers checkpoint and the optimiser's state."""
        self.accelerator.unwrap_model(self.policy).save(path)
        torch.save(self.optimizer.state_dict(), path / OPTIMIZER_FILE)

    def load_optimizer(self, path: Path) -> None:
        """Read the optimiser's state of a checkpoint that `save` wrote."""
        self.optimizer.load_state_dict(torch.load(path / OPTIMIZER_FILE, weights_only=True))
