"""The prompt format of DeepSeek-V3.2, by pieces of token ids that are tokenised once and carried.

What the policy sampled is never tokenised again: the sequence trained on is the sequence the engine saw. The text is
that of the encoder which DeepSeek publishes with the checkpoint, to the byte. What can be said differs:

1. Markup in the text of the world is data (letters.py): the same letters, in other tokens. In what an assistant says it
   is refused. The encoder passes both through.
2. Messages that cannot follow each other are refused (check_turns), such as a system message between a question and its
   answer, which the encoder writes into the answer.
3. In thinking mode an answer may come without reasoning and calls, which the encoder refuses: policies say such.
4. A developer message stays when another question follows it; in thinking mode the encoder then fails.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trimtab.environments.base import Message
from trimtab.rollout.formats.dsml import (
    ASSISTANT,
    BOS,
    CALLS_OPEN,
    DEVELOPER,
    EOS,
    MARKUP,
    RESERVED,
    RESULT_CLOSE,
    RESULT_OPEN,
    RESULTS_CLOSE,
    RESULTS_OPEN,
    SPECIAL_TOKENS,
    THINK_CLOSE,
    THINK_OPEN,
    USER,
    format_calls,
    format_value,
    parse_calls,
    response_format_block,
    tools_block,
)
from trimtab.rollout.formats.letters import CUT, alternatives, cut, readable
from trimtab.rollout.formats.strict_json import map_texts


class FormatError(ValueError):
    """The format, or a checkpoint's template, cannot say this conversation."""


class MarkupError(FormatError):
    """Text contains markup of the format, so it cannot be told apart, or it is no text."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of ids. stale_ids takes its place once a newer message of a user or developer has arrived."""

    ids: tuple[int, ...]
    stale_ids: tuple[int, ...]
    user: int  # messages of users and developers so far


