"""From recorded groups to packed tensors: what is trained on, in which mini-batch, in which pack.

Shape suffixes: N = tokens of a pack, Q = its segments, S = its sampled tokens, E = kept ids of all S, B = its
trajectories, L = MoE layers, K = experts a token.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.grpo.config import LossSettings
from trimtab.grpo.estimators import group_advantage
from trimtab.rollout.types import Group, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One episode to train on: all its segments share one advantage and one off-policy decision."""

    name: str
    domain: str
    segments: tuple[Segment, ...]
    advantage: float
    settings: LossSettings

    @property
    def has_gradient(self) -> bool:
        """Whether it does more than count in the divisor: it has an advantage, or a KL that pulls on it."""
        return self.advantage != 0 or self.settings.beta > 0

    @property
    def num_tokens(self) -> int:
        """Tokens the policy reads, of all segments."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def num_sampled(self) -> int:
        """Tokens the policy sampled, |o_i|."""
        return sum(len(segment.logp) for segment in self.segments)

    @property
    def longest_segment(self) -> int:
        return max(len(segment.token_ids) for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Whole trajectories, laid end to end: one forward and backward pass."""

    names: tuple[str, ...]
    domains: tuple[str, ...]
    """Of each trajectory."""
    ids_N: Tensor  # int64
    lengths: tuple[int, ...]
    """Tokens of each segment: what cu_seqlens holds, where the host can read it without waiting for a GPU."""
    cu_seqlens: Tensor  # int64 [Q + 1], where each segment starts; positions restart there
    routes_NLK: Tensor | None
    """As recorded (uint8 or uint16); the row of a segment's last token, which nobody reads, repeats the one before.
    None for a policy without experts."""
    selected_NLK: Tensor | None
    """As recorded (uint16): positions of the keys that the engine's indexers selected, rows as of routes; None where
    they are not replayed."""
    predict_S: Tensor  # int64, index into N of the hidden state that predicts each sampled token
    token_S: Tensor  # int64
    old_logp_S: Tensor  # float32
    kept_id_E: Tensor  # int64
    kept_offset_S: Tensor  # int64 [S + 1]
    sequence_S: Tensor  # int64, the trajectory of each sampled token
    advantage_B: Tensor  # float32, and so are the settings
    length_B: Tensor  # int64, sampled tokens of the trajectory
    beta_B: Tensor
    clip_low_B: Tensor
    clip_high_B: Tensor
    delta_B: Tensor  # inf where the domain keeps every trajectory

    def to(self, device: torch.device | str) -> "Packed":
        """The same pack on another device; the host does not wait for a pack that is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Packed":
        """The same pack in memory that a GPU reads by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def trajectories(groups: Sequence[Group], settings: Mapping[str, LossSettings]) -> list[Trajectory]:
    """The episodes to train on, with their advantages, in the order given.

    A group whose rewards are all equal has advantages of 0: its KL pulls on it, and it counts in the divisor as every
    other does [DeepSeek-V3.2, eq. 5]. Where its domain says drop_equal_groups, it is left out. Where it has no
    surrogate, every advantage is 0.

    Raises:
        ValueError: a reward that is not finite, a domain without settings, an episode without segments.
    """
    kept = []
    for group in groups:
        if group.domain not in settings:
            raise ValueError(f"domain {group.domain!r} has no loss settings; there are settings for {sorted(settings)}")
        reward_G = torch.tensor([episode.reward for episode in group.episodes], dtype=torch.float64)
        if not reward_G.isfinite().all():
            raise ValueError(f"group {group.name!r} holds a reward that is not finite: {reward_G.tolist()}")
        advantage_G = group_advantage(reward_G)
        if settings[group.domain].drop_equal_groups and not advantage_G.any():
            continue
        for episode, advantage in zip(group.episodes, advantage_G.tolist(), strict=True):
            advantage = advantage if settings[group.domain].surrogate else 0.0
            trajectory = Trajectory(
                name=episode.name,
                domain=group.domain,
                segments=episode.segments,
                advantage=advantage,
                settings=settings[group.domain],
            )
            if not trajectory.segments:
                raise ValueError(f"episode {episode.name!r} holds no segment: nothing was sampled in it")
            kept.append(trajectory)
    return kept


