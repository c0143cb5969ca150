"""What an episode keeps when its window fills: test-time context management, in training as at test time.

A round is an assistant message with tool calls, together with their results. Every policy keeps the opening, all
messages of users and developers, and all answers (assistant messages without calls), in their order. Of the rounds
since the opening:

    none          all stay; the episode ends when the window is full
    summary       all go; a summary that the policy writes stands behind the last user message instead
    discard-75    the first 75 % go, rounded down, so that the newest stays
    discard-all   all go, the newest too
    keep-recent   all stay, but only the last `keep` with their results; in place of each earlier one stands OMITTED

A round that goes takes its reasoning, calls and results along. One that stays keeps its calls as they were sampled, and
its reasoning as long as no user message has come since. A policy acts when the next prompt reaches its trigger, a share
of the window; what it leaves is a new prompt, so a new segment begins. Where it finds nothing to drop, the episode goes
on and ends with the window.

Summary: a user message (SUMMARISE) asks for it. As every user message it drops earlier reasoning, so the policy sums up
its calls, their results and its last summary. The answer is sampled like any turn and trains like any turn; the next
summary takes its place. To leave room for it, the newest rounds are kept from it while they reach into the upper half
of what lies above the trigger; they go with the others, and the policy has to make their calls again.

Sources: DeepSeek-V3.2 report, section 4.4, which leaves open what exactly is kept; GLM-5 report (arXiv 2602.15763),
section 4.2.4, for keep-recent, there from the first round on (a trigger close to 0), and for Discard-all above it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from trimtab.environments.base import Message
from trimtab.rollout.formats.letters import cleaned
from trimtab.rollout.types import Episode

SUMMARISE = (
    "The context is nearly full and will be cleared. Do not call tools. Write a summary to go on from: "
    "what was found, with exact names and numbers, what was tried in vain, and what is left to do."
)
SUMMARY = "\n\nSummary of the work so far:\n"
"""Between the last user message and the summary."""
OMITTED = "(This result is no longer shown.)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPolicy:
    """What is done about a window that fills."""

    method: Literal["none", "summary", "discard-75", "discard-all", "keep-recent"] = "none"
    """See rollout/context.py for what each keeps."""
    trigger: float = 0.8
    """Share of the window from which on the next prompt is too long."""
    keep: int = 5
    """Rounds of which keep-recent keeps the results."""
    discard_all_at: float | None = None
    """Share of the window at which Discard-all follows on keep-recent, where that left so much; None: never."""

    def __post_init__(self) -> None:
        if not 0 < self.trigger <= 1:
            raise ValueError(f"context.trigger is a share of the window in (0, 1], got {self.trigger}")
        if self.keep < 1:
            raise ValueError(f"context.keep must be at least 1 (discard-all keeps no round), got {self.keep}")
        if self.discard_all_at is not None:
            if self.method != "keep-recent":
                raise ValueError(f"context.discard_all_at goes with keep-recent, got {self.method}; leave it out")
            if not 0 < self.discard_all_at <= 1:
                raise ValueError(
                    f"context.discard_all_at is a share of the window in (0, 1], got {self.discard_all_at}"
                )


class Dialogue(Protocol):
    """What chat.Conversation and template.TemplateConversation have in common."""

    def prompt_ids(self) -> tuple[int, ...]: ...
    def add(self, messages: Iterable[Message]) -> None: ...
    def add_sampled(self, ids: Sequence[int] | np.ndarray) -> Message: ...


class Format(Protocol):
    """What chat.Chat and template.TemplateChat have in common."""

    stop_ids: tuple[int, ...]

    def verify(self, *, thinking: bool, tools: bool) -> None: ...
    def conversation(self, messages: Iterable[Message], *, thinking: bool) -> Dialogue: ...
    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


@dataclass(frozen=True, slots=True)
class _Shown:
    """A message that the policy sees."""

    message: Message
    ids: tuple[int, ...] = ()
    """As the policy sampled it; empty for what it did not sample."""
    instead: str | None = None
    """What the policy sees in place of its content."""

    @property
    def seen(self) -> Message:
        return self.message if self.instead is None else replace(self.message, content=self.instead)


class Context:
    """The conversation of one episode: all that was said, and what of it the policy still sees."""

    def __init__(
        self, chat: Format, opening: Iterable[Message], policy: ContextPolicy, *, thinking: bool, max_len: int
    ) -> None:
        self._chat, self._policy, self._thinking, self._max_len = chat, policy, thinking, max_len
        self._shown = [_Shown(message) for message in cleaned(opening)]
        self._opening = len(self._shown)
        self._conversation = self._talk(self._shown)
        self.messages = tuple(shown.message for shown in self._shown)
        """All that was said, requests for summaries and summaries included."""
        self.resets: tuple[int, ...] = ()
        """How much of messages had been said at each reset."""
        self.summarising = False
        """Whether the policy's next turn is a summary, which no environment sees."""

    def prompt_ids(self) -> tuple[int, ...]:
        """What the policy sees now."""
        return self._conversation.prompt_ids()

    def next_prompt(self) -> tuple[int, ...]:
        """What the policy sees next, once there is room again where its window was filling."""
        prompt = self.prompt_ids()
        if self._policy.method == "none" or len(prompt) < self._policy.trigger * self._max_len:
            return prompt
        if self._policy.method == "summary":
            return self._ask_for_summary() or prompt
        before, rounds = self._shown, self._rounds()
        self._show(self._kept(rounds))
        second = self._policy.discard_all_at
        if second is not None and len(self.prompt_ids()) >= second * self._max_len:
            self._show(self._without(rounds))
        if self._shown != before:
            self.resets += (len(self.messages),)
        return self.prompt_ids()

    def add(self, messages: Iterable[Message]) -> None:
        """Append what the environment says.

        Raises:
            FormatError: the format cannot say it.
        """
        messages = cleaned(messages)
        self._conversation.add(messages)
        self._shown += map(_Shown, messages)
        self.messages += messages

    def add_sampled(self, ids: np.ndarray) -> Message:
        """Append what the policy sampled, and return what it says. A summary starts the conversation anew.

        Raises:
            ValueError: it is malformed, or a summary that calls a tool; nothing is appended.
        """
        message = self._conversation.add_sampled(ids)
        if self.summarising:
            self._restart(message)
        else:
            self._shown.append(_Shown(message, tuple(ids.tolist())))
        self.messages += (message,)
        if self.summarising:
            self.summarising = False
            self.resets += (len(self.messages),)
        return message

    def _rounds(self) -> list[list[int]]:
        """Where in what is shown the messages of each round are."""
        rounds: list[list[int]] = []
        for i, shown in enumerate(self._shown):
            if i >= self._opening and shown.message.tool_calls:
                rounds.append([i])
            elif i >= self._opening and shown.message.role == "tool":
                rounds[-1].append(i)
        return rounds

    def _without(self, rounds: Iterable[list[int]]) -> list[_Shown]:
        gone = {i for one in rounds for i in one}
        return [shown for i, shown in enumerate(self._shown) if i not in gone]

    def _kept(self, rounds: Sequence[list[int]]) -> list[_Shown]:
        if self._policy.method == "discard-75":
            return self._without(rounds[: len(rounds) * 3 // 4])
        if self._policy.method == "discard-all":
            return self._without(rounds)
        earlier = {i for one in rounds[: -self._policy.keep] for i in one[1:]}
        return [replace(one, instead=OMITTED) if i in earlier else one for i, one in enumerate(self._shown)]

    def _show(self, shown: list[_Shown]) -> None:
        if shown != self._shown:
            self._conversation = self._talk(shown)
            self._shown = shown

    def _talk(self, shown: Sequence[_Shown]) -> Dialogue:
        """A conversation of what is shown; what the policy said is carried as it was sampled."""
        opening = [one.seen for one in shown[: self._opening]]
        conversation = self._chat.conversation(opening, thinking=self._thinking)
        results: list[Message] = []
        for one in shown[self._opening :]:
            if one.ids:
                conversation.add(results)
                conversation.add_sampled(one.ids)
                results = []
            else:
                results.append(one.seen)
        conversation.add(results)
        return conversation

    def _ask_for_summary(self) -> tuple[int, ...]:
        """The prompt that asks for a summary; empty where there is no round to sum up, or no room to do so."""
        request = Message("user", SUMMARISE)
        room = (1 - self._policy.trigger) / 2 * self._max_len
        rounds = self._rounds()
        for end in range(len(rounds), 0, -1):
            conversation = self._talk([*self._without(rounds[end:]), _Shown(request)])
            prompt = conversation.prompt_ids()
            if len(prompt) + room <= self._max_len:
                self._conversation, self.summarising = conversation, True
                self.messages += (request,)
                return prompt
        return ()

    def _restart(self, message: Message) -> None:
        if message.tool_calls:
            raise ValueError(f"a summary calls no tools, got {message.tool_calls[0].name}")
        shown = [replace(one, instead=None) for one in self._without(self._rounds())]
        last = max(i for i, one in enumerate(shown) if one.message.role in ("user", "developer"))
        shown[last] = replace(shown[last], instead=shown[last].message.content + SUMMARY + message.content)
        self._show(shown)


def steps(episode: Episode) -> int:
    """Tool calls of an episode."""
    return sum(len(message.tool_calls) for message in episode.messages if message.role == "assistant")


def fewest_steps(episodes: Sequence[Episode]) -> Episode | None:
    """Parallel-fewest-step: of several attempts, the one that answered with the fewest tool calls, the first of equals.

    An attempt that ended otherwise than with an answer does not count; None where all did. What it costs is the steps
    of all attempts. Source: DeepSeek-V3.2 report, section 4.4.
    """
    answered = [one for one in episodes if one.ended == "done" and not _last_said(one).tool_calls]
    return min(answered, key=steps, default=None)


def _last_said(episode: Episode) -> Message:
    return next(message for message in reversed(episode.messages) if message.role == "assistant")
