"""The mixture of domains: which tasks are drawn at which step, and how they are played."""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from trimtab.environments.base import Env, Task
from trimtab.grpo.config import Config, Domain, load, resolved
from trimtab.rewards import bounds
from trimtab.rewards.length import by_group, kimi_length_rewards, overlong_penalty, relative_penalties
from trimtab.rewards.types import Answer, GroupReward
from trimtab.rollout import play
from trimtab.rollout.attempt import Generate, Rules
from trimtab.rollout.context import Format
from trimtab.rollout.formats.chat import Chat
from trimtab.rollout.formats.template import TemplateChat, load_format
from trimtab.rollout.types import Group, Lost, PolicyShape

HELD_OUT_ATTEMPTS = 20
"""Draws for one held-out prompt, before a task is taken to have no more."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One group to be played."""

    name: str
    domain: str
    make_env: Callable[[], Env]
    seed: int


@dataclass(frozen=True, slots=True)
class PlayedBatch:
    """What came back of a batch of draws: groups of at least two episodes, and what was lost on the way."""

    groups: tuple[Group, ...]
    lost: tuple[Lost, ...]


def load_tasks(config: Config, **services: Any) -> dict[str, Task]:
    """The task of each domain, with those services that it names.

    Raises:
        ValueError: an import path leads nowhere, of a task or of a reward.
    """
    for domain in config.domains.values():
        rules(config, domain)
    return {name: domain.load_task(**services) for name, domain in config.domains.items()}


def chat_of(config: Config, model: str) -> Chat | TemplateChat:
    """The chat format of a checkpoint folder of this run; the recipe's syntax is the policy's.

    Raises:
        ValueError: it has none, or one that cannot be played.
    """
    return _chat(model, config.syntax if model == config.model else "")


@cache
def _chat(model: str, syntax: str) -> Chat | TemplateChat:
    """Reading a tokenizer takes seconds."""
    return load_format(model, load(syntax) if ":" in syntax else syntax)


def draw_step(config: Config, tasks: Mapping[str, Task], step: int) -> list[Draw]:
    """The groups of a training step: a function of the seed and the step alone, so a resumed run draws the same."""
    return [
        _draw(config, tasks, name, f"step{step}-{name}-{i}", held_out=False)
        for name, domain in config.domains.items()
        for i in range(domain.prompts)
    ]


def draw_held_out(config: Config, tasks: Mapping[str, Task]) -> list[Draw]:
    """The held-out prompts: the same for every run, whatever its seed, and none twice where the task can tell.

    A task can tell if what makes its environments compares equal for equal prompts (a frozen dataclass does).
    """
    fixed = replace(config, seed=0)
    return [draw for name in config.domains for draw in _distinct(fixed, tasks, name)]


def _distinct(config: Config, tasks: Mapping[str, Task], domain: str) -> list[Draw]:
    """As many different draws as the domain's tasks give, at most config.held_out."""
    found: list[Draw] = []
    for i in range(config.held_out * HELD_OUT_ATTEMPTS):
        draw = _draw(config, tasks, domain, f"held_out-{domain}-{i}", held_out=True)
        if all(draw.make_env != other.make_env for other in found):
            found.append(draw)
        if len(found) == config.held_out:
            break
    return found


def _draw(config: Config, tasks: Mapping[str, Task], domain: str, name: str, *, held_out: bool) -> Draw:
    seed = stable_seed(config.seed, name)
    try:
        make_env = tasks[domain].sample(random.Random(seed), held_out=held_out)
    except Exception as error:  # one prompt of other people's data, not the run
        make_env = partial(_raise, error)
    return Draw(name, domain, make_env, seed)


def _raise(error: Exception) -> Env:
    raise error


