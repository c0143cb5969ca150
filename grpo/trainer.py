"""One policy under optimisation: minibatches in, weights and statistics out."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trimtab.grpo.batch import Packed, Trajectory, minibatches, pack
from trimtab.grpo.config import Config, LossSettings
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.estimators import GrpoLoss, KlEstimator, k3, mismatch_kl, unbiased_kl, unchecked_grpo_loss
from trimtab.grpo.policy.lora import adapters, save_adapter, without_adapters
from trimtab.grpo.policy.offload import Shelf
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.policy.shard import (
    clip_gradients,
    compute_dtype,
    load_optimizer_state,
    masters,
    optimizer_state,
    round_frozen,
    shard,
    stream,
    whole,
    without_gradient,
)
from trimtab.kernels import reference
from trimtab.rollout.types import Segment

OPTIMIZER_FILE = "optimizer.pt"
KL_ESTIMATORS: dict[str, KlEstimator] = {
    "unbiased": unbiased_kl,
    "k3": lambda logp_S, old_logp_S, ref_logp_S: k3(logp_S, ref_logp_S),
}


@dataclass(slots=True)
class Record:
    """What the packs of a step gave, left on the device until the step is over: reading it makes the host wait."""

    losses: list[GrpoLoss] = field(default_factory=list)
    indexer_kl_N: list[Tensor] = field(default_factory=list)
    trajectories: list[int] = field(default_factory=list)
    entropy_S: list[Tensor] = field(default_factory=list)
    mismatch_S: list[Tensor] = field(default_factory=list)
    """log(pi / pi_old) where the weights are still those that sampled."""

    def metrics(self) -> dict[str, float]:
        def joined(name: str) -> Tensor:
            return torch.cat([getattr(loss, name) for loss in self.losses]).float()

        log_ratio_S = torch.cat(self.mismatch_S)
        values = {
            "kl": joined("kl_B").mean(),
            "clip_share": joined("clip_share_B").mean(),
            "masked": 1 - joined("keep_B").mean(),
            "mismatch_kl": mismatch_kl(log_ratio_S, torch.zeros_like(log_ratio_S)).mean(),
            "mismatch_log_ratio_max": log_ratio_S.abs().max(),
        }
        drift_B = joined("drift_B")
        values |= {f"drift_p{q}": drift_B.quantile(q / 100) for q in (50, 90, 99)}
        if self.indexer_kl_N:
            means = zip(self.indexer_kl_N, self.trajectories, strict=True)
            values["indexer_kl"] = torch.stack([kl_N.mean() * n for kl_N, n in means]).sum() / sum(self.trajectories)
        if self.entropy_S:
            values["entropy"] = torch.cat(self.entropy_S).mean()
        numbers = torch.stack([value.float() for value in values.values()]).tolist()
        return {"indexer_kl": 0.0} | dict(zip(values, numbers, strict=True))


def schedule(step: int, config: Config) -> float:
    """The learning rate's factor: a linear rise over the warm-up, a linear fall to lr_end_share at the last step."""
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return rise * (1.0 - (1.0 - config.lr_end_share) * step / config.steps)


class Diverged(RuntimeError):
    """A gradient is not finite: the weights of this step would be lost."""


