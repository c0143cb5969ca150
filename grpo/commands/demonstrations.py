"""Demonstrations for the cold start from a model's own successful trajectories.

    found = successes(load_episodes("runs/NAME"), prompt=REASONING_WITH_TOOLS)
    write_demonstrations("demonstrations.jsonl", found)

and in a recipe, a task class whose __init__ calls Demonstrated.__init__(self, AgentTask(), "demonstrations.jsonl").
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trimtab.environments.base import Env, Message, Task, ToolCall
from trimtab.environments.json_lines import json_line, read_json_lines
from trimtab.grpo.runs.durable import replace_text
from trimtab.rollout.formats.openai_messages import from_openai, to_openai
from trimtab.rollout.formats.prompts import MAX_EXECUTIONS, with_prompt


class Trajectory(Protocol):
    """What is needed of an episode: rollout.types.Episode has it, and what load_episodes reads."""

    @property
    def messages(self) -> tuple[Message, ...]: ...
    @property
    def rewards(self) -> Mapping[str, float]: ...
    @property
    def ended(self) -> str: ...
    @property
    def resets(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class SavedEpisode:
    """What a run's folder keeps of an episode."""

    domain: str
    messages: tuple[Message, ...]
    rewards: Mapping[str, float]
    ended: str
    resets: tuple[int, ...]


def load_episodes(run: str | Path) -> Iterator[SavedEpisode]:
    """The episodes of a run's folder, oldest step first.

    Raises:
        ValueError: the folder has none.
    """
    if not (files := sorted(Path(run).glob("episodes/step-*.jsonl"))):
        raise ValueError(f"{run} has no episodes/step-*.jsonl; name the folder of a run")
    for file in files:
        for _, one in read_json_lines(file):
            messages = tuple(map(_message, one["messages"]))
            yield SavedEpisode(one["domain"], messages, one["rewards"], one["ended"], tuple(one.get("resets", ())))


def _message(raw: Mapping[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in raw.get("tool_calls", ()))
    return Message(**{**raw, "tool_calls": calls, "tools": tuple(raw.get("tools", ()))})


def successes(
    episodes: Iterable[Trajectory],
    *,
    part: str = "outcome",
    at_least: float = 1.0,
    prompt: str | None = None,
    most_calls: int = MAX_EXECUTIONS,
) -> Iterator[tuple[Message, ...]]:
    """The conversations that ended with an answer and earned at least so much of a reward part, up to the answer.

    Left out are those with more tool calls than most_calls, and those whose context was reset: the policy never saw all
    of their messages together.

    Args:
        prompt: the system prompt to show them under (rollout.prompts.with_prompt); None: the one they have.
    """
    for episode in episodes:
        messages = episode.messages
        while messages and messages[-1].role != "assistant":
            messages = messages[:-1]
        if not messages or episode.ended != "done" or episode.resets or messages[-1].tool_calls:
            continue
        calls = sum(len(message.tool_calls) for message in messages)
        if episode.rewards.get(part, 0.0) >= at_least and calls <= most_calls:
            yield messages if prompt is None else with_prompt(messages, prompt)


def write_demonstrations(path: str | Path, demonstrations: Iterable[Sequence[Message]]) -> int:
    """Write conversations as JSON lines of OpenAI messages and return their number."""
    lines = [json_line({"messages": to_openai(messages)}) for messages in demonstrations]
    replace_text(Path(path), "".join(lines))
    return len(lines)


def read_demonstrations(path: str | Path) -> list[tuple[Message, ...]]:
    """Conversations from JSON lines, each {"messages": [...]} in OpenAI's form with reasoning_content.

    Raises:
        ValueError: the file has none, or a line that is no such conversation.
    """
    found = []
    for i, one in read_json_lines(path):
        try:
            found.append(from_openai(one["messages"]))
        except (ValueError, KeyError, TypeError) as error:  # a user's file
            raise ValueError(f'{path}, line {i}: needs {{"messages": [...]}} in OpenAI\'s form ({error})') from error
    if not found:
        raise ValueError(f"{path} has no demonstrations")
    return found


class Demonstrated:
    """A task with the demonstrations of a file in place of its own."""

    def __init__(self, task: Task, path: str | Path):
        self._task = task
        self._demonstrations = read_demonstrations(path)

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], Env]:
        return self._task.sample(rng, held_out=held_out)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        return rng.choice(self._demonstrations)
