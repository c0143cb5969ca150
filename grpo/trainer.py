"""One policy under optimisation: minibatches in, weights and statistics out."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trimtab.grpo.batch import Packed, Trajectory, minibatches, pack
from trimtab.grpo.config import Config, LossSettings, percentile
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.estimators import KlEstimator, drift_percentile, k3, unbiased_kl, unchecked_grpo_loss
from trimtab.grpo.policy.learner import Learner, Optimisation
from trimtab.grpo.policy.lora import adapters, without_adapters
from trimtab.grpo.policy.offload import Shelf
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.policy.shard import compute_dtype, round_frozen, without_gradient
from trimtab.grpo.record import Record
from trimtab.grpo.schedule import lr_factor
from trimtab.kernels import reference
from trimtab.rollout.types import Segment

DELTAS_FILE = "deltas.json"
KL_ESTIMATORS: dict[str, KlEstimator] = {
    "unbiased": unbiased_kl,
    "k3": lambda logp_S, old_logp_S, ref_logp_S: k3(logp_S, ref_logp_S),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a policy makes of a pack."""

    logp_S: Tensor
    entropy_S: Tensor
    """Of the kept sets, or of the whole vocabulary where they are not replayed; without gradient."""
    hidden_SD: Tensor
    indexer_kl_N: Tensor | None


