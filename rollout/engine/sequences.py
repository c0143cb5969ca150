"""What the engine says of each sequence, step by step, gathered into arrays when the sequence ends.

A step adds one token to each of hundreds of sequences while the GPU waits, so a step only keeps references; lists of
ids are never made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.rollout.types import Completion


@dataclass(slots=True)
class SequenceRecord:
    """One sampled sequence so far."""

    token_ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    kept: list[np.ndarray] = field(default_factory=list)
    routes: list[np.ndarray] = field(default_factory=list)
    finish: str | None = None

    def add(self, output: Any) -> None:
        """Take what vLLM's EngineCoreOutput holds of one step. What is missing is missed when a Segment is made."""
        self.token_ids += output.new_token_ids
        if output.new_logprobs is not None:
            self.logp.append(output.new_logprobs.logprobs.item(0))
        if output.new_sampling_mask is not None:
            self.kept.append(output.new_sampling_mask.token_ids)
        if output.routed_experts is not None:
            self.routes.append(output.routed_experts)
        if output.finish_reason is not None:
            self.finish = str(output.finish_reason)

    def completion(
        self, *, layers: Sequence[int], experts_per_token: int, version: int, selects: tuple[int, int] = (0, 0)
    ) -> Completion:
        """The sequence as arrays.

        Args:
            layers: those with experts, whose routes are kept: the engine gives a row of every layer.
            selects: all layers, and the selected keys of a row, which lie behind its experts; none are recorded by
                default.
        """
        routes = np.zeros((0, len(layers), experts_per_token if layers else 0), np.uint8)
        selected = np.zeros((0, *selects), np.uint16)
        if self.routes:
            rows = np.concatenate(self.routes)
            experts = rows.shape[-1] - selects[1]
            if layers:
                routes = rows[:, layers, :experts]
            if selects[1]:
                selected = np.ascontiguousarray(rows[..., experts:])
        offsets = np.zeros(len(self.kept) + 1, np.int64)
        np.cumsum([len(ids) for ids in self.kept], out=offsets[1:])
        return Completion(
            token_ids=np.array(self.token_ids, np.int32),
            logp=np.array(self.logp, np.float32),
            kept_ids=np.concatenate([np.zeros(0, np.int32), *self.kept]),
            kept_offsets=offsets,
            routes=routes,
            selected=selected,
            weight_version=version,
            finish="stop" if self.finish == "stop" else "length",
        )


@dataclass(slots=True)
class Running:
    """The sequences of one request; it is finished when all are."""

    key: str
    records: list[SequenceRecord]
