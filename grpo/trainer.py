"""One policy under optimisation: minibatches in, weights and statistics out."""

import json
from collections.abc import Iterator, Mapping, Sequence
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
from trimtab.grpo.policy.lora import without_adapters
from trimtab.grpo.policy.offload import Shelf
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.policy.selection import Chosen, noting_selection
from trimtab.grpo.policy.shard import compute_dtype, round_frozen, without_gradient
from trimtab.grpo.results.record import Record
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
        teachers: Mapping[str, Policy] | None = None,
    ):
        """All policies are given in fp32; one with adapters is its own reference.

        Args:
            teachers: further references, by what domains call their teacher.
        """
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
        given = {**({} if reference_policy is None else {"": reference_policy}), **(teachers or {})}
        self.references = {
            name: round_frozen(one.requires_grad_(False), dtype).to(self.device) for name, one in given.items()
        }
        """By the teacher of a domain; "": the model that the run started from."""
        self._heads: dict[str, Tensor] = {}
        """LM heads of references that rest while the full KL to them is learnt from."""
        self.deltas: dict[str, float] = {}
        """For domains whose delta is a percentile, its value in the rollout batch before."""
        if config.offload in ("reference", "all"):
            for name, one in self.references.items():
                self._shelves[_shelf(name)] = Shelf(one.parameters, constant=True)
                self._shelves[_shelf(name)].rest()

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
        self._heads.clear()
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
        """In packs, each of trajectories with the same reference."""
        by_teacher: dict[str, list[Trajectory]] = {}
        for one in part:
            by_teacher.setdefault(self._teacher(one.domain), []).append(one)
        packs = [one for ours in by_teacher.values() for one in pack(ours, self.config.tokens_per_microbatch)]
        if not packs:
            return []
        largest = max(int(packed.kept_id_E.max()) for packed in packs)
        if largest >= self.policy.config.vocab_size:
            raise ValueError(f"kept id {largest} is outside the vocabulary of {self.policy.config.vocab_size}")
        return [packed.pinned() for packed in packs] if self.device.type == "cuda" else packs

    def _teacher(self, domain: str) -> str:
        return self.config.domains[domain].teacher if domain in self.config.domains else ""

    def _references(self, packs: Sequence[Sequence[Packed]]) -> list[list[Tensor | None]]:
        """By mini-batch and pack, the reference's log-probabilities [S]; for the full KL its hidden states [S, D]."""
        if not self.config.needs_reference:
            return [[None] * len(part) for part in packs]
        read = self._hidden if self.config.kl == "full" else self._logp_of
        found: list[list[Tensor | None]] = [[None] * len(part) for part in packs]
        for teacher in self.config.references:
            with self._as_reference(teacher) as policy:
                for part, results in zip(packs, found, strict=True):
                    for i, packed in enumerate(part):
                        if self._teacher(packed.domains[0]) == teacher:
                            results[i] = read(policy, packed.to(self.device))
                if self.config.kl == "full" and _shelf(teacher) in self._shelves:
                    self._heads[teacher] = policy.head_weight.detach().clone()
        return found

    @contextmanager
    def _as_reference(self, teacher: str) -> Iterator[Policy]:
        """A reference on the device, without gradient."""
        shelf = self._shelves.get(_shelf(teacher))
        with shelf.taken_down() if shelf else nullcontext(), without_adapters(self.policy):
            policy = self.references.get(teacher, self.policy)
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
        kl_S: Tensor | None = None
        if full and reference_S is not None:
            kl_S = self._full_kl(read.hidden_SD, reference_S, self._teacher(packed.domains[0]))
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

    def _full_kl(self, hidden_SD: Tensor, ref_hidden_SD: Tensor, teacher: str) -> Tensor:
        """The KL to a reference over the whole vocabulary, [S]."""
        ref_head_VD = self._heads.get(teacher, self.references.get(teacher, self.policy).head_weight.detach())
        heads = (self.policy.head_weight, ref_head_VD)
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
            routed: use the engine's experts, and its selection where that is recorded; else a policy chooses for
                itself, as a reference does.
            masked: normalise over the kept sets; None: as the configuration says.
            learn: the indexer's KL too, if it is to learn, and over the engine's selection where that is recorded.
        """
        out = policy(
            packed.ids_N,
            packed.cu_seqlens,
            lengths=packed.lengths,
            routes_NLK=packed.routes_NLK if routed else None,
            selected_NLK=packed.selected_NLK if routed or learn else None,
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

    def select(self, token_ids: Sequence[int]) -> Chosen:
        """What the policy as it is now selects for a sequence of more than index_topk tokens."""
        ids_N = torch.tensor(token_ids, device=self.device)
        cu_seqlens = torch.tensor([0, len(ids_N)], device=self.device)
        with self.awake(), without_gradient(self.policy), noting_selection(self.policy) as chosen:
            self.policy(ids_N, cu_seqlens, lengths=[len(ids_N)])
        return chosen

    def save(self, path: Path) -> None:
        super().save(path)
        (path / DELTAS_FILE).write_text(json.dumps(self.deltas) + "\n")

    def load_optimizer(self, path: Path) -> None:
        """Read the optimiser's state, and what else goes on from step to step, of a checkpoint that `save` wrote."""
        super().load_optimizer(path)
        self.deltas = json.loads((path / DELTAS_FILE).read_text())


def _shelf(teacher: str) -> str:
    return f"reference {teacher}"
