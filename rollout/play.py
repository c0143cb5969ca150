"""Play groups: an environment speaks messages, an engine speaks token ids, and this is where they meet.

What goes wrong in one episode or one group is lost with its reason (types.Lost); the others train.
"""

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from trimtab.environments.base import Env, Message, VoidEpisode
from trimtab.environments.guard import guarded
from trimtab.rewards import bounds
from trimtab.rewards.threads import Threads
from trimtab.rewards.types import Answer, group_values
from trimtab.rollout.attempt import Attempt, Generate, Rules, joined, seed_of, within
from trimtab.rollout.context import Context, Format
from trimtab.rollout.types import (
    Completion,
    EngineFailure,
    Episode,
    Group,
    Lost,
    LostKind,
    RecordingError,
    Request,
    RequestLost,
)

T = TypeVar("T")
SCORING = Threads("rewards of groups and segments", 32)
CLOSE_SECONDS = 60.0
"""An environment that does not close within this time is left to itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedGroup:
    """What came of one group."""

    group: Group | None = None
    """None when fewer than two episodes are left."""
    lost: tuple[Lost, ...] = ()


def compare(episodes: Sequence[Episode], rules: Rules) -> tuple[Episode, ...]:
    """The episodes of a group with the parts that compare them, and their final reward: one that did not end with an
    answer earns no more than rules.floor.

    Raises:
        ValueError: a part that the episodes have already, a reward that does not give one finite value for each.
    """
    answers = [_answer(episode) for episode in episodes]
    values = {part: group_values(reward, answers) for part, reward in rules.group_rewards.items()}
    compared = []
    for i, episode in enumerate(episodes):
        rewards = joined(episode.rewards, {part: given[i] for part, given in values.items()})
        compared.append(replace(episode, rewards=rewards, reward=rules.weigh(rewards)))
    answered = [episode.reward for episode in compared if episode.ended == "done"]
    floor = min(answered, default=math.inf) if rules.floor is None else rules.floor
    return tuple(
        episode if episode.ended == "done" else replace(episode, reward=min(episode.reward, floor))
        for episode in compared
    )


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

    An episode that is cut off, cannot be read or takes too many turns keeps what it earned, an outcome of at least 0
    included, up to rules.floor. Whatever fails in an environment, a tool or a reward costs its episode, in an opening
    or a group reward its group; what was lost comes back with its reason.

    Raises:
        Exception: of the engines as a whole.
    """
    playing = _Playing(make_env, name, domain, group_size, generate, chat, rules, seed)
    try:
        async with _limit(rules.group_seconds) as clock:
            return await playing.play()
    except TimeoutError:
        if not clock.expired():
            raise
        told = f"a group took longer than group_seconds = {rules.group_seconds:g}"
        bounds.bit("group_seconds", f"{name}: {told} and is lost")
        return PlayedGroup(lost=playing.lose("time", TimeoutError(told), times=group_size))


