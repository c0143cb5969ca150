"""A policy with its optimiser: gradients become steps, steps become weights for checkpoints and engines."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.policy.lora import adapters, save_adapter
from trimtab.grpo.policy.muon import Muon
from trimtab.grpo.policy.offload import Shelf
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.policy.shard import (
    clip_gradients,
    load_optimizer_state,
    masters,
    optimizer_state,
    shard,
    stream,
    whole,
)

OPTIMIZER_FILE = "optimizer.pt"


class Diverged(RuntimeError):
    """A gradient is not finite: the weights of this step would be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimisation:
    """How a policy is optimised."""

    lr: float
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices inside the layers; embeddings, head, norms and stacked experts have AdamW."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Of the policy's gradient, and apart from it of the indexer's."""
    offload: Literal["none", "reference", "optimizer", "all"] = "none"


class Learner:
    """The weights that learn, on their device, in fp32 masters that compute in dtype."""

    def __init__(
        self,
        policy: Policy,
        optimisation: Optimisation,
        *,
        device: torch.device,
        dtype: torch.dtype,
        clock: Clock | None = None,
    ):
        """The policy is given in fp32; what does not ask for a gradient stays as it is.

        Raises:
            ValueError: nothing of the policy asks for a gradient.
        """
        self.device, self.optimisation = device, optimisation
        on_gpu = device.type == "cuda"
        self.clock = clock or Clock(torch.cuda.synchronize if on_gpu else None)
        self.policy = shard(policy, dtype=dtype, device=device)
        self.learning = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        if not self.learning:
            raise ValueError("nothing of the policy is to learn")
        indexer = {id(parameter) for parameter in self.policy.indexer_parameters()}
        self._objectives = [
            [parameter for parameter in self.learning if (id(parameter) in indexer) == of_indexer]
            for of_indexer in (False, True)
        ]
        """What the policy's loss reaches, and what the indexer's: neither may scale the other's gradient."""
        self.optimizers = _optimizers(self.policy, optimisation)
        self.updates = 0
        """Optimiser steps that this process has made."""
        self._shelves: dict[str, Shelf] = {}
        if optimisation.offload in ("optimizer", "all"):
            self._shelves["optimizer"] = Shelf(self._moments)
        if optimisation.offload == "all":
            self._shelves["masters"] = Shelf(self.policy.parameters)

    def _moments(self) -> Iterator[Tensor]:
        states = (state for optimizer in self.optimizers for state in optimizer.state.values())
        return (value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim())

    @property
    def learns_indexer(self) -> bool:
        return bool(self._objectives[True])

    def set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def clip(self, step: int) -> tuple[float, float]:
        """Clip the two gradients, each by its own norm. Returns the norms, the policy's and the indexer's.

        Raises:
            Diverged: one is not finite.
        """
        norm, indexer_norm = (
            float(clip_gradients(learning, self.optimisation.max_grad_norm)) for learning in self._objectives
        )
        if not math.isfinite(norm + indexer_norm):
            raise Diverged(f"the gradient's norm is {norm}, the indexer's {indexer_norm}, at step {step}")
        return norm, indexer_norm

    def optimise(self) -> None:
        """One step of the optimiser with the gradients that are there."""
        shelf = self._shelves.get("optimizer")
        with self.clock.phase("optimiser"), shelf.taken_down() if shelf else nullcontext():
            self.updates += 1
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that engines must have (shard.stream)."""
        with self.awake():
            yield from stream(self.policy)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The master weights on the device inside, also where they rest."""
        shelf = self._shelves.get("masters")
        with shelf.taken_down() if shelf and shelf.resting else nullcontext():
            yield

    def rest(self) -> None:
        """Leave the device to others: what offload names, and what torch keeps of memory it does not use."""
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
            with self.awake():
                save_adapter(self.policy, {name: whole(weight) for name, weight in learnt}, path)
        else:
            self.save_merged(path)
        with self._shelves["optimizer"].taken_down() if "optimizer" in self._shelves else nullcontext():
            torch.save([optimizer_state(optimizer) for optimizer in self.optimizers], path / OPTIMIZER_FILE)

    def save_merged(self, path: Path) -> None:
        """Write a transformers checkpoint of the policy as a whole, an adapter merged into the weights."""
        with self.awake():
            self.policy.save(path, masters(self.policy))

    def load_optimizer(self, path: Path) -> None:
        """Read the optimiser's state of a checkpoint that `save` wrote."""
        states = torch.load(path / OPTIMIZER_FILE, weights_only=True)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            load_optimizer_state(optimizer, state)


def _optimizers(policy: Policy, optimisation: Optimisation) -> list[torch.optim.Optimizer]:
    learning = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    lr, decay = optimisation.lr, optimisation.weight_decay
    found: list[torch.optim.Optimizer] = []
    if optimisation.optimizer == "muon":
        matrices = [name for name, weight in learning.items() if weight.ndim == 2 and ".layers." in name]
        if matrices:
            found.append(Muon([learning.pop(name) for name in matrices], lr, weight_decay=decay))
    if rest := list(learning.values()):
        fused = rest[0].is_cuda or None
        found.append(torch.optim.AdamW(rest, lr=lr, weight_decay=decay, betas=optimisation.betas, fused=fused))
    return found
