"""A dry run: what a domain's tasks, openings and rewards do wrong is told before an engine starts.

Some prompts of every domain are opened, measured against the window and answered with made-up answers, which its
rewards score; judges are stand-ins that find everything satisfied.
"""

import asyncio
import random
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

from accelerate.tracking import get_available_trackers

from trimtab.environments.base import Env, Message, Task, VoidEpisode
from trimtab.environments.guard import guarded
from trimtab.grpo.config import Config, Domain, resolved
from trimtab.grpo.sampling.mixture import rules, stable_seed
from trimtab.rewards.judging.rubric import Rubric, RubricScore
from trimtab.rewards.threads import Threads
from trimtab.rewards.types import Answer, group_values, named_parts
from trimtab.rollout.context import Context, Format

PROMPTS = 12
"""Training prompts of a domain that are opened."""
ANSWERS = ("42", "", "I do not know.")
"""What is made up for the first prompts, in turn."""
ANSWERED = 6
SECONDS = 30.0
"""For one opening, or the scoring of one answer."""
SCORING = Threads("rehearsal", 4)


async def yes(prompt: str) -> str:
    """A stand-in for a judge of single criteria."""
    return "yes"


async def all_satisfied(answer: str, rubric: Rubric, *, task: str = "") -> RubricScore:
    """A stand-in for a judge of whole rubrics."""
    return RubricScore(rubric, (True,) * len(rubric.criteria), (None,) * len(rubric.criteria))


STAND_INS: Mapping[str, Any] = {"judge": yes, "grade": all_satisfied}
"""What tasks may name (grpo/sampling/services.py), without a model behind it."""


def rehearse(config: Config, tasks: Mapping[str, Task], chat: Format | None) -> None:
    """Play the beginning of every domain without an engine.

    Args:
        tasks: made with STAND_INS.
        chat: the policy's format; None: the cold start has still to make it, so openings are not measured.

    Raises:
        ValueError: more openings than the domain's max_lost cannot be played, its rewards fail on every made-up answer,
            a held-out prompt cannot be drawn, or a tracker is not installed. Its cause is what the user's code raised.
    """
    check_trackers(config)
    for name, domain in config.domains.items():
        try:
            tasks[name].sample(random.Random(stable_seed(config.seed, "rehearsal", name)), held_out=True)
        except Exception as error:
            raise ValueError(f"domain {name}: no held-out prompt can be drawn: {_told(error)}") from error
        asyncio.run(_Rehearsal(name, domain, resolved(config.rollout.max_len), chat).play(config, tasks[name]))


def check_trackers(config: Config) -> None:
    """Raises ValueError for a tracker that is not installed."""
    found = {str(tracker) for tracker in get_available_trackers()}
    if missing := [tracker for tracker in config.trackers if tracker not in found]:
        raise ValueError(f"the tracker {missing[0]} is not installed: pip install {missing[0]}, or leave it out")


class _Rehearsal:
    """Of one domain."""

    def __init__(self, name: str, domain: Domain, window: int, chat: Format | None):
        self._name, self._domain, self._window, self._chat = name, domain, window, chat

    async def play(self, config: Config, task: Task) -> None:
        rng = random.Random(stable_seed(config.seed, "rehearsal", self._name))
        envs: list[Env] = []
        unplayable: list[Exception] = []
        for _ in range(PROMPTS):
            try:
                envs.append(await self._opened(task, rng))
            except VoidEpisode:
                continue  # what it needs may come later, such as a server
            except Exception as error:
                unplayable.append(error)
        if len(unplayable) > self._domain.max_lost * PROMPTS:
            raise self._wrong(f"{len(unplayable)} of {PROMPTS} prompts cannot be played", unplayable[0])
        if unplayable:
            share = f"{len(unplayable)} of {PROMPTS} prompts cannot be played and will be left out"
            print(f"trimtab: domain {self._name}: {share}: {_told(unplayable[0])}", file=sys.stderr)
        await self._score(envs[:ANSWERED])
        for env in envs[ANSWERED:]:
            await _close(env)
        await self._score_groups(config)

    async def _opened(self, task: Task, rng: random.Random) -> Env:
        """An environment whose opening fits the window.

        Raises:
            Exception: it has none.
        """
        env = task.sample(rng, held_out=False)()
        try:
            async with asyncio.timeout(SECONDS):
                opening = tuple(await guarded(env.start()))
            if self._chat is not None:
                self._measure(opening, self._chat)
        except BaseException:
            await _close(env)
            raise
        return env

    def _measure(self, opening: Sequence[Message], chat: Format) -> None:
        context = Context(chat, opening, self._domain.context, thinking=self._domain.thinking, max_len=self._window)
        if (length := len(context.prompt_ids())) >= self._window:
            raise ValueError(f"an opening of {length} tokens does not fit rollout.max_len = {self._window}; raise it")

    async def _score(self, envs: Sequence[Env]) -> None:
        failed: list[Exception] = []
        for env, answer in zip(envs, cycle(ANSWERS), strict=False):
            try:
                async with asyncio.timeout(SECONDS):
                    named_parts((await guarded(env.step(Message("assistant", answer)))).rewards)
            except VoidEpisode:
                continue
            except Exception as error:
                failed.append(error)
            finally:
                await _close(env)
        if failed and len(failed) == len(envs):
            raise self._wrong("its environment or reward fails on made-up answers", failed[0])
        if failed:
            share = f"its environment or reward fails on {len(failed)} of {len(envs)} made-up answers"
            print(f"trimtab: domain {self._name}: {share}: {_told(failed[0])}", file=sys.stderr)

    async def _score_groups(self, config: Config) -> None:
        answers = [Answer(text, length=len(text) + 1, rewards={self._domain.score: 0.0}) for text in ANSWERS]
        found = rules(config, self._domain)
        for part, reward in [*found.group_rewards.items(), *found.process_rewards.items()]:
            try:
                await SCORING.run(partial(group_values, reward, answers), limit=SECONDS)
            except VoidEpisode:
                continue
            except Exception as error:
                raise self._wrong(f"its reward {part} fails on made-up answers", error) from error

    def _wrong(self, what: str, error: Exception) -> ValueError:
        found = ValueError(f"domain {self._name}: {what}: {_told(error)}")
        found.__cause__ = error
        return found


async def _close(env: Env) -> None:
    if close := getattr(env, "close", None):
        async with asyncio.timeout(SECONDS):
            await guarded(close())


def _told(error: Exception) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"no end within {SECONDS:g} s"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
