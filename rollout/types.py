"""Records that cross the border between rollout and grpo. Plain data: numpy, no torch, no ray, no vllm.

Shape suffixes: N = tokens of a segment, S = its sampled tokens, E = kept ids of all S positions,
L = MoE layers, K = experts a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trimtab.environments.base import Message


class RecordingError(ValueError):
    """A record lacks or contradicts what training needs; it is refused and counted, and never trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the policy samples. The three truncation rules restrict the kept set."""

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 64
    max_tokens: int = 128
    """Sampled tokens of one turn, at most."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0 (a greedy row has no kept set), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (it bounds the kept set), got {self.top_k}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue n times."""

    name: str
    """Named in every error."""
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    n: int = 1
    seed: int = 0
    routes_start: int = 0
    """Rows of the prompt's routes the caller already has; they are not sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled continuation with everything the sampler knew. S = len(token_ids)."""

    token_ids: np.ndarray  # int32 [S], the end-of-sequence id included when it was sampled
    logp: np.ndarray  # float32 [S], after temperature and truncation
    kept_ids: np.ndarray  # int32 [E]
    kept_offsets: np.ndarray  # int64 [S + 1]
    routes: np.ndarray  # uint8 or uint16 [prompt + S - 1 - routes_start, L, K]; L = 0 without experts
    weight_version: int
    finish: str  # "stop" or "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One contiguous sequence the engine saw, with its recording. Construction checks everything.

    Raises:
        RecordingError: a length that does not match, a non-finite logp, a sampled token outside its kept set,
            a missing route row (a row that repeats an expert is one the engine never wrote).
    """

    name: str
    token_ids: np.ndarray  # int32 [N]
    sampled: np.ndarray  # bool [N]
    logp: np.ndarray  # float32 [S]
    kept_ids: np.ndarray  # int32 [E]
    kept_offsets: np.ndarray  # int64 [S + 1]
    routes: np.ndarray  # uint8 or uint16 [N - 1, L, K]
    weight_version: np.ndarray  # int32 [S]


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One attempt at a task: what was said, what was sampled, what it earned."""

    name: str
    domain: str
    messages: tuple[Message, ...]
    segments: tuple[Segment, ...]
    rewards: Mapping[str, float]
    """Named, unweighted parts."""
    reward: float
    """Their weighted sum."""
    ended: str
    """'done', 'length', 'malformed' or 'turns'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The episodes of one prompt: advantages are computed within it."""

    name: str
    domain: str
    episodes: tuple[Episode, ...]