def minibatches(batch: Sequence[Trajectory], count: int, seed: int) -> list[list[Trajectory]]:
    """Split a rollout batch into mini-batches of whole trajectories, every domain spread evenly over them.

    Shuffled by the seed alone. Sizes differ by at most one, and so do the sizes of each domain's share.

    Raises:
        ValueError: count below 1.

    Returns:
        count mini-batches, or fewer where there are fewer trajectories: none is empty.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 mini-batch, got {count}")
    order = list(batch)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda trajectory: trajectory.domain)  # stable: a stride of it now meets each domain in turn
    return [order[i::count] for i in range(min(count, len(order)))]


def pack(batch: Sequence[Trajectory], max_tokens: int) -> list[Packed]:
    """Lay trajectories end to end in packs of at most max_tokens, similar lengths together.

    All segments of a trajectory lie in one pack, because its off-policy decision needs all of its tokens; one that
    is longer than max_tokens has a pack of its own. Sorted by longest segment, to which attention pads its pack.

    Raises:
        ValueError: max_tokens below 1, routes of different shapes.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    bins: list[list[Trajectory]] = []
    used = max_tokens
    for trajectory in sorted(batch, key=lambda trajectory: trajectory.longest_segment):
        if not bins or used + trajectory.num_tokens > max_tokens:
            bins.append([])
            used = 0
        bins[-1].append(trajectory)
        used += trajectory.num_tokens
    return [_packed(members) for members in bins]


def _packed(members: Sequence[Trajectory]) -> Packed:
    segments = [segment for trajectory in members for segment in trajectory.segments]
    sampled_N = np.concatenate([segment.sampled for segment in segments])
    ids_N = _tensor([segment.token_ids for segment in segments], np.int64)
    position_S = torch.from_numpy(np.flatnonzero(sampled_N))
    num_sampled = [trajectory.num_sampled for trajectory in members]
    lengths = tuple(len(segment.token_ids) for segment in segments)
    return Packed(
        names=tuple(trajectory.name for trajectory in members),
        domains=tuple(trajectory.domain for trajectory in members),
        ids_N=ids_N,
        lengths=lengths,
        cu_seqlens=_offsets(lengths),
        routes_NLK=_routes(segments),
        selected_NLK=_selected(segments),
        predict_S=position_S - 1,
        token_S=ids_N[position_S],
        old_logp_S=_tensor([segment.logp for segment in segments], np.float32),
        kept_id_E=_tensor([segment.kept_ids for segment in segments], np.int64),
        kept_offset_S=_offsets(np.concatenate([np.diff(segment.kept_offsets) for segment in segments])),
        sequence_S=torch.repeat_interleave(torch.tensor(num_sampled)),
        advantage_B=_floats([trajectory.advantage for trajectory in members]),
        length_B=torch.tensor(num_sampled),
        beta_B=_floats([trajectory.settings.beta for trajectory in members]),
        clip_low_B=_floats([trajectory.settings.clip_low for trajectory in members]),
        clip_high_B=_floats([trajectory.settings.clip_high for trajectory in members]),
        delta_B=_floats([_delta(trajectory.settings) for trajectory in members]),
    )


def _routes(segments: Sequence[Segment]) -> Tensor | None:
    kinds = {(segment.routes.shape[1:], segment.routes.dtype) for segment in segments}
    if len(kinds) > 1:
        raise ValueError(f"segments of one policy have routes of different shapes or types: {sorted(map(str, kinds))}")
    if segments[0].routes.shape[1] == 0:
        return None
    return _rows([segment.routes for segment in segments])


def _selected(segments: Sequence[Segment]) -> Tensor | None:
    kinds = {segment.selected.shape[1:] for segment in segments}
    if len(kinds) > 1:
        raise ValueError(f"segments of one policy have selections of different shapes: {sorted(kinds)}")
    return None if kinds == {(0, 0)} else _rows([segment.selected for segment in segments])


def _rows(recorded: Sequence[np.ndarray]) -> Tensor:
    """One row a token: that of a segment's last, which nobody reads, repeats the one before."""
    return torch.from_numpy(np.concatenate([part for rows in recorded for part in (rows, rows[-1:])]))


def _tensor(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype))


def _offsets(counts: Sequence[int] | np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _floats(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _delta(settings: LossSettings) -> float:
    if isinstance(settings.delta, str):
        raise ValueError(f"delta {settings.delta!r} is a percentile; the trainer puts a number in its place")
    return math.inf if settings.delta is None else settings.delta
