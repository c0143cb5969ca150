"""The environment protocol. Environments speak messages, never token ids, and live for one episode."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool by the policy; arguments are JSON values by parameter name."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. Only an assistant reasons and calls, only a system or developer offers tools."""

    role: Role
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions to call, each with name, description and parameters (a JSON schema)."""
    response_format: Mapping[str, Any] | None = None
    """The JSON schema that answers must follow."""


@dataclass(frozen=True, slots=True)
class Step:
    """The environment's answer to one assistant message.

    rewards holds the named, unweighted parts, each added to what earlier steps gave; the domain's
    configuration weighs them. notes, by the name of a part, are for the reader of an episode (a judge's rationales):
    logged, never trained on, never shown to the policy. An episode ends at the first done=True.
    """

    replies: tuple[Message, ...] = ()
    rewards: Mapping[str, float] = field(default_factory=dict)
    done: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)


class Env(Protocol):
    """One episode of one task.

    An environment that holds a resource also has an async close(). Whoever plays the episode awaits it once the episode
    is over, however it ended; it may be called twice. One whose close() has nothing to close says so by holds = False:
    a domain's open_environments are those that hold something.
    """

    async def start(self) -> tuple[Message, ...]:
        """Return the opening messages; the last one is from the user."""

    async def step(self, message: Message) -> Step:
        """Take the assistant's message; return replies, reward parts and whether the episode is over.

        Raises:
            VoidEpisode: nothing can be said about this episode (a judge failed, a tool broke): it never trains.
        """


@dataclass(frozen=True, slots=True)
class Known:
    """A prompt with an answer that must earn full marks, as `trimtab grade-check` tries it.

    where: the file and line, or what else tells it; make_env makes the environment that opens with the prompt.
    """

    where: str
    prompt: str
    answer: str
    make_env: Callable[[], Env]


class VoidEpisode(Exception):
    """The episode cannot be scored through no fault of the policy; it is dropped, never scored zero."""


class Task(Protocol):
    """A family of tasks of one domain.

    One that knows the answers to its prompts may also have known(most), which yields at most so many Known.
    """

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], Env]:
        """Draw one task; the result makes a fresh Env for each attempt at it.

        Tasks drawn with held_out=True and held_out=False never share a prompt.
        """

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        """A whole generated conversation for the cold start, never of a held-out task."""
