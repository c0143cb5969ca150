"""One policy under optimisation: minibatches in, weights and statistics out."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trimtab.grpo.batch import Packed, Trajectory, minibatches, pack
from trimtab.grpo.config import Config
from trimtab.grpo.estimators import GrpoLoss, grpo_loss, k3, mismatch_kl, unbiased_kl
from trimtab.grpo.policy import Policy
from trimtab.kernels import reference


@dataclass(slots=True)
class Sums:
    """Sums over the trajectories of a step, and what they are divided by."""

    totals: dict[str, float] = field(default_factory=dict)
    trajectories: int = 0
    drift: list[float] = field(default_factory=list)

    def add(self, loss: GrpoLoss, packed: Packed) -> None:
        self.trajectories += len(packed.names)
        self.drift += loss.drift_B.tolist()
        parts = {"kl": loss.kl_B, "clip_share": loss.clip_share_B, "masked": 1.0 - loss.keep_B.float()}
        for name, value_B in parts.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value_B.sum())


class Trainer:
    """The policy, its frozen reference and the optimiser of a run."""

    def __init__(self, config: Config, policy: Policy, reference_policy: Policy | None, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99))
        self.policy, self.optimizer = accelerator.prepare(policy, optimizer)
        self.reference = reference_policy

    def train_on(self, batch: Sequence[Trajectory], step: int) -> dict[str, Any]:
        """One epoch over a rollout batch in config.minibatches optimiser steps.

        Returns:
            Metrics. mismatch_kl comes from the first mini-batch alone: there the weights are those that sampled.
        """
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * min(1.0, (step + 1) / (self.config.warmup_steps + 1))
        sums = Sums()
        metrics: dict[str, Any] = {}
        mismatch: list[Tensor] = []
        norms: list[float] = []
        for i, minibatch in enumerate(minibatches(batch, self.config.minibatches, seed=self.config.seed + step)):
            self.optimizer.zero_grad()
            for packed in pack(minibatch, self.config.tokens_per_microbatch):
                logp_S = self._backward(packed, len(minibatch), sums)
                if i == 0:
                    mismatch.append(mismatch_kl(logp_S, packed.old_logp_S.to(logp_S.device)))
            norms.append(float(self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)))
            if not math.isfinite(norms[-1]):
                raise RuntimeError(f"the gradient's norm is {norms[-1]} at step {step}; the last checkpoint is whole")
            self.optimizer.step()
        drift = torch.tensor(sums.drift)
        metrics |= {name: total / sums.trajectories for name, total in sums.totals.items()}
        metrics |= {f"drift_p{q}": float(drift.quantile(q / 100)) for q in (50, 90, 99)}
        metrics["mismatch_kl"] = float(torch.cat(mismatch).mean())
        metrics["mismatch_log_ratio_max"] = float(torch.cat(mismatch).max().mul(2).sqrt())
        metrics["grad_norm"] = sum(norms) / len(norms)
        metrics["seconds_train"] = time.perf_counter() - started
        metrics["train_tokens_per_s"] = sum(t.num_tokens for t in batch) / metrics["seconds_train"]
        return metrics

    def _backward(self, packed: Packed, num_trajectories: int, sums: Sums) -> Tensor:
        packed = packed.to(self.accelerator.device)
        logp_S, indexer_kl = self._logp(self.policy, packed, replay=True)
        ref_logp_S = None
        if self.reference is not None:
            with torch.no_grad():
                ref_logp_S, _ = self._logp(self.reference, packed, replay=False)
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
        )
        share = len(packed.names) / num_trajectories
        self.accelerator.backward(loss.loss + self.config.indexer_kl * share * indexer_kl)
        sums.add(loss, packed)
        return logp_S.detach()
