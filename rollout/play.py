"""Play episodes: an environment speaks messages, an engine speaks token ids, and this is where they meet."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from trimtab.environments.base import Env, Message, ToolCall, VoidEpisode
from trimtab.rewards.types import Answer, GroupReward, ProcessReward, group_values
from trimtab.rollout.context import Context, ContextPolicy, Format
from trimtab.rollout.formats.chat import FormatError
from trimtab.rollout.types import Completion, Episode, Group, RecordingError, Request, Sampling, Segment

Generate = Callable[[Request], Awaitable[list[Completion]]]
T = TypeVar("T")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedGroup:
    """What came of one group."""

    group: Group | None
    """None when fewer than two episodes are left."""
    voided: tuple[str, ...] = ()
    """Why each episode was voided: nothing can be said about it."""
    refused: tuple[str, ...] = ()
    """Why each refused episode was refused."""


@dataclass(slots=True)
class _Track:
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
class _Attempt:
    """One episode while it is played."""

    name: str
    env: Env
    generate: Generate
    rules: Rules
    chat: Format
    context: Context
    seed: int
    tracks: list[_Track] = field(default_factory=lambda: [_Track()])
    rewards: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    extra: tuple[Message, ...] = ()

    async def play(self, prompt: tuple[int, ...], completion: Completion) -> str:
        """Play from the first turn's completion to the end and return how it ended."""
        turn = 0
        while True:
            turn += 1
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
        step = await self.env.step(message)
        for part, value in step.rewards.items():
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
            self.tracks.append(_Track())
        request = Request(
            name=f"{self.name}.{turn}",
            prompt_ids=prompt,
            sampling=_within(self.rules, prompt),
            seed=_seed(self.seed, self.name, turn),
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
        answers = [track.answer() for track in self.tracks]
        process = {part: group_values(reward, answers) for part, reward in self.rules.process_rewards.items()}
        rewards = _joined(self.rewards, {part: sum(values) for part, values in process.items()})
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
    track = _Track()
    track.add(prompt, completion)
    return track.segment(name)


def _call(call: ToolCall) -> str:
    return json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)


def _within(rules: Rules, prompt: tuple[int, ...]) -> Sampling:
    """The domain's sampling, cut to the tokens that are left behind prompt."""
    room = rules.max_len - len(prompt)
    return replace(rules.sampling, max_tokens=min(rules.sampling.max_tokens or room, room))


def _seed(*parts: object) -> int:
    """A seed that no other combination of parts is likely to share."""
    return random.Random("/".join(map(str, parts))).getrandbits(31)


def _joined(parts: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    if both := parts.keys() & more.keys():
        raise ValueError(f"the reward part {min(both)!r} comes from two places; give one of them another name")
    return {**parts, **more}


def compare(episodes: Sequence[Episode], rules: Rules) -> tuple[Episode, ...]:
    """The episodes of a group with the parts that compare them, and their final reward.

    Raises:
        ValueError: a part that the episodes have already, a reward that does not give one value for each.
    """
    answers = [_answer(episode) for episode in episodes]
    values = {part: group_values(reward, answers) for part, reward in rules.group_rewards.items()}
    compared = []
    for i, episode in enumerate(episodes):
        rewards = _joined(episode.rewards, {part: given[i] for part, given in values.items()})
        compared.append(replace(episode, rewards=rewards, reward=rules.weigh(rewards)))
    return tuple(compared)


def _answer(episode: Episode) -> Answer:
    last = next(message for message in reversed(episode.messages) if message.role == "assistant")
    text, reasoning = (last.content, last.reasoning) if episode.ended == "done" else ("", "")
    return Answer(text, reasoning, sum(len(segment.logp) for segment in episode.segments), episode.rewards)


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. When one fails, or the caller is cancelled, the others have ended before the error."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def play_group(
    make_env: Callable[[], Env],
    *,
    name: str,
    domain: str,
    group_size: int,
    generate: Generate,
    chat: Format,
    rules: Rules,
    seed: int,
) -> PlayedGroup:
    """Play group_size episodes of one task, and close every environment that has a close().

    An episode that is cut off, cannot be read or takes too many turns keeps what it earned and an outcome of at
    least 0. One that the environment voids, or whose recording is incomplete, is left out and counted; a group reward
    that voids does so for all.

    Raises:
        ValueError: the task opens differently each time, its opening does not fit the window, or two rewards give the
            same part.
    """
    async with AsyncExitStack() as stack:
        envs = []
        for _ in range(group_size):
            envs.append(make_env())
            stack.push_async_callback(_close, envs[-1])
        openings = await gather(_start(env) for env in envs)
        started = [(env, one) for env, one in zip(envs, openings, strict=True) if not isinstance(one, VoidEpisode)]
        if not started:
            return PlayedGroup(group=None, voided=tuple(map(str, openings)))
        if any(opening != started[0][1] for _, opening in started):
            raise ValueError(f"{name}: the environments of a group must open with the same messages")
        try:
            contexts = [
                Context(chat, opening, rules.context, thinking=rules.thinking, max_len=rules.max_len)
                for _, opening in started
            ]
            prompt = contexts[0].prompt_ids()
        except FormatError as error:  # one task that the format cannot say is lost, not the run
            return PlayedGroup(group=None, refused=(str(error),) * len(started))
        if len(prompt) >= rules.max_len:
            raise ValueError(f"{name}: an opening of {len(prompt)} tokens does not fit max_len = {rules.max_len}")
        request = Request(
            name=f"{name}#0",
            prompt_ids=prompt,
            sampling=_within(rules, prompt),
            n=len(started),
            seed=_seed(seed, name),
        )
        first = await generate(request)
        attempts = [
            _Attempt(name=f"{name}#{i}", env=env, generate=generate, rules=rules, chat=chat, context=context, seed=seed)
            for i, ((env, _), context) in enumerate(zip(started, contexts, strict=True))
        ]
        results = await gather(
            _finish(attempt, prompt, completion, domain) for attempt, completion in zip(attempts, first, strict=True)
        )
        return await _played(
            name, domain, (*results, *(one for one in openings if isinstance(one, VoidEpisode))), rules
        )


async def _start(env: Env) -> tuple[Message, ...] | VoidEpisode:
    try:
        return await env.start()
    except VoidEpisode as error:
        return error


async def _close(env: Env) -> None:
    close = getattr(env, "close", None)
    if close is not None:
        await close()


async def _finish(
    attempt: _Attempt, prompt: tuple[int, ...], completion: Completion, domain: str
) -> Episode | Exception:
    try:
        try:
            ended = await attempt.play(prompt, completion)
        finally:
            await _close(attempt.env)
        return await asyncio.to_thread(attempt.episode, domain, ended)  # a reward may take its time
    except (VoidEpisode, RecordingError, FormatError) as error:
        return error


async def _played(name: str, domain: str, results: Sequence[Episode | Exception], rules: Rules) -> PlayedGroup:
    episodes = tuple(result for result in results if isinstance(result, Episode))
    voided = tuple(str(result) for result in results if isinstance(result, VoidEpisode))
    refused = tuple(str(result) for result in results if isinstance(result, ValueError))
    if len(episodes) < 2:
        return PlayedGroup(group=None, voided=voided, refused=refused)
    try:
        episodes = await asyncio.to_thread(compare, episodes, rules)
    except VoidEpisode as error:
        return PlayedGroup(group=None, voided=(*voided, *[str(error)] * len(episodes)), refused=refused)
    return PlayedGroup(group=Group(name=name, domain=domain, episodes=episodes), voided=voided, refused=refused)
