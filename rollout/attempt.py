"""One episode while it is played: its segments grow, its environment answers, its parts add up."""

import json
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from trimtab.environments.base import Env, Message, ToolCall
from trimtab.environments.guard import guarded
from trimtab.rewards.types import Answer, GroupReward, ProcessReward, group_values, named_parts
from trimtab.rollout.context import Context, ContextPolicy, Format
from trimtab.rollout.types import Completion, Episode, PolicyShape, RecordingError, Request, Sampling, Segment

Generate = Callable[[Request], Awaitable[list[Completion]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How the episodes of a domain are played and scored."""

    sampling: Sampling
    max_len: int
    """The window: tokens of prompt and answer together, at most."""
    weigh: Callable[[Mapping[str, float]], float]
    """The reward of the named parts."""
    group_rewards: Mapping[str, GroupReward] = field(default_factory=dict)
    """Parts that compare the episodes of a group. An episode's text is its answer, empty where it gave none."""
    process_rewards: Mapping[str, ProcessReward] = field(default_factory=dict)
    """Parts that are sums over an episode's segments. A segment's text is all that was said in it, calls as JSON."""
    context: ContextPolicy = field(default_factory=ContextPolicy)
    thinking: bool = True
    max_turns: int = 16
    """Assistant messages of an episode, summaries included."""
    policy: PolicyShape | None = None
    """What its recordings must fit; None: they are not checked against it."""
    floor: float | None = None
    """What an episode earns at most that did not end with an answer; None: as much as its group's worst answer."""
    episode_seconds: float = math.inf
    """From an episode's first turn to its reward; one that takes longer is lost."""
    group_seconds: float = math.inf
    """The same of a group, its opening included."""


@dataclass(slots=True)
class Track:
    """A segment while it grows: each turn's prompt extends what the engine has seen."""

    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    turns: list[Completion] = field(default_factory=list)
    said: list[Message] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)

    def is_extended_by(self, prompt: tuple[int, ...]) -> bool:
        return list(prompt[: len(self.ids)]) == self.ids

    def add(self, prompt: tuple[int, ...], turn: Completion) -> None:
        new = len(prompt) - len(self.ids)
        self.ids = [*prompt, *turn.token_ids.tolist()]
        self.sampled += [False] * new + [True] * len(turn.token_ids)
        self.turns.append(turn)

    def segment(self, name: str) -> Segment:
        counts = np.concatenate([np.diff(turn.kept_offsets) for turn in self.turns])
        return Segment(
            name=name,
            token_ids=np.array(self.ids, np.int32),
            sampled=np.array(self.sampled, bool),
            logp=np.concatenate([turn.logp for turn in self.turns]),
            kept_ids=np.concatenate([turn.kept_ids for turn in self.turns]),
            kept_offsets=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
            routes=self._routes(),
            selected=np.concatenate([turn.selected for turn in self.turns]),
            weight_version=np.repeat(
                np.array([turn.weight_version for turn in self.turns], np.int32),
                [len(turn.token_ids) for turn in self.turns],
            ),
        )

    def answer(self) -> Answer:
        """The segment as a process reward sees it: what could be read of it, and the parts that it earned."""
        said = [text for message in self.said for text in (message.content, *map(_call, message.tool_calls)) if text]
        reasoning = [message.reasoning for message in self.said if message.reasoning]
        return Answer("\n\n".join(said), "\n\n".join(reasoning), sum(self.sampled), self.rewards)

    def _routes(self) -> np.ndarray:
        """Routes as first recorded: a later turn brings only the rows that earlier ones lack."""
        if self.turns[0].routes.shape[1:] == (0, 0):
            return np.zeros((len(self.ids) - 1, 0, 0), np.uint8)
        return np.concatenate([turn.routes for turn in self.turns])


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One episode while it is played."""

    name: str
    env: Env
    generate: Generate
    rules: Rules
    chat: Format
    context: Context
    seed: int
    tracks: list[Track] = field(default_factory=lambda: [Track()])
    rewards: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    extra: tuple[Message, ...] = ()

    async def play(self, prompt: tuple[int, ...], completion: Completion) -> str:
        """Play from the first turn's completion to the end and return how it ended."""
        turn = 0
        while True:
            turn += 1
            if completion.finish not in ("stop", "length"):
                raise RecordingError(f"{self.name}: the engine ended a turn with {completion.finish!r}")
            self.tracks[-1].add(prompt, completion)
            if completion.finish == "length":
                return self._broke_off("length", completion)
            summary = self.context.summarising
            try:
                message = self.context.add_sampled(completion.token_ids)
            except ValueError:
                return self._broke_off("malformed", completion)
            self.tracks[-1].said.append(message)
            if not summary and await self._step(message):
                return "done"
            if turn == self.rules.max_turns:
                return self._fail("turns")
            prompt = self.context.next_prompt()
            if len(prompt) >= self.rules.max_len:
                return self._fail("length")
            completion = await self._next(prompt, turn)

    async def _step(self, message: Message) -> bool:
        """Hand the environment what was said; whether the episode is over."""
        step = await guarded(self.env.step(message))
        for part, value in named_parts(step.rewards).items():
            for parts in (self.rewards, self.tracks[-1].rewards):
                parts[part] = parts.get(part, 0.0) + value
        self.notes |= step.notes
        if step.done:
            self.extra = step.replies
        else:
            self.context.add(step.replies)
        return step.done

    async def _next(self, prompt: tuple[int, ...], turn: int) -> Completion:
        if not self.tracks[-1].is_extended_by(prompt):
            self.tracks.append(Track())
        request = Request(
            name=f"{self.name}.{turn}",
            prompt_ids=prompt,
            sampling=within(self.rules, prompt),
            seed=seed_of(self.seed, self.name, turn),
            routes_start=max(len(self.tracks[-1].ids) - 1, 0),
        )
        return (await self.generate(request))[0]

    def _broke_off(self, ended: str, completion: Completion) -> str:
        self.extra = (Message("assistant", content=self.chat.decode(completion.token_ids)),)
        return self._fail(ended)

    def _fail(self, ended: str) -> str:
        self.rewards.setdefault("outcome", 0.0)
        return ended

    def episode(self, domain: str, ended: str) -> Episode:
        """The record of this attempt, with its own parts and those of its segments; `compare` adds the reward.

        Raises:
            RecordingError: a segment's recording is incomplete.
        """
        segments = tuple(track.segment(f"{self.name} segment {i}") for i, track in enumerate(self.tracks))
        if self.rules.policy is not None:
            for segment in segments:
                segment.check_against(self.rules.policy)
        answers = [track.answer() for track in self.tracks]
        process = {part: group_values(reward, answers) for part, reward in self.rules.process_rewards.items()}
        rewards = joined(self.rewards, {part: sum(values) for part, values in process.items()})
        return Episode(
            name=self.name,
            domain=domain,
            messages=self.context.messages + self.extra,
            segments=segments,
            rewards=rewards,
            reward=0.0,
            ended=ended,
            resets=self.context.resets,
            process=process,
            notes=self.notes,
        )


def recorded(name: str, prompt: tuple[int, ...], completion: Completion) -> Segment:
    """One prompt and its completion as a segment.

    Raises:
        RecordingError: the recording is incomplete.
    """
    track = Track()
    track.add(prompt, completion)
    return track.segment(name)


def _call(call: ToolCall) -> str:
    return json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)


def within(rules: Rules, prompt: tuple[int, ...]) -> Sampling:
    """The domain's sampling, cut to the tokens that are left behind prompt."""
    room = rules.max_len - len(prompt)
    return replace(rules.sampling, max_tokens=min(rules.sampling.max_tokens or room, room))


def seed_of(*parts: object) -> int:
    """A seed that no other combination of parts is likely to share."""
    return random.Random("/".join(map(str, parts))).getrandbits(31)


def joined(parts: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    if both := parts.keys() & more.keys():
        raise ValueError(f"the reward part {min(both)!r} comes from two places; give one of them another name")
    return {**parts, **more}
