"""The rules of chat.py for a model that brings its own chat template, through its tokenizer.

The template says how a conversation reads. Within a segment, what the policy sampled is carried as ids and never
tokenised again; a new segment's prompt is the template's text.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.formats.chat import SPECIAL_TOKENS, Chat, MarkupError, check_turns, check_unicode
from trimtab.rollout.formats.openai_messages import dump_arguments, load_arguments, to_openai
from trimtab.rollout.formats.strict_json import dumps


@dataclass(frozen=True, slots=True)
class Syntax:
    """How a policy writes: reasoning between two marks, then content, then calls as JSON between two marks.

    The defaults are those of Qwen3 and of the Hermes models. A call is {"name": ..., "arguments": {...}}.
    """

    think_open: str = "<think>"
    think_close: str = "</think>"
    call_open: str = "<tool_call>"
    call_close: str = "</tool_call>"
    others: tuple[str, ...] = ("<tool_response>", "</tool_response>")
    """Further marks of the template that no text may contain."""

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.think_open, self.think_close, self.call_open, self.call_close, *self.others)


_PROBE = (
    Message("user", "a"),
    Message("assistant", "b", reasoning="c", tool_calls=(ToolCall("d", {"e": "f"}),)),
    Message("tool", "g"),
)


class TemplateChat:
    """The format that a tokenizer's template defines.

    The template gets messages in OpenAI's form with reasoning_content, arguments as objects, the tools of a system
    message, and enable_thinking.

    Raises:
        ValueError: the tokenizer has no template or no token that ends a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, syntax: Syntax | None = None):
        if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer needs a chat_template and an eos_token; set them before training")
        self._tokenizer = tokenizer
        self.syntax = syntax = syntax or Syntax()
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self._reserved = (*sorted(filter(str.strip, added)), *syntax.marks)
        self.eos, self.eos_id = str(tokenizer.eos_token), int(tokenizer.eos_token_id)
        self._empty = re.compile(re.escape(syntax.think_open) + r"\s*" + re.escape(syntax.think_close) + r"\n*")
        self._verified: set[bool] = set()

    @classmethod
    def load(cls, path: str | Path, syntax: Syntax | None = None) -> "TemplateChat":
        """The format over the tokenizer of a checkpoint folder."""
        return cls(AutoTokenizer.from_pretrained(path), syntax)

    def verify(self, *, thinking: bool) -> None:
        """Try the template on a call and its result, once a mode.

        Raises:
            ValueError: it does not write turns in this syntax, or leaves out reasoning before a tool result.
        """
        if thinking in self._verified:
            return
        ask, said, result = _PROBE if thinking else (_PROBE[0], replace(_PROBE[1], reasoning=""), _PROBE[2])
        self.encode_assistant(said, thinking=thinking)
        text = self.render((ask, said, result), thinking=thinking, turn=True)
        _extended(self, (ask, said), text, thinking=thinking)
        self._verified.add(thinking)

    def conversation(self, messages: Iterable[Message], *, thinking: bool) -> "TemplateConversation":
        """A conversation in this format that begins with messages."""
        return TemplateConversation(self, messages, thinking=thinking)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of text, in which marks become the tokens they stand for."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, marks included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def render(self, messages: Sequence[Message], *, thinking: bool, turn: bool) -> str:
        """The template's text of messages; with turn, the beginning of the policy's next turn behind it.

        Raises:
            ValueError: messages that do not follow each other, or that the template refuses; tools that it leaves out.
        """
        records = to_openai(messages)
        tools = [tool for record in records for tool in record.pop("tools", ())]
        for record in records:
            for call in record.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        try:
            text = self._tokenizer.apply_chat_template(
                records, tools or None, add_generation_prompt=turn, tokenize=False, enable_thinking=thinking
            )
        except TemplateError as error:  # raised by the template, which is the user's
            raise ValueError(f"the template refuses {[message.role for message in messages]}: {error}") from error
        if left_out := [tool["function"]["name"] for tool in tools if tool["function"]["name"] not in text]:
            raise ValueError(
                f"the template leaves out the tools {left_out}; describe them in the system message's text"
            )
        return text

    def is_opened(self, prompt: str, *, thinking: bool) -> bool:
        """Whether the prompt has opened the reasoning, so that the policy goes on within it.

        Raises:
            ValueError: it has, in a conversation without thinking.
        """
        opened = prompt.rstrip().endswith(self.syntax.think_open)
        if opened and not thinking:
            raise ValueError("the template opens reasoning although enable_thinking is false; play it with thinking")
        return opened

    def encode_assistant(self, message: Message, *, thinking: bool) -> tuple[int, ...]:
        """The ids a policy would have sampled to say message in a first turn, the end of the turn included.

        Raises:
            ValueError: text that contains a mark, reasoning without thinking, what parse would not read back as the
                same, a template that does not begin a turn as it asks for one.
        """
        self.check(message, thinking=thinking)
        prompt = self.render(_PROBE[:1], thinking=thinking, turn=True)
        text = self.render((*_PROBE[:1], message), thinking=thinking, turn=False)
        said, ending = text.rpartition(self.eos)[0::2]
        if not text.startswith(prompt) or ending.strip() or self.eos in text[len(prompt) : len(said)]:
            raise ValueError(f"the template does not begin a turn with {prompt[-80:]!r} and end it with {self.eos!r}")
        ids = (*self.encode(said[len(prompt) :]), self.eos_id)
        opened = self.is_opened(prompt, thinking=thinking)
        if (read := self.parse(ids, thinking=thinking, opened=opened)) != message:
            raise ValueError(f"{message} reads back from the template as {read}; give the syntax it uses")
        return ids

    def check(self, message: Message, *, thinking: bool) -> None:
        """Refuse text that could not be told from marks, and what templates have no place for.

        Raises:
            MarkupError: it contains one, or it is not Unicode.
            ValueError: reasoning without thinking, arguments that are not JSON, a developer, a response format.
        """
        if message.role == "developer" or message.response_format is not None:
            raise ValueError("templates know no developer and no response format; say it in a system message's text")
        if message.reasoning and not thinking:
            raise ValueError(f"a conversation without thinking has no reasoning, got {message.reasoning[:80]!r}")
        calls = [text for call in message.tool_calls for text in (call.name, dump_arguments(call.arguments))]
        for text in (message.content, message.reasoning, *calls, *map(dumps, map(dict, message.tools))):
            check_unicode(text)
            if found := [mark for mark in self._reserved if mark in text]:
                raise MarkupError(f"text contains the reserved {found[0]!r}; remove it: {text[:80]!r}")

    def parse(self, ids: Sequence[int] | np.ndarray, *, thinking: bool, opened: bool | None = None) -> Message:
        """Read what the policy sampled, strictly; newlines around reasoning and content belong to the template.

        Args:
            opened: whether the prompt opened the reasoning; None: as the template does in a first turn.

        Raises:
            ValueError: no end of turn or one too many, reasoning not opened or not closed, bytes that are not UTF-8,
                misplaced marks, broken calls.
        """
        ids = [int(i) for i in ids]
        if not ids or ids[-1] != self.eos_id:
            raise ValueError(f"no {self.eos} after {self.decode(ids)[-80:]!r}")
        if opened is None:
            opened = self.is_opened(self.render(_PROBE[:1], thinking=thinking, turn=True), thinking=thinking)
        text, reasoning = self.decode(ids[:-1]), ""
        if "\ufffd" in text:
            raise ValueError(f"broken characters in {text[:80]!r}")
        if thinking:
            opening, closing = "" if opened else self.syntax.think_open, self.syntax.think_close
            if not text.startswith(opening) or closing not in text:
                raise ValueError(f"reasoning must begin with {opening!r} and end with {closing!r}: {text[:80]!r}")
            reasoning, _, text = text.removeprefix(opening).partition(closing)
        content, calls = self._split_calls(text)
        message = Message("assistant", content.strip("\n"), reasoning.strip("\n"), calls)
        self.check(message, thinking=thinking)
        return message

    def _split_calls(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        content, *blocks = text.split(self.syntax.call_open)
        calls = []
        for block in blocks:
            body, closing, after = block.partition(self.syntax.call_close)
            if not closing or after.strip():
                raise ValueError(f"a call is not closed, or text follows it: {block[-80:]!r}")
            match load_arguments(body):
                case {"name": str(name), "arguments": dict(arguments), **rest} if not rest:
                    calls.append(ToolCall(name, arguments))
                case _:
                    raise ValueError(f"a call needs name and arguments, nothing else: {body[:80]!r}")
        return content, tuple(calls)

    def without_empty_reasoning(self, text: str) -> str:
        """text without blocks of reasoning that hold nothing."""
        return self._empty.sub("", text)


def _extended(chat: TemplateChat, seen: Sequence[Message], text: str, *, thinking: bool) -> tuple[str, str]:
    """The template's text up to the end of the last message of seen, an assistant's, and what comes after.

    Raises:
        ValueError: text, which continues seen, does not begin as seen alone reads.
    """
    history = chat.render(seen, thinking=thinking, turn=False).rpartition(chat.eos)[0] + chat.eos
    turns = history.count(chat.eos)
    parts = text.split(chat.eos)
    before, after = chat.eos.join(parts[:turns]) + chat.eos, chat.eos.join(parts[turns:])
    if chat.without_empty_reasoning(before) != chat.without_empty_reasoning(history):
        raise ValueError(
            "the template rewrites what the policy has already said or read, so training would see other tokens; "
            f"use a template that keeps it until a user message. First {history[-200:]!r}, then {before[-200:]!r}"
        )
    return before, after


class TemplateConversation:
    """One conversation as the engine sees it, with the interface of chat.Conversation.

    Reasoning before the last user message is not shown to the template. After tool results the prompt is what the
    engine saw and sampled and the template's text of what came since; the template must leave the history as it
    was, save that blocks of reasoning with nothing in them stay as sampled. After a user message the prompt goes on
    from what was seen if the template still reads the same to the letter; else all of it is tokenised, which starts
    a new segment.

    Raises:
        ValueError: the template cannot be played so (TemplateChat.verify), or messages that add refuses.
    """

    def __init__(self, chat: TemplateChat, messages: Iterable[Message], *, thinking: bool):
        chat.verify(thinking=thinking)
        self._chat, self._thinking = chat, thinking
        self._seen_ids: tuple[int, ...] = ()  # up to the end of the last turn that the policy sampled
        self._seen = 0  # messages in them
        self.messages: tuple[Message, ...] = ()
        self.add(messages)

    def prompt_ids(self) -> tuple[int, ...]:
        """The whole conversation, ready for the policy to go on.

        Raises:
            ValueError: a call without a result, or a template that refuses the messages or rewrites history.
        """
        return self._prompt()[0]

    def _prompt(self) -> tuple[tuple[int, ...], str]:
        chat = self._chat
        if not self.messages or self.messages[-1].role not in ("user", "tool"):
            raise ValueError("nothing to answer: add a message of a user or a tool")
        text = chat.render(self._shown(), thinking=self._thinking, turn=True)
        if not self._seen_ids:
            return chat.encode(text), text
        if any(message.role == "user" for message in self.messages[self._seen :]):
            seen = chat.decode(self._seen_ids)
            if not text.startswith(seen):
                return chat.encode(text), text
            after = text[len(seen) :]
        else:
            _, after = _extended(chat, self._shown()[: self._seen], text, thinking=self._thinking)
        return (*self._seen_ids, *chat.encode(after)), text

    def add(self, messages: Iterable[Message]) -> None:
        """Append messages that this policy did not sample; on an error nothing is appended.

        Raises:
            MarkupError: a text contains a mark.
            ValueError: messages that cannot follow (chat.check_turns), or that TemplateChat.check refuses.
        """
        messages = tuple(messages)
        check_turns((*self.messages, *messages))
        for message in messages:
            self._chat.check(message, thinking=self._thinking)
        self.messages += messages

    def add_sampled(self, ids: Sequence[int] | np.ndarray) -> Message:
        """Append what the policy sampled after prompt_ids(), as sampled, and return what it says.

        Raises:
            ValueError: it is malformed; nothing is appended.
        """
        chat = self._chat
        prompt, text = self._prompt()
        opened = chat.is_opened(text, thinking=self._thinking)
        message = chat.parse(ids, thinking=self._thinking, opened=opened)
        self._seen_ids = (*prompt, *(int(i) for i in ids))
        self.messages += (message,)
        self._seen = len(self.messages)
        return message

    def _shown(self) -> tuple[Message, ...]:
        """The messages, without reasoning before the last user message."""
        users = [i for i, message in enumerate(self.messages) if message.role == "user"]
        last = users[-1] if users else 0
        return tuple(replace(message, reasoning="") if i < last else message for i, message in enumerate(self.messages))


def load_format(path: str | Path) -> Chat | TemplateChat:
    """The format of a checkpoint folder: DeepSeek-V3.2's where its tokenizer has the tokens, else its own template.

    Raises:
        ValueError: it has neither, or no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no tokenizer: save it beside the weights ({error})") from error
    return Chat(tokenizer) if set(SPECIAL_TOKENS) <= tokenizer.get_vocab().keys() else TemplateChat(tokenizer)