def stable_seed(*parts: object) -> int:
    """A seed of 31 bits from anything printable, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


async def play_draws(
    draws: Iterable[Draw],
    config: Config,
    generate: Generate,
    chat: Format,
    group_size: int,
    policy: PolicyShape | None = None,
) -> PlayedBatch:
    """Play all groups at once; the engines batch whatever is in flight.

    Args:
        policy: what recordings must fit; None: they are not checked against it.
    """
    by_domain = {name: replace(rules(config, domain), policy=policy) for name, domain in config.domains.items()}
    gates = {name: Gate(domain.open_environments) for name, domain in config.domains.items()}

    async def played(draw: Draw) -> play.PlayedGroup:
        async with gates[draw.domain].room_for(group_size if _holds(draw) else 0, draw.domain):
            return await play.play_group(
                draw.make_env,
                name=draw.name,
                domain=draw.domain,
                group_size=group_size,
                generate=generate,
                chat=chat,
                rules=by_domain[draw.domain],
                seed=draw.seed,
            )

    found = await play.gather(map(played, draws))
    return PlayedBatch(
        groups=tuple(one.group for one in found if one.group is not None),
        lost=tuple(lost for one in found for lost in one.lost),
    )


def _holds(draw: Draw) -> bool:
    """Whether the environments of a draw hold anything open (environments/base.py: Env)."""
    try:
        env = draw.make_env()
    except Exception:  # which play_group says
        return False
    return bool(getattr(env, "holds", hasattr(env, "close")))


class Gate:
    """Lets groups in while their environments and those inside are no more than a number, in the order they come."""

    def __init__(self, most: int):
        self._most, self._inside = most, 0
        self._turn = asyncio.Lock()
        self._left = asyncio.Event()

    @asynccontextmanager
    async def room_for(self, group: int, domain: str) -> AsyncIterator[None]:
        """Wait for room. A group that is larger than the number goes in alone."""
        async with self._turn:
            while group and self._inside and self._inside + group > self._most:
                bounds.bit(
                    "open_environments",
                    f"domain {domain} has open_environments = {self._most}: other groups of a batch wait for these",
                )
                self._left.clear()
                await self._left.wait()
            self._inside += group
        try:
            yield
        finally:
            self._inside -= group
            self._left.set()


def rules(config: Config, domain: Domain) -> Rules:
    """How a domain is played and scored.

    Raises:
        ValueError: the import path of a reward leads nowhere.
    """
    return Rules(
        sampling=config.sampling,
        max_len=resolved(config.rollout.max_len),
        weigh=partial(weigh, domain),
        group_rewards={"length": length_reward(domain), **domain.load_group_rewards()},
        process_rewards=domain.load_process_rewards(),
        context=domain.context,
        thinking=domain.thinking,
        max_turns=domain.max_turns,
        floor=domain.floor,
        episode_seconds=domain.episode_seconds,
        group_seconds=domain.group_seconds,
    )


def length_reward(domain: Domain) -> GroupReward:
    """The part "length" of a group; an episode that never earned the score part counts as wrong."""
    if domain.length == "overlong":
        penalty = partial(overlong_penalty, soft=resolved(domain.length_soft), hard=resolved(domain.length_hard))
        return lambda answers: [penalty(answer.length) for answer in answers]
    form = relative_penalties if domain.length == "relative" else kimi_length_rewards
    compared = by_group(form, part=domain.score)

    def reward(answers: Sequence[Answer]) -> Sequence[float]:
        return compared([replace(answer, rewards={domain.score: 0.0, **answer.rewards}) for answer in answers])

    return reward


def weigh(domain: Domain, parts: Mapping[str, float]) -> float:
    """The reward that trains: the weighted sum of the named parts; a part that is absent counts 0."""
    return sum(weight * parts.get(name, 0.0) for name, weight in domain.weights.items())


def part_means(groups: Iterable[Group]) -> dict[str, float]:
    """Mean of every reward part, by `domain/part`, over the episodes that have it."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for episode in group.episodes:
            for part, value in episode.rewards.items():
                values.setdefault(f"{group.domain}/{part}", []).append(value)
    return {name: sum(v) / len(v) for name, v in values.items()}


def scores(groups: Iterable[Group], config: Config) -> dict[str, float]:
    """Mean of each domain's score part over all episodes; one that never earned the part counts 0."""
    values: dict[str, list[float]] = {name: [] for name in config.domains}
    for group in groups:
        part = config.domains[group.domain].score
        values[group.domain] += [episode.rewards.get(part, 0.0) for episode in group.episodes]
    return {name: sum(v) / max(len(v), 1) for name, v in values.items()}


def prompt_scores(groups: Iterable[Group], config: Config) -> dict[str, dict[str, float]]:
    """By domain and prompt, the mean of the score part over the prompt's episodes: what intervals are made of."""
    means: dict[str, dict[str, float]] = {name: {} for name in config.domains}
    for group in groups:
        part = config.domains[group.domain].score
        earned = [episode.rewards.get(part, 0.0) for episode in group.episodes]
        means[group.domain][group.name] = sum(earned) / len(earned)
    return means