class Chat:
    """The format over one tokenizer.

    Args:
        stops: ids that end a turn besides the format's, as stop_ids of the checkpoint has them.

    Raises:
        ValueError: the tokenizer does not write each of SPECIAL_TOKENS as one token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Iterable[int] = ()):
        vocabulary = tokenizer.get_vocab()
        self._tokenizer = tokenizer
        self._known = frozenset(vocabulary.values())
        if missing := [token for token in SPECIAL_TOKENS if self.encode(token) != (vocabulary.get(token),)]:
            raise ValueError(f"the tokenizer lacks {missing} as single tokens; add them and resize the embeddings")
        added = {text: i for text, i in tokenizer.get_added_vocab().items() if text.strip()}
        self._added = frozenset(added.values())
        self._reserved = (*RESERVED, *sorted(added.keys() - {*RESERVED, *MARKUP}))
        self._marks = alternatives((*RESERVED, *MARKUP, *SPECIAL_TOKENS, *added))
        self.bos_id, self.eos_id = vocabulary[BOS], vocabulary[EOS]
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *stops)))
        """What an engine must stop at."""
        self.think_open_id, self.think_close_id = vocabulary[THINK_OPEN], vocabulary[THINK_CLOSE]

    @classmethod
    def load(cls, path: str | Path) -> "Chat":
        """The format over the tokenizer of a checkpoint folder."""
        return cls(AutoTokenizer.from_pretrained(path))

    def verify(self, *, thinking: bool, tools: bool) -> None:
        """Nothing to try: the format has both, over every tokenizer that has its tokens."""

    def conversation(self, messages: Iterable[Message], *, thinking: bool) -> "Conversation":
        """A conversation in this format that begins with messages."""
        return Conversation(self, messages, thinking=thinking)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of text, in which markup becomes the tokens it stands for, save where it is cut."""
        pieces = text.split(CUT)
        return tuple(i for piece in pieces for i in self._tokenizer.encode(piece, add_special_tokens=False))

    def data(self, text: str) -> str:
        """text of the world, in which encode finds no mark.

        Raises:
            MarkupError: the tokenizer reads a token of its own in it however it is cut.
        """
        cut_text = cut(text, self._marks)
        if not self._added.isdisjoint(self.encode(cut_text)):  # a token that is spelt in several ways
            cut_text = CUT.join(readable(text).replace(CUT, "\ufffd"))
        if found := self.decode([i for i in self.encode(cut_text) if i in self._added][:1]):
            raise MarkupError(f"the tokenizer reads the reserved {found!r} in the text; remove it: {text[:80]!r}")
        return cut_text

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, markup included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def check_plain(self, *texts: str) -> None:
        """Refuse texts that hold markup, or an added token of the tokenizer, however it is spelt.

        Raises:
            MarkupError: one does, or one is not Unicode.
        """
        for text in texts:
            check_unicode(text)
            if found := next((reserved for reserved in self._reserved if reserved in text), None):
                raise MarkupError(f"text contains the reserved {found!r}; remove it: {text[:80]!r}")
            if found := self.decode([i for i in self.encode(text) if i in self._added][:1]):
                raise MarkupError(f"the tokenizer reads the reserved {found!r} in the text; remove it: {text[:80]!r}")

    def encode_assistant(self, message: Message, *, thinking: bool) -> tuple[int, ...]:
        """The ids a policy would have sampled to say message, the end of sentence included.

        Raises:
            MarkupError: a text contains markup.
            ValueError: reasoning without thinking, or what parse would not read back as the same.
        """
        if message.reasoning and not thinking:
            raise ValueError(f"a conversation without thinking has no reasoning, got {message.reasoning[:80]!r}")
        self.check_plain(*_texts(message))
        answer = (*self.encode(message.content + format_calls(message.tool_calls)), self.eos_id)
        ids = (*self.encode(message.reasoning), self.think_close_id, *answer) if thinking else answer
        if (read := self.parse(ids, thinking=thinking)) != message:
            raise ValueError(f"the format cannot say {message}: it reads back as {read}")
        return ids

    def split(self, ids: Sequence[int], *, thinking: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sampled ids up to and including </think>, and the rest; without thinking the first part is empty.

        Raises:
            ValueError: thinking without a </think>.
        """
        ids = tuple(int(i) for i in ids)
        if not thinking:
            return (), ids
        if self.think_close_id not in ids:
            raise ValueError(f"no {THINK_CLOSE} in {self.decode(ids)[-80:]!r}")
        end = ids.index(self.think_close_id) + 1
        return ids[:end], ids[end:]

    def parse(self, ids: Sequence[int] | np.ndarray, *, thinking: bool) -> Message:
        """Read what the policy sampled, strictly: what is read, encode_assistant can write.

        Raises:
            ValueError: no </think> or one too many, no end of sentence, ids that the tokenizer lacks, bytes that
                are not UTF-8, an added token of the tokenizer, broken calls.
        """
        head, rest = self.split([int(i) for i in ids], thinking=thinking)
        if not self._known.issuperset(head + rest):
            raise ValueError(f"ids that the tokenizer lacks: {sorted({*head, *rest} - self._known)}")
        if not rest or rest[-1] != self.eos_id:
            raise ValueError(f"no end of sentence after {self.decode(rest)[-80:]!r}")
        reasoning, answer = self.decode(head[:-1]), self.decode(rest[:-1])
        content, opening, calls = answer.partition(CALLS_OPEN)
        message = Message("assistant", content, reasoning, parse_calls(calls) if opening else ())
        for text in _texts(message):
            if any(reserved in text for reserved in (*self._reserved, "\ufffd")):  # the last: bytes that are not UTF-8
                raise ValueError(f"misplaced markup or broken characters in {text[:80]!r}")
        return message


def check_unicode(text: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes.

    Raises:
        MarkupError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # users and tools say what they like
        raise MarkupError(f"text that is not Unicode: {text[:80]!r}") from error


def _texts(message: Message) -> list[str]:
    """Every text of a message, arguments as they are written."""
    arguments = [text for call in message.tool_calls for text in (call.name, *call.arguments)]
    values = [format_value(value) for call in message.tool_calls for value in call.arguments.values()]
    return [message.content, message.reasoning, *arguments, *values]


def check_turns(messages: Iterable[Message]) -> None:
    """Refuse messages that cannot follow each other, or that hold what their role cannot say.

    Raises:
        ValueError: results that do not match the calls before them, an answer to nothing, a system message before the
            answer to a question, an unknown role, reasoning or calls of others, tools or formats of others.
    """
    calls, asked = 0, False
    for role, group in groupby(messages, key=lambda message: message.role):
        batch = tuple(group)
        for message in batch:
            _check_role(message)
        if role == "tool":
            if len(batch) != calls:
                raise ValueError(f"{len(batch)} tool results for {calls} tool calls")
        elif calls:
            raise ValueError(f"{calls} tool calls without results before a message of {role}")
        elif role == "assistant" and (not asked or len(batch) > 1):
            raise ValueError("an assistant answers a user or the results of tools, with one message")
        elif role == "system" and asked:
            raise ValueError("a system message stands between a question and its answer; put it before")
        calls = len(batch[0].tool_calls)
        asked = role not in ("assistant", "system")


def _check_role(message: Message) -> None:
    role = message.role
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise ValueError(f"no role {role!r}; there are system, developer, user, assistant and tool")
    if role != "assistant" and (message.reasoning or message.tool_calls):
        raise ValueError(f"only an assistant reasons and calls tools, got a message of {role} that does")
    if role not in ("system", "developer") and (message.tools or message.response_format):
        raise ValueError(f"only a system or developer message offers tools or sets a format, got one of {role}")
    if role == "developer" and not message.content:
        raise ValueError("a developer message needs content")


class Conversation:
    """One conversation as the engine sees it: pieces of ids, of which a newer user message makes some stale.

    The last message of a user or developer decides: reasoning before it is dropped, with everything up to </think>, and
    an opening <think> before it reads </think>. Tool results alone keep all reasoning [DeepSeek-V3.2, 3.2].
    """

    def __init__(self, chat: Chat, messages: Iterable[Message], *, thinking: bool):
        self._chat, self._thinking = chat, thinking
        self._pieces = [_Piece((chat.bos_id,), (chat.bos_id,), 0)]
        self._users = 0
        self.messages: tuple[Message, ...] = ()
        self.add(messages)

    def prompt_ids(self) -> tuple[int, ...]:
        """The whole conversation, ready for the policy to go on."""
        return tuple(i for piece in self._pieces for i in (piece.ids if piece.user == self._users else piece.stale_ids))

    def add(self, messages: Iterable[Message]) -> None:
        """Append messages that this policy did not sample; on an error nothing is appended.

        Raises:
            MarkupError: an assistant's text contains markup.
            ValueError: messages that cannot follow (check_turns), results that come one by one, what the format cannot
                say.
        """
        messages = tuple(messages)
        check_turns((*self.messages, *messages))
        draft = copy(self)
        draft._pieces = list(self._pieces)
        for role, group in groupby(messages, key=lambda message: message.role):
            draft._add(role, tuple(group))
        self.__dict__.update(draft.__dict__)

    def add_sampled(self, ids: Sequence[int] | np.ndarray) -> Message:
        """Append what the policy sampled, as sampled, and return what it says.

        Raises:
            ValueError: it is malformed, or it is not the policy's turn; nothing is appended.
        """
        message = self._chat.parse(ids, thinking=self._thinking)
        check_turns((*self.messages, message))
        self._append_said(message, tuple(int(i) for i in ids))
        return message

    def _add(self, role: str, batch: tuple[Message, ...]) -> None:
        """Append messages of one role."""
        chat = self._chat
        for message in batch:
            if role == "assistant":
                self._append_said(message, chat.encode_assistant(message, thinking=self._thinking))
                continue
            self.messages += (message,)
            content = chat.data(message.content)
            if role == "system":
                self._append(chat.encode(content + self._blocks(message)))
            elif role != "tool":
                self._users += 1
                text = content if role == "user" else self._blocks(message) + DEVELOPER + content
                self._append(chat.encode(USER + text + ASSISTANT))
                self._append_opener()
        if role == "tool":
            results = (RESULT_CLOSE + RESULT_OPEN).join(chat.data(message.content) for message in batch)
            self._append(chat.encode(RESULTS_OPEN + RESULT_OPEN + results + RESULT_CLOSE + RESULTS_CLOSE))
            self._append_opener()

    def _blocks(self, message: Message) -> str:
        """What a system or developer message says of tools and of the format of answers, each behind a blank line."""
        schemas = [map_texts(dict(tool), self._chat.data) for tool in message.tools]
        tools = "\n\n" + tools_block(schemas) if schemas else ""
        if message.response_format is None:
            return tools
        return f"{tools}\n\n{response_format_block(map_texts(dict(message.response_format), self._chat.data))}"

    def _append_said(self, message: Message, ids: tuple[int, ...]) -> None:
        reasoning, answer = self._chat.split(ids, thinking=self._thinking)
        self._append(reasoning, ())
        self._append(answer)
        self.messages += (message,)

    def _append_opener(self) -> None:
        close = (self._chat.think_close_id,)
        self._append((self._chat.think_open_id,) if self._thinking else close, close)

    def _append(self, ids: tuple[int, ...], stale_ids: tuple[int, ...] | None = None) -> None:
        self._pieces.append(_Piece(ids, ids if stale_ids is None else stale_ids, self._users))


class Format(Protocol):
    """What Chat and TemplateChat have in common."""

    def conversation(self, messages: Iterable[Message], *, thinking: bool) -> Any:
        """A conversation that begins with messages."""

    def encode_assistant(self, message: Message, *, thinking: bool) -> tuple[int, ...]:
        """The ids a policy would have sampled to say message, the end of its turn included."""


def render(chat: Format, messages: Sequence[Message], *, thinking: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """A demonstration as the sequences an engine would have seen had the policy sampled it.

    A new sequence starts where the prompt no longer extends the one before: at dropped reasoning. Messages behind the
    last turn of an assistant are left out.

    Returns:
        For each sequence its ids, int32 [N], and whether the policy sampled them, bool [N].

    Raises:
        ValueError: the format cannot say it.
    """
    sequences: list[tuple[list[int], list[bool]]] = []
    conversation = chat.conversation((), thinking=thinking)
    for assistant, group in groupby(messages, key=lambda message: message.role == "assistant"):
        if not assistant:
            conversation.add(group)
            continue
        for message in group:
            prompt = list(conversation.prompt_ids())
            if not sequences or prompt[: len(sequences[-1][0])] != sequences[-1][0]:
                sequences.append(([], []))
            ids, sampled = sequences[-1]
            said = chat.encode_assistant(message, thinking=thinking)
            sampled += [False] * (len(prompt) - len(ids)) + [True] * len(said)
            ids += [*prompt[len(ids) :], *said]
            conversation.add_sampled(said)
    return [(np.array(ids, np.int32), np.array(sampled, bool)) for ids, sampled in sequences]
