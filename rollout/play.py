"""Play episodes: an environment speaks messages, an engine speaks token ids, and this is where they meet."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from trimtab.environments.base import Env, Message, VoidEpisode
from trimtab.rollout.chat import Chat, Conversation, MarkupError
from trimtab.rollout.types import Completion, Episode, Group, RecordingError, Request, Sampling, Segment

Generate = Callable[[Request], Awaitable[list[Completion]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of one group."""

    group: Group | None
    """None when fewer than two episodes are left."""
    voided: int = 0
    """Episodes that the environment could not score."""
    refused: tuple[str, ...] = ()
    """Why each refused episode was refused."""


@dataclass(slots=True)
class _Track:
    """A segment while it grows: each turn's prompt extends what the engine has seen."""

    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    turns: list[Completion] = field(default_factory=list)

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
    chat: Chat
    conversation: Conversation
    generate: Generate
    sampling: Sampling
    max_len: int
    max_turns: int
    seed: int
    tracks: list[_Track] = field(default_factory=lambda: [_Track()])
    rewards: dict[str, float] = field(default_factory=dict)
    extra: tuple[Message, ...] = ()

    async def play(self, prompt: tuple[int, ...], completion: Completion) -> str:
        """Play from the first turn's completion to the end and return how it ended."""
        for turn in range(1, self.max_turns + 1):
            self.tracks[-1].add(prompt, completion)
            if completion.finish == "length":
                return self._broke_off("length", completion)
            try:
                message = self.conversation.add_sampled(completion.token_ids)
            except ValueError:
                return self._broke_off("malformed", completion)
            step = await self.env.step(message)
            for part, value in step.rewards.items():
                self.rewards[part] = self.rewards.get(part, 0.0) + value
            if step.done:
                self.extra = step.replies
                return "done"
            self.conversation.add(step.replies)
            prompt = self.conversation.prompt_ids()
            if len(prompt) >= self.max_len:
                return self._fail("length")
            if turn < self.max_turns:
                completion = await self._next(prompt, turn)
        return self._fail("turns")

    async def _next(self, prompt: tuple[int, ...], turn: int) -> Completion:
        if not self.tracks[-1].is_extended_by(prompt):
            self.tracks.append(_Track())
        request = Request(
            name=f"{self.name}.{turn}",
            prompt_ids=prompt,
            sampling=_within(self.sampling, self.max_len - len(prompt)),
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

    def episode(
        self,
        domain: str,
        ended: str,
        weigh: Callable[[Mapping[str, float]], float],
        length_penalty: Callable[[int], float] | None,
    ) -> Episode:
        """The record of this attempt.

        Raises:
            RecordingError: a segment's recording is incomplete.
        """
        if length_penalty is not None:
            self.rewards["length"] = length_penalty(sum(sum(track.sampled) for track in self.tracks))
        return Episode(
            name=self.name,
            domain=domain,
            messages=self.conversation.messages + self.extra,
            segments=tuple(track.segment(f"{self.name} segment {i}") for i, track in enumerate(self.tracks)),
            rewards=self.rewards,
            reward=weigh(self.rewards),
            ended=ended,
        )


def _within(sampling: Sampling, room: int) -> Sampling:
    """The same sampling, cut to the tokens that are left."""
    return replace(sampling, max_tokens=min(sampling.max_tokens, room))


def _seed(*parts: object) -> int:
    """A seed that no other combination of parts is likely to share."""
    return random.Random("/".join(map(str, parts))).getrandbits(31)


async def play_group(
    make_env: Callable[[], Env],
    *,
    name: str,
    domain: str,
    group_size: int,
    generate: Generate,
    chat: Chat,
    sampling: Sampling,
    weigh: Callable[[Mapping[str, float]], float],
    max_len: int,
    seed: int,
    length_penalty: Callable[[int], float] | None = None,
    thinking: bool = True,
    max_turns: int = 16,
) -> Played:
    """Play group_size episodes of one task.

    An episode that is cut off, cannot be read or takes too many turns keeps what it earned and an outcome of at
    least 0. One that the environment voids, or whose recording is incomplete, is left out and counted.

    Args:
        weigh: the reward of the named parts.
        max_len: tokens of prompt and answer together, at most.
        length_penalty: the part "length" from an episode's number of sampled tokens.

    Raises:
        ValueError: the task opens differently each time, or its opening does not fit max_len.
    """
    envs = [make_env() for _ in range(group_size)]
    openings = await asyncio.gather(*(env.start() for env in envs))
    if any(opening != openings[0] for opening in openings):
        raise ValueError(f"{name}: the environments of a group must open with the same messages")
    conversations = [chat.conversation(opening, thinking=thinking) for opening in openings]
    prompt = conversations[0].prompt_ids()
    if len(prompt) >= max_len:
        raise ValueError(f"{name}: an opening of {len(prompt)} tokens does not fit max_len = {max_len}")
    first = await generate(
        Request(
            name=f"{name}#0",
            prompt_ids=prompt,
            sampling=_within(sampling, max_len - len(prompt)),
            n=group_size,
            seed=_seed(seed, name),
        )
    )
    attempts = [
        _Attempt(
            name=f"{name}#{i}",
            env=env,
            chat=chat,
            conversation=conversation,
            generate=generate,
            sampling=sampling,
            max_len=max_len,
            max_turns=max_turns,
            seed=seed,
        )
        for i, (env, conversation) in enumerate(zip(envs, conversations, strict=True))
    ]

    async def finish(attempt: _Attempt, completion: Completion) -> Episode | Exception:
        try:
            ended = await attempt.play(prompt, completion)
            return attempt.episode(domain, ended, weigh, length_penalty)
        except (VoidEpisode, RecordingError, MarkupError) as error:
            return error

    results = await asyncio.gather(*map(finish, attempts, first))
    episodes = tuple(result for result in results if isinstance(result, Episode))
    return Played(
        group=Group(name=name, domain=domain, episodes=episodes) if len(episodes) > 1 else None,
        voided=sum(isinstance(result, VoidEpisode) for result in results),
        refused=tuple(str(result) for result in results if isinstance(result, ValueError)),
    )