@dataclass(frozen=True, slots=True)
class _Playing:
    """One group while it is played."""

    make_env: Callable[[], Env]
    name: str
    domain: str
    group_size: int
    generate: Generate
    chat: Format
    rules: Rules
    seed: int

    async def play(self) -> PlayedGroup:
        async with AsyncExitStack() as stack:
            starts = await gather(self._start(stack) for _ in range(self.group_size))
            started = [start for start in starts if isinstance(start, tuple)]
            lost = tuple(start for start in starts if isinstance(start, Lost))
            if not started:
                return PlayedGroup(lost=lost)
            try:
                contexts = self._open([opening for _, opening in started])
                prompt = contexts[0].prompt_ids()
                first = await self.generate(self._request(prompt, len(started)))
            except _Unplayable as error:
                return PlayedGroup(lost=(*lost, *self.lose("opening", error, times=len(started))))
            except (RequestLost, ValueError) as error:
                return PlayedGroup(lost=(*lost, *self.lose("engine", error, times=len(started))))
            results = await gather(
                self._finish(i, env, context, prompt, completion)
                for i, ((env, _), context, completion) in enumerate(zip(started, contexts, first, strict=True))
            )
            return await self._score(results, lost)

    def lose(self, kind: LostKind, error: Exception, *, times: int = 1, name: str = "") -> tuple[Lost, ...]:
        reason = str(error) if kind in ("opening", "engine", "time", "recording") else told(error)
        return (Lost(name=name or self.name, domain=self.domain, kind=kind, reason=reason, cause=error),) * times

    async def _start(self, stack: AsyncExitStack) -> tuple[Env, tuple[Message, ...]] | Lost:
        try:
            env = self.make_env()
            stack.push_async_callback(_close, env)
            return env, tuple(await guarded(env.start()))
        except Exception as error:
            return self.lose("environment", error)[0]

    def _open(self, openings: Sequence[tuple[Message, ...]]) -> list[Context]:
        """The contexts of the episodes, which begin alike."""
        if any(opening != openings[0] for opening in openings):
            raise _Unplayable("the environments of a group must open with the same messages")
        rules = self.rules
        try:
            contexts = [
                Context(self.chat, opening, rules.context, thinking=rules.thinking, max_len=rules.max_len)
                for opening in openings
            ]
            length = len(contexts[0].prompt_ids())
        except Exception as error:  # of the format, the checkpoint's template, or of what the environment says
            raise _Unplayable(str(error) or repr(error)) from error
        if length >= rules.max_len:
            raise _Unplayable(f"an opening of {length} tokens does not fit max_len = {rules.max_len}")
        return contexts

    def _request(self, prompt: tuple[int, ...], n: int) -> Request:
        return Request(
            name=f"{self.name}#0",
            prompt_ids=prompt,
            sampling=within(self.rules, prompt),
            n=n,
            seed=seed_of(self.seed, self.name),
        )

    async def _finish(
        self, i: int, env: Env, context: Context, prompt: tuple[int, ...], completion: Completion
    ) -> Episode | Lost:
        name, limit = f"{self.name}#{i}", self.rules.episode_seconds
        attempt = Attempt(
            name=name,
            env=env,
            generate=self.generate,
            rules=self.rules,
            chat=self.chat,
            context=context,
            seed=self.seed,
        )
        try:
            async with _limit(limit) as clock:
                try:
                    ended = await attempt.play(prompt, completion)
                finally:
                    await _close(env)
                return await SCORING.run(lambda: attempt.episode(self.domain, ended))  # a reward may take its time
        except EngineFailure:
            raise
        except RecordingError as error:
            return self.lose("recording", error, name=name)[0]
        except RequestLost as error:
            return self.lose("engine", error, name=name)[0]
        except Exception as error:
            if not (isinstance(error, TimeoutError) and clock.expired()):
                return self.lose("environment", error, name=name)[0]
            late = f"an episode took longer than episode_seconds = {limit:g}"
            bounds.bit("episode_seconds", f"{name}: {late} and is lost")
            return self.lose("time", TimeoutError(late), name=name)[0]

    async def _score(self, results: Sequence[Episode | Lost], lost: tuple[Lost, ...]) -> PlayedGroup:
        episodes = tuple(result for result in results if isinstance(result, Episode))
        lost += tuple(result for result in results if isinstance(result, Lost))
        if len(episodes) < 2:
            return PlayedGroup(lost=lost)
        try:
            episodes = await SCORING.run(lambda: compare(episodes, self.rules))
        except Exception as error:
            return PlayedGroup(lost=(*lost, *self.lose("reward", error, times=len(episodes))))
        return PlayedGroup(group=Group(name=self.name, domain=self.domain, episodes=episodes), lost=lost)


class _Unplayable(Exception):
    """What a group opens with cannot be played."""


def told(error: Exception) -> str:
    """An error of other people's code, in a line."""
    if isinstance(error, VoidEpisode | ValueError):
        return str(error) or repr(error)
    return f"{type(error).__name__}: {error}"


def _limit(seconds: float) -> asyncio.Timeout:
    return asyncio.timeout(seconds if math.isfinite(seconds) else None)


async def _close(env: Env) -> None:
    """Close what can be closed; one that fails or hangs at it is left to itself, as its episode is over."""
    close = getattr(env, "close", None)
    if close is None:
        return
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await guarded(close())
    except Exception as error:
        bounds.bit("unclosed", f"an environment did not close ({told(error)}); it is left to itself")