class Trainer:
    """The policy, its frozen reference and the optimiser of a run."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        reference_policy: Policy | None,
        accelerator: Accelerator,
        clock: Clock | None = None,
    ):
        """Both policies are given in fp32; one with adapters is its own reference."""
        self.config, self.accelerator = config, accelerator
        self.device: torch.device = accelerator.device
        on_gpu = self.device.type == "cuda"
        self.clock = clock or Clock(torch.cuda.synchronize if on_gpu else None)
        dtype = compute_dtype(config.precision, self.device)
        self.policy = shard(round_frozen(policy, dtype), dtype=dtype, device=self.device)
        self.learning = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.learning, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99), fused=on_gpu or None
        )
        self.reference: Policy | None = None
        if reference_policy is not None:
            self.reference = round_frozen(reference_policy.requires_grad_(False), dtype).to(self.device)
        self._shelve()

    def _shelve(self) -> None:
        """What config.offload names: the reference outside its pass, the optimiser's state outside its step, and
        the master weights outside an update."""
        offload, reference_policy = self.config.offload, self.reference
        self._shelves: dict[str, Shelf] = {}
        if offload in ("reference", "all") and reference_policy is not None:
            self._shelves["reference"] = Shelf(reference_policy.parameters, constant=True)
            self._shelves["reference"].rest()
        if offload in ("optimizer", "all"):
            self._shelves["optimizer"] = Shelf(self._moments)
        if offload == "all":
            self._shelves["masters"] = Shelf(self.policy.parameters)

    def _moments(self) -> Iterator[Tensor]:
        states = self.optimizer.state.values()
        return (value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim())

    def train_on(self, batch: Sequence[Trajectory], step: int) -> dict[str, Any]:
        """One epoch over a rollout batch in config.minibatches optimiser steps.

        The objective is a mean over the trajectories of a mini-batch. Groups without signal are not among them: they
        would only lower the learning rate of the steps in which they are many. The reference reads the whole batch
        before the first step, so that it needs no room beside the backward pass.

        Returns:
            Metrics. mismatch_kl comes from the first mini-batch alone: there the weights are those that sampled.

        Raises:
            ValueError: nothing to train on.
        """
        if not batch:
            raise ValueError("no group has rewards that differ: there is nothing to learn from")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * schedule(step, self.config)
        with self.clock.phase("packing"):
            parts = minibatches(batch, self.config.minibatches, seed=self.config.seed + step)
            packs = [self._packs(part) for part in parts]
        with self.clock.phase("reference"):
            ref_logps = self._ref_logps(packs)
        record, norms = Record(), []
        for part, packs_of_part, refs in zip(parts, packs, ref_logps, strict=True):
            norms.append(self._step(part, packs_of_part, refs, record, step))
        metrics: dict[str, Any] = record.metrics()
        metrics["grad_norm"] = sum(norms) / len(norms)
        return metrics

    def _packs(self, part: Sequence[Trajectory]) -> list[Packed]:
        packs = pack(part, self.config.tokens_per_microbatch)
        largest = max(int(packed.kept_id_E.max()) for packed in packs)
        if largest >= self.policy.config.vocab_size:
            raise ValueError(f"kept id {largest} is outside the vocabulary of {self.policy.config.vocab_size}")
        return [packed.pinned() for packed in packs] if self.device.type == "cuda" else packs

    def _ref_logps(self, packs: Sequence[Sequence[Packed]]) -> list[list[Tensor | None]]:
        """The reference's log-probabilities, by mini-batch and pack."""
        if not self.config.needs_reference:
            return [[None] * len(part) for part in packs]
        shelf = self._shelves.get("reference")
        adapted = bool(adapters(self.policy))
        with shelf.taken_down() if shelf else nullcontext(), without_adapters(self.policy):
            policy = self.policy if adapted or self.reference is None else self.reference
            with without_gradient(policy):
                return [[self._read(policy, packed.to(self.device))[0] for packed in part] for part in packs]

    def _step(
        self,
        part: Sequence[Trajectory],
        packs: Sequence[Packed],
        refs: Sequence[Tensor | None],
        record: Record,
        step: int,
    ) -> float:
        """One optimiser step. Returns the gradient's norm before it is clipped."""
        num_tokens = sum(trajectory.num_tokens for trajectory in part)
        first = not record.losses
        with self.clock.phase("forward and backward"):
            for packed, ref_logp_S in zip(packs, refs, strict=True):
                log_ratio_S = self._backward(packed.to(self.device), ref_logp_S, len(part), num_tokens, record)
                record.mismatch_S += [log_ratio_S] if first else []
            norm = float(clip_gradients(self.learning, self.config.max_grad_norm))
        if not math.isfinite(norm):
            raise Diverged(f"the gradient's norm is {norm} at step {step}")
        shelf = self._shelves.get("optimizer")
        with self.clock.phase("optimiser"), shelf.taken_down() if shelf else nullcontext():
            self.optimizer.step()
            self.optimizer.zero_grad()
        return norm

    def _backward(
        self, packed: Packed, ref_logp_S: Tensor | None, num_trajectories: int, num_tokens: int, record: Record
    ) -> Tensor:
        """Add one pack's share to the gradient; the counts are the whole mini-batch's, so the split does not matter.

        Returns:
            log(pi / pi_old) [S].
        """
        logp_S, entropy_S, indexer_kl_N = self._read(self.policy, packed, routed=self.config.keep_routing, learn=True)
        loss = unchecked_grpo_loss(
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
        if indexer_kl_N is not None:
            total = total + self.config.indexer_kl * indexer_kl_N.sum() / num_tokens
            record.indexer_kl_N.append(indexer_kl_N.detach())
        total.backward()
        record.losses.append(replace(loss, loss=loss.loss.detach()))
        record.trajectories.append(len(packed.names))
        record.entropy_S += [] if entropy_S is None else [entropy_S]
        return logp_S.detach() - packed.old_logp_S

    def _read(
        self, policy: Policy, packed: Packed, *, routed: bool = False, masked: bool | None = None, learn: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities [S], entropies [S] where they cost nothing, and the indexer's KL [N] if it is to learn.

        Args:
            routed: use the engine's experts; else a policy routes for itself, as a reference does.
            masked: normalise over the kept sets; None: as the configuration says.
        """
        out = policy(
            packed.ids_N,
            packed.cu_seqlens,
            lengths=packed.lengths,
            routes_NLK=packed.routes_NLK if routed else None,
            with_indexer_kl=learn and self._learns_indexer,
        )
        hidden_SD = out.hidden_ND.index_select(0, packed.predict_S)
        masked = self.config.keep_sampling_mask if masked is None else masked
        logp_S, entropy_S = self._logp(policy, hidden_SD, packed, masked)
        return logp_S, entropy_S, out.indexer_kl_N

    @property
    def _learns_indexer(self) -> bool:
        learning = any(parameter.requires_grad for parameter in self.policy.indexer_parameters())
        return self.policy.sparse and self.config.indexer_kl > 0 and learning

    def _logp(self, policy: Policy, hidden_SD: Tensor, packed: Packed, masked: bool) -> tuple[Tensor, Tensor | None]:
        head_VD, temperature = policy.head_weight, self.config.sampling.temperature
        kept = (packed.token_S, packed.kept_id_E, packed.kept_offset_S, temperature)
        if hidden_SD.is_cuda:
            from trimtab.kernels.lm_head import full_logp_entropy, kept_logp_entropy

            if masked:
                return kept_logp_entropy(hidden_SD, head_VD, *kept)
            return full_logp_entropy(hidden_SD, head_VD, packed.token_S, temperature)
        if masked:
            return reference.kept_logp(hidden_SD, head_VD, *kept), None
        return reference.full_logp(hidden_SD, head_VD, packed.token_S, temperature), None

    def score(self, segment: Segment) -> Tensor:
        """Log-probabilities [S] of what was sampled in a segment under the weights as they are now, on the CPU.

        Whatever the loss replays, they are those that an engine with these weights records: over the kept sets, with
        the experts that it ran.
        """
        lone = Trajectory(name=segment.name, domain="", segments=(segment,), advantage=0.0, settings=LossSettings())
        (packed,) = pack([lone], len(segment.token_ids))
        with self._awake(), without_gradient(self.policy):
            return self._read(self.policy, packed.to(self.device), routed=True, masked=True)[0].cpu()

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that engines must have (shard.stream)."""
        with self._awake():
            yield from stream(self.policy)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """The master weights on the device inside, also where they rest."""
        shelf = self._shelves.get("masters")
        with shelf.taken_down() if shelf and shelf.resting else nullcontext():
            yield

    def rest(self) -> None:
        """Leave the device to others: what config.offload names, and what torch keeps of memory it does not use."""
        for shelf in self._shelves.values():
            shelf.rest()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def resume(self) -> None:
        """Take back what an update needs from its beginning: the master weights."""
        if shelf := self._shelves.get("masters"):
            shelf.resume()

    def save(self, path: Path) -> None:
        """Write the master weights as a transformers checkpoint, or the adapter alone, and the optimiser's state."""
        if adapters(self.policy):
            learnt = ((name, weight) for name, weight in self.policy.model.named_parameters() if weight.requires_grad)
            with self._awake():
                save_adapter(self.policy, {name: whole(weight) for name, weight in learnt}, path)
        else:
            self.save_merged(path)
        with self._shelves["optimizer"].taken_down() if "optimizer" in self._shelves else nullcontext():
            torch.save(optimizer_state(self.optimizer), path / OPTIMIZER_FILE)

    def save_merged(self, path: Path) -> None:
        """Write a transformers checkpoint of the policy as a whole, an adapter merged into the weights."""
        with self._awake():
            self.policy.save(path, masters(self.policy))

    def load_optimizer(self, path: Path) -> None:
        """Read the optimiser's state of a checkpoint that `save` wrote."""
        load_optimizer_state(self.optimizer, torch.load(path / OPTIMIZER_FILE, weights_only=True))
