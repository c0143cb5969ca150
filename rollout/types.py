"""Records that cross the border between rollout and grpo. Plain data: numpy, no torch, no ray, no vllm.

Shape suffixes: N = tokens of a segment, S = its sampled tokens, E = kept ids of all S positions,
L = MoE layers, K = experts a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from trimtab.environments.base import Message


class RecordingError(ValueError):
    """A record lacks or contradicts what training needs; it is refused and counted, and never trains."""


COLDEST = 0.01
"""vLLM raises temperatures below this to it."""
POSITIONS = 1 << 16
"""Tokens of a sequence whose selections are recorded, at most: a position has 16 bits."""
UNSELECTED = np.zeros((0, 0, 0), np.uint16)
"""The selections of a sequence where none are recorded."""
ROUNDING = 1e-3
"""Nats by which a log-probability may miss its bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the policy samples. The three truncation rules restrict the kept set."""

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 64
    max_tokens: int | None = None
    """Sampled tokens of one turn, at most; None: what the window leaves."""

    def __post_init__(self) -> None:
        if not COLDEST <= self.temperature <= 2:
            why = "at 0 there is no kept set, and vLLM raises what is below"
            raise ValueError(f"temperature must lie in [{COLDEST:g}, 2] ({why}), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (it bounds the kept set), got {self.top_k}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue n times."""

    name: str
    """Named in every error. Requests that agree before a '#' go to one actor, whose cache holds their prefix."""
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
    selected: np.ndarray = field(default_factory=lambda: UNSELECTED)
    """uint16 [prompt + S - 1 - routes_start, L, topk], or UNSELECTED. Positions of the keys that the indexer of each of
    L layers selects, in ascending order; rows of a token with no more than topk keys mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyShape:
    """What of a policy shows in what engines record of it."""

    vocabulary: int
    moe_layers: int
    experts_per_token: int
    experts: int
    version: int
    """Of the weights that engines have."""
    selected: tuple[int, int] = (0, 0)
    """Layers whose selections are recorded, and keys of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One contiguous sequence the engine saw, with its recording. Construction checks everything.

    Raises:
        RecordingError: a length that does not match, a non-finite logp, a sampled token outside its kept set,
            a missing row of routes (one that repeats an expert is one the engine never wrote) or of selections.
    """

    name: str
    token_ids: np.ndarray = field(repr=False)  # int32 [N]
    sampled: np.ndarray = field(repr=False)  # bool [N]
    logp: np.ndarray = field(repr=False)  # float32 [S]
    kept_ids: np.ndarray = field(repr=False)  # int32 [E]
    kept_offsets: np.ndarray = field(repr=False)  # int64 [S + 1]
    routes: np.ndarray = field(repr=False)  # uint8 or uint16 [N - 1, L, K]
    weight_version: np.ndarray = field(repr=False)  # int32 [S]
    selected: np.ndarray = field(repr=False, default_factory=lambda: UNSELECTED)  # uint16 [N - 1, L, topk]

    def __post_init__(self) -> None:
        N, S = len(self.token_ids), int(np.sum(self.sampled))
        self._check(self.sampled.dtype == bool and len(self.sampled) == N, "sampled must be one bool a token")
        self._check(S > 0, "no token was sampled")
        self._check(not self.sampled[0], "the first token was sampled, so nothing predicts it")
        self._check(len(self.logp) == S, f"{len(self.logp)} log-probabilities for {S} sampled tokens")
        self._check(bool(np.isfinite(self.logp).all()), "a log-probability is not finite")
        self._check(len(self.weight_version) == S, f"{len(self.weight_version)} versions for {S} sampled tokens")
        self._check_kept(S)
        self._check_routes(N)
        if self.selected.shape[1]:
            self._check_selected(N)

    def _check_kept(self, S: int) -> None:
        offsets, counts = self.kept_offsets, np.diff(self.kept_offsets)
        self._check(len(offsets) == S + 1, f"{len(offsets) - 1} kept sets for {S} sampled tokens")
        delimits = offsets[0] == 0 and offsets[-1] == len(self.kept_ids) and bool((counts > 0).all())
        self._check(delimits, "a kept set is empty, or the offsets do not delimit the kept ids")
        found = np.repeat(self.token_ids[self.sampled], counts) == self.kept_ids
        times = np.add.reduceat(found, offsets[:-1], dtype=np.int64)
        self._check(bool((times == 1).all()), "a sampled token is not exactly once in its kept set")

    def _check_routes(self, N: int) -> None:
        routes = self.routes
        self._check(routes.dtype in (np.uint8, np.uint16), f"routes must be uint8 or uint16, got {routes.dtype}")
        self._check(routes.ndim == 3 and len(routes) == N - 1, f"routes of shape {routes.shape} for {N} tokens")
        ordered = np.sort(routes, axis=-1)
        repeats = ordered[..., 1:] == ordered[..., :-1]
        self._check(not repeats.any(), "a route row repeats an expert: the engine never wrote it")

    def _check_selected(self, N: int) -> None:
        rows, topk = self.selected, self.selected.shape[-1]
        self._check(rows.dtype == np.uint16 and rows.ndim == 3, f"selections must be uint16, got {rows.dtype}")
        self._check(len(rows) == N - 1, f"selections of {len(rows)} tokens for {N} tokens")
        chosen = rows[topk:].astype(np.int32)
        rise = bool((np.diff(chosen, axis=-1) > 0).all())
        seen = bool((chosen[..., -1] <= np.arange(topk, N - 1)[:, None]).all())
        self._check(rise and seen, "a selection is not of earlier tokens, each once: the engine never wrote it")

    def check_against(self, policy: PolicyShape) -> None:
        """Refuse what no engine of this policy records, however well formed.

        Raises:
            RecordingError: ids outside the vocabulary, a kept set that holds an id twice, a log-probability above 0 or,
                where one id was kept, other than 0; other MoE layers or experts a token than the policy's, routes that
                were never written; selections of other layers or numbers of keys; another version of the weights.
        """
        ids = (self.token_ids, self.kept_ids)
        inside = all(one.min(initial=0) >= 0 and one.max(initial=0) < policy.vocabulary for one in ids)
        self._check(inside, f"an id is outside the vocabulary of {policy.vocabulary}")
        counts = np.diff(self.kept_offsets)
        keys = np.repeat(np.arange(len(counts), dtype=np.int64), counts) * policy.vocabulary + self.kept_ids
        self._check(len(np.unique(keys)) == len(keys), "a kept set holds an id twice")
        self._check(bool((self.logp <= ROUNDING).all()), f"a log-probability is above 0: {self.logp.max():.3g}")
        alone = np.abs(self.logp[counts == 1]).max(initial=0.0)
        self._check(alone <= ROUNDING, f"one id was kept, but its log-probability is {-alone:.3g}")
        wanted = (policy.moe_layers, policy.experts_per_token if policy.moe_layers else 0)
        found = self.routes.shape[1:]
        self._check(found == wanted, f"routes of {found[0]} layers and {found[1]} experts a token, not {wanted}")
        if policy.moe_layers:
            self._check(int(self.routes.max()) < policy.experts, f"a route to an expert beyond {policy.experts}")
            written = self.routes.any() or policy.experts == 1
            self._check(bool(written), "every route leads to expert 0: the engine wrote none")
        recorded = self.selected.shape[1:]
        expected = f"not {policy.selected}"
        self._check(recorded == policy.selected, f"selections of {recorded} layers and keys a token, {expected}")
        versions = np.unique(self.weight_version)
        self._check(
            versions.tolist() == [policy.version], f"weights of version {versions.tolist()}, not {policy.version}"
        )

    def _check(self, holds: bool, reason: str) -> None:
        if not holds:
            raise RecordingError(f"{self.name}: {reason}")


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
    resets: tuple[int, ...] = ()
    """Where the context was reset: how many of messages had been said by then."""
    process: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What each process reward gave, segment by segment."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What a reader should see beside the parts, by part: a judge's rationales. Never trained on."""


LostKind = Literal["opening", "environment", "reward", "recording", "engine", "time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """An episode of which nothing can be said, through no fault of the policy: it never trains."""

    name: str
    domain: str
    kind: LostKind
    """opening: it cannot be played as it opens. environment: that, a tool or a reward in it failed. reward: one of the
    group failed. recording: what the engine recorded is incomplete. engine: the request was given up. time: a limit."""
    reason: str
    cause: BaseException | None = field(default=None, compare=False, repr=False)


class RequestLost(RuntimeError):
    """One request cannot be answered; the engines go on."""


class EngineFailure(RuntimeError):
    """The engines cannot go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The episodes of one prompt: advantages are computed within it.

    Raises:
        ValueError: fewer than two episodes, which have no advantages.
    """

    name: str
    domain: str
    episodes: tuple[Episode, ...]

    def __post_init__(self) -> None:
        if len(self.episodes) < 2:
            raise ValueError(f"{self.name}: a group needs at least 2 episodes, got {len(self.episodes)}")
