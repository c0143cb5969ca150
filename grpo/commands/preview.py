"""See the episodes of a recipe before any model is trained on them: a script plays the policy."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from trimtab.environments.base import Message
from trimtab.grpo.config import Config
from trimtab.grpo.sampling.mixture import draw_step, load_tasks, play_draws
from trimtab.grpo.setup.rehearsal import STAND_INS
from trimtab.grpo.setup.resolve import with_lengths
from trimtab.rollout.scripted import Say, Scripted, byte_chat
from trimtab.rollout.types import Episode, Group

MAX_TOKENS = 8192
"""Of one turn; tokens are bytes here."""


def preview(
    config: Config, say: Say, *, group_size: int = 2, max_len: int = 65536, **services: Any
) -> tuple[Group, ...]:
    """Play one group of every domain, print its conversations with their reward parts, and return the groups.

    Args:
        max_len: the window in bytes, in place of the recipe's in tokens.
        services: what tasks ask for by name, such as a judge; stand-ins find everything satisfied.

    Raises:
        ValueError: an import path leads nowhere, fewer than two episodes of a group could be scored.
    """
    config = with_lengths(
        replace(
            config,
            domains={name: replace(domain, prompts=1) for name, domain in config.domains.items()},
            rollout=replace(config.rollout, max_len=max_len),
            sampling=replace(config.sampling, max_tokens=MAX_TOKENS),
        )
    )
    chat = byte_chat()
    draws = draw_step(config, load_tasks(config, **{**STAND_INS, **services}), step=0)
    played = asyncio.run(play_draws(draws, config, Scripted(chat, say), chat, group_size))
    if len(played.groups) < len(draws):
        reasons = dict.fromkeys(lost.reason for lost in played.lost)
        raise ValueError(f"{len(played.lost)} episodes could not be scored: {'; '.join(reasons)}")
    for group in played.groups:
        print(f"=== {group.domain}")
        for episode in group.episodes:
            print("\n".join(account(episode)), flush=True)
    return played.groups


def account(episode: Episode) -> Iterator[str]:
    """Lines that tell an episode: what was said, and what it earned."""
    yield f"--- {episode.name} ({episode.ended})"
    for message in episode.messages:
        yield from _lines(message)
    parts = ", ".join(f"{part} {value:.3g}" for part, value in episode.rewards.items())
    yield f"reward {episode.reward:.3g}: {parts}"
    for part, note in episode.notes.items():
        yield f"{part}: {note}"


def _lines(message: Message) -> Iterator[str]:
    if message.reasoning:
        yield f"{message.role} thinks: {message.reasoning}"
    if message.content:
        yield f"{message.role}: {message.content}"
    for call in message.tool_calls:
        yield f"{message.role} calls {call.name}({json.dumps(dict(call.arguments), ensure_ascii=False)})"
