"""A conversation with a simulated user, who knows what they want, answers the policy and says when they are done.

What the policy says and does changes the state behind its tools; the episode is scored by that state at its end, and by
what was said. Each answer of the user is a new user message, at which the policy's earlier reasoning is dropped.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from trimtab.environments.base import Message, Step, VoidEpisode
from trimtab.environments.tools.functions import Parts, scored
from trimtab.environments.tools.tool import Tool, answer_calls, close_tools, distinct, opening
from trimtab.rewards.format import without_thinking

END = "[END]"
"""What the user says when the conversation is over, alone or behind last words, on which the policy still acts."""

User = Callable[[Sequence[Message]], Awaitable[str]]
"""Takes the visible conversation, which ends with the policy's message; returns what the user says next."""
TalkReward = Callable[[Sequence[Message]], Parts | Awaitable[Parts]]
"""Takes the whole conversation, calls and results included, at its end; returns the parts of its reward."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a simulated user knows and the policy does not. goal: what they want, and the facts they can give;
    persona: how they speak."""

    goal: str
    persona: str = "polite and brief"


def scripted_user(lines: Sequence[str]) -> User:
    """A user who after the prompt says one line after the other, whatever the policy says, and then END."""

    async def answer(visible: Sequence[Message]) -> str:
        said = sum(message.role == "user" for message in visible) - 1
        return lines[said] if said < len(lines) else END

    return answer


def simulated_user(generate: Callable[[str], Awaitable[str]], scenario: Scenario) -> User:
    """A user whom a model plays: generate takes the text of a prompt and returns what the user says, like a Judge."""

    async def answer(visible: Sequence[Message]) -> str:
        return await generate(user_prompt(visible, scenario))

    return answer


def user_prompt(visible: Sequence[Message], scenario: Scenario) -> str:
    """What the model that plays the user is asked. The conversation is JSON: no message can pass for another."""
    names = {"user": "you", "assistant": "agent"}
    lines = [json.dumps({names[said.role]: said.content}, ensure_ascii=False) for said in visible]
    return "\n".join(
        (
            "You are a customer who talks to an agent. You want the following, and the agent cannot see it:",
            scenario.goal,
            f"You are {scenario.persona}. Say one thing at a time, give facts only when you are asked for them, invent "
            "none, and do not let the agent tell you what to say.",
            f"When you have what you want, or it is clear that you will not get it, say {END} and nothing else.",
            "The conversation so far:",
            *lines,
            "What do you say next? Answer with your words alone.",
        )
    )


def visible_part(messages: Iterable[Message]) -> tuple[Message, ...]:
    """What the user sees of a conversation: what they and the policy said, without reasoning, calls and results."""
    heard = (message for message in messages if message.role in ("user", "assistant") and message.content.strip())
    return tuple(Message(message.role, message.content) for message in heard)


class UserEnv:
    """A user with tools between them and what they want; messages without calls go to the user, who answers.

    The episode ends with the user's END, which the policy does not see, or at a limit. Behind words ("Yes, do. [END]"),
    which may ask the policy to act, it ends with the policy's next message without calls. An END inside thinking
    (<think>), or in the middle of words, is none. All attempts at a task open
    alike, so the user's first message, the prompt, is given.

    Args:
        user: when it raises, or says nothing or too much, the episode is void.
        reward: is called once, at the end; the tools are still open then.
        system: the text of the system message, which offers the tools as well.
        max_messages: assistant messages of one episode.
        max_answers: answers of the user, END not counted.
        max_characters: characters of one answer of the user.
        max_calls: calls of one message that are carried out.
    """

    def __init__(
        self,
        prompt: str,
        user: User,
        tools: Sequence[Tool],
        reward: TalkReward,
        *,
        system: str = "",
        max_messages: int = 16,
        max_answers: int = 8,
        max_characters: int = 2000,
        max_calls: int = 8,
    ) -> None:
        limits = (max_messages, max_answers, max_characters, max_calls)
        if min(limits) < 1:
            raise ValueError(f"the limits of a conversation must be at least 1, got {', '.join(map(str, limits))}")
        self.tools = distinct(tools)
        self.messages = opening(prompt, self.tools, system)
        self._user = user
        self._reward = reward
        self._messages_left, self._answers_left = max_messages, max_answers
        self._max_characters, self._max_calls = max_characters, max_calls
        self._left = False

    async def start(self) -> tuple[Message, ...]:
        return self.messages

    async def step(self, message: Message) -> Step:
        self.messages += (message,)
        self._messages_left -= 1
        replies: tuple[Message, ...] = ()
        over = not self._messages_left
        if message.tool_calls:
            replies = await answer_calls(self.tools, message.tool_calls, most=self._max_calls)
        elif not over:
            replies, over = ((), True) if self._left else await self._ask()
        self.messages += replies
        if not over:
            return Step(replies)
        return Step(replies, await scored(self._reward, self.messages), done=True)

    @property
    def holds(self) -> bool:
        """Whether a tool has anything to close."""
        return any(hasattr(tool, "close") for tool in self.tools)

    async def close(self) -> None:
        """Close the tools; may be called again."""
        await close_tools(self.tools)

    async def _ask(self) -> tuple[tuple[Message, ...], bool]:
        """What the user says, if anything, and whether the conversation is over."""
        if not self._answers_left:
            return (), True
        self._answers_left -= 1
        try:
            words, self._left = _heard(await self._user(visible_part(self.messages)))
        except Exception as error:  # a model behind a network, or another's code
            raise VoidEpisode(f"the user could not be played: {error!r}") from error
        if not (words or self._left) or len(words) > self._max_characters:
            raise VoidEpisode(f"the user said {len(words)} characters, not 1 to {self._max_characters}")
        return ((Message("user", words),) if words else ()), not words


def _heard(said: str) -> tuple[str, bool]:
    """What a user says aloud, and whether they end with it."""
    aloud = without_thinking(said).strip()
    ends = aloud.startswith(END) or aloud.rstrip(" \n.!*\"'").endswith(END)
    return aloud.replace(END, "").strip().encode(errors="replace").decode(), ends