class Trainer(Learner):
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
        dtype = compute_dtype(config.precision, accelerator.device)
        optimisation = Optimisation(
            lr=config.lr,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            offload=config.offload,
        )
        device = accelerator.device
        super().__init__(round_frozen(policy, dtype), optimisation, device=device, dtype=dtype, clock=clock)
        self.reference: Policy | None = None
        if reference_policy is not None:
            self.reference = round_frozen(reference_policy.requires_grad_(False), dtype).to(self.device)
        self.deltas: dict[str, float] = {}
        """For domains whose delta is a percentile, its value in the rollout batch before."""
        if config.offload in ("reference", "all") and self.reference is not None:
            self._shelves["reference"] = Shelf(self.reference.parameters, constant=True)
            self._shelves["reference"].rest()

    def train_on(self, batch: Sequence[Trajectory], step: int) -> dict[str, Any]:
        """One epoch over a rollout batch in config.minibatches optimiser steps.

        The objective is a mean over the trajectories of a mini-batch, those included that have neither advantage nor KL
        and are not computed. The reference reads the whole batch before the first step, so that it needs no room beside
        the backward pass.

        Returns:
            Metrics. mismatch_kl comes from the first mini-batch alone: there the weights are those that sampled.

        Raises:
            ValueError: nothing to train on.
        """
        if not any(trajectory.has_gradient for trajectory in batch):
            raise ValueError("no group has rewards that differ, and no KL pulls: there is nothing to learn from")
        config = self.config
        lr = config.lr * lr_factor(
            step, steps=config.steps, warmup_steps=config.warmup_steps, end_share=config.lr_end_share
        )
        self.set_lr(lr)
        with self.clock.phase("packing"):
            batch = [self._with_delta(trajectory) for trajectory in batch]
            parts = minibatches(batch, config.minibatches, seed=config.seed + step)
            packs = [self._packs([one for one in part if one.has_gradient]) for part in parts]
        with self.clock.phase("reference"):
            references = self._references(packs)
        record = Record()
        for part, packs_of_part, refs in zip(parts, packs, references, strict=True):
            if packs_of_part:
                self._step(part, packs_of_part, refs, record, step)
        self._choose_deltas(record)
        return record.metrics() | {"lr": lr}

    def _with_delta(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with a number for delta."""
        if not isinstance(trajectory.settings.delta, str):
            return trajectory
        return replace(trajectory, settings=replace(trajectory.settings, delta=self.deltas.get(trajectory.domain)))

    def _choose_deltas(self, record: Record) -> None:
        for name, domain in self.config.domains.items():
            drift_B = record.of_domain("drift", name)
            if isinstance(domain.loss.delta, str) and len(drift_B):
                self.deltas[name] = drift_percentile(torch.from_numpy(drift_B), percentile(domain.loss.delta))

    def _packs(self, part: Sequence[Trajectory]) -> list[Packed]:
        packs = pack(part, self.config.tokens_per_microbatch)
        if not packs:
            return []
        largest = max(int(packed.kept_id_E.max()) for packed in packs)
        if largest >= self.policy.config.vocab_size:
            raise ValueError(f"kept id {largest} is outside the vocabulary of {self.policy.config.vocab_size}")
        return [packed.pinned() for packed in packs] if self.device.type == "cuda" else packs

    def _references(self, packs: Sequence[Sequence[Packed]]) -> list[list[Tensor | None]]:
        """By mini-batch and pack, the reference's log-probabilities [S]; for the full KL its hidden states [S, D]."""
        if not self.config.needs_reference:
            return [[None] * len(part) for part in packs]
        with self._as_reference() as policy:
            read = self._hidden if self.config.kl == "full" else self._logp_of
            return [[read(policy, packed.to(self.device)) for packed in part] for part in packs]

    @contextmanager
    def _as_reference(self) -> Iterator[Policy]:
        """The reference on the device, without gradient."""
        shelf = self._shelves.get("reference")
        adapted = bool(adapters(self.policy))
        with shelf.taken_down() if shelf else nullcontext(), without_adapters(self.policy):
            policy = self.policy if adapted or self.reference is None else self.reference
            with without_gradient(policy):
                yield policy

    def _hidden(self, policy: Policy, packed: Packed) -> Tensor:
        hidden_ND = policy(packed.ids_N, packed.cu_seqlens, lengths=packed.lengths).hidden_ND
        return hidden_ND.index_select(0, packed.predict_S)

    def _logp_of(self, policy: Policy, packed: Packed) -> Tensor:
        return self._read(policy, packed).logp_S

    def _step(
        self,
        part: Sequence[Trajectory],
        packs: Sequence[Packed],
        refs: Sequence[Tensor | None],
        record: Record,
        step: int,
    ) -> None:
        """One optimiser step."""
        num_tokens = sum(trajectory.num_tokens for trajectory in part if trajectory.has_gradient)
        first = not record.losses
        with self.clock.phase("forward and backward"):
            for packed, reference_S in zip(packs, refs, strict=True):
                log_ratio_S = self._backward(packed.to(self.device), reference_S, len(part), num_tokens, record)
                record.mismatch_S += [log_ratio_S] if first else []
            record.norms.append(self.clip(step))
        self.optimise()

    def _backward(
        self, packed: Packed, reference_S: Tensor | None, num_trajectories: int, num_tokens: int, record: Record
    ) -> Tensor:
        """Add one pack's share to the gradient; the counts are the whole mini-batch's, so the split does not matter.

        Returns:
            log(pi / pi_old) [S].
        """
        full = self.config.kl == "full"
        read = self._read(self.policy, packed, routed=self.config.keep_routing, learn=True)
        kl_S = self._full_kl(read.hidden_SD, reference_S) if full and reference_S is not None else None
        loss = unchecked_grpo_loss(
            read.logp_S,
            packed.old_logp_S,
            None if full else reference_S,
            sequence_S=packed.sequence_S,
            advantage_B=packed.advantage_B,
            length_B=packed.length_B,
            num_trajectories=num_trajectories,
            clip_low_B=packed.clip_low_B,
            clip_high_B=packed.clip_high_B,
            beta_B=packed.beta_B,
            delta_B=packed.delta_B,
            kl=KL_ESTIMATORS.get(self.config.kl, unbiased_kl),
            kl_S=kl_S,
        )
        total = loss.loss
        if read.indexer_kl_N is not None:
            total = total + self.config.indexer_kl * read.indexer_kl_N.sum() / num_tokens
        total.backward()
        record.add(packed, loss, read.entropy_S, read.indexer_kl_N)
        return read.logp_S.detach() - packed.old_logp_S

    def _full_kl(self, hidden_SD: Tensor, ref_hidden_SD: Tensor) -> Tensor:
        """The KL to the reference over the whole vocabulary, [S]."""
        reference_policy = self.reference or self.policy
        heads = (self.policy.head_weight, reference_policy.head_weight.detach())
        temperature = self.config.sampling.temperature
        if hidden_SD.is_cuda:
            from trimtab.kernels.lm_head import full_kl

            return full_kl(hidden_SD, ref_hidden_SD, *heads, temperature)
        return reference.full_kl(hidden_SD, ref_hidden_SD, *heads, temperature)

    def _read(
        self, policy: Policy, packed: Packed, *, routed: bool = False, masked: bool | None = None, learn: bool = False
    ) -> Reading:
        """Read a pack.

        Args:
            routed: use the engine's experts; else a policy routes for itself, as a reference does.
            masked: normalise over the kept sets; None: as the configuration says.
            learn: the indexer's KL too, if it is to learn.
        """
        out = policy(
            packed.ids_N,
            packed.cu_seqlens,
            lengths=packed.lengths,
            routes_NLK=packed.routes_NLK if routed else None,
            with_indexer_kl=learn and self.learns_indexer and self.config.indexer_kl > 0,
        )
        hidden_SD = out.hidden_ND.index_select(0, packed.predict_S)
        masked = self.config.keep_sampling_mask if masked is None else masked
        logp_S, entropy_S = self._logp(policy, hidden_SD, packed, masked)
        return Reading(logp_S, entropy_S, hidden_SD, out.indexer_kl_N)

    def _logp(self, policy: Policy, hidden_SD: Tensor, packed: Packed, masked: bool) -> tuple[Tensor, Tensor]:
        head_VD, temperature = policy.head_weight, self.config.sampling.temperature
        kept = (packed.token_S, packed.kept_id_E, packed.kept_offset_S, temperature)
        if hidden_SD.is_cuda:
            from trimtab.kernels.lm_head import full_logp_entropy, kept_logp_entropy

            if masked:
                return kept_logp_entropy(hidden_SD, head_VD, *kept)
            return full_logp_entropy(hidden_SD, head_VD, packed.token_S, temperature)
        still_SD, still_VD = hidden_SD.detach(), head_VD.detach()
        if masked:
            entropy_S = reference.kept_entropy(still_SD, still_VD, *kept[1:])
            return reference.kept_logp(hidden_SD, head_VD, *kept), entropy_S
        entropy_S = reference.full_entropy(still_SD, still_VD, temperature)
        return reference.full_logp(hidden_SD, head_VD, packed.token_S, temperature), entropy_S

    def score(self, segment: Segment) -> Tensor:
        """Log-probabilities [S] of what was sampled in a segment under the weights as they are now, on the CPU.

        Whatever the loss replays, they are those that an engine with these weights records: over the kept sets, with
        the experts that it ran.
        """
        lone = Trajectory(name=segment.name, domain="", segments=(segment,), advantage=0.0, settings=LossSettings())
        (packed,) = pack([lone], len(segment.token_ids))
        with self.awake(), without_gradient(self.policy):
            return self._read(self.policy, packed.to(self.device), routed=True, masked=True).logp_S.cpu()

    def save(self, path: Path) -> None:
        super().save(path)
        (path / DELTAS_FILE).write_text(json.dumps(self.deltas) + "\n")

    def load_optimizer(self, path: Path) -> None:
        """Read the optimiser's state, and what else goes on from step to step, of a checkpoint that `save` wrote."""
        super().load_optimizer(path)
        self.deltas = json.loads((path / DELTAS_FILE).read_text())
