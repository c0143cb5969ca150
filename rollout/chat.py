# ruff: noqa: RUF001 - the full-width bars are the format
"""The prompt format of DeepSeek-V3.2, by pieces of token ids that are tokenised once and carried.

What the policy sampled is never tokenised again: the sequence trained on is the sequence the engine saw.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trimtab.environments.base import Message, ToolCall

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
DSML = "｜DSML｜"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, DSML)
"""Each must be one token of the tokenizer."""

CALLS_OPEN = f"\n\n<{DSML}function_calls>\n"
CALLS_CLOSE = f"\n</{DSML}function_calls>"
INVOKE_OPEN = f'<{DSML}invoke name="'
INVOKE_CLOSE = f"\n</{DSML}invoke>"
PARAMETER_OPEN = f'<{DSML}parameter name="'
PARAMETER_CLOSE = f"</{DSML}parameter>"
RAW = '" string="true">'
JSON = '" string="false">'
RESULTS_OPEN = "\n\n<function_results>"
RESULT_OPEN = "\n<result>"
RESULT_CLOSE = "</result>"
RESULTS_CLOSE = "\n</function_results>\n\n"
MARKUP = (
    CALLS_OPEN + INVOKE_OPEN,
    '">\n' + PARAMETER_OPEN,
    RAW,
    JSON,
    PARAMETER_CLOSE + "\n" + PARAMETER_OPEN,
    PARAMETER_CLOSE + INVOKE_CLOSE + "\n" + INVOKE_OPEN,
    PARAMETER_CLOSE + INVOKE_CLOSE + CALLS_CLOSE,
    RESULTS_OPEN + RESULT_OPEN,
    RESULT_CLOSE + RESULT_OPEN,
    RESULT_CLOSE + RESULTS_CLOSE,
)
"""Runs of fixed text between variable parts. A tokenizer may hold each as one token; none has to."""

_RESERVED = (*SPECIAL_TOKENS, RAW, JSON, "<result>", "</result>", "<function_results>", "</function_results>", "\ufffd")
"""In what a policy says, none of these can be content. The last stands for bytes that are not UTF-8."""

_INVOKE = re.compile(
    re.escape(INVOKE_OPEN) + r'(?P<name>[^"\n]+)">\n(?P<parameters>.*?)' + re.escape(INVOKE_CLOSE), re.DOTALL
)
_PARAMETER = re.compile(
    re.escape(PARAMETER_OPEN) + r'(?P<name>[^"\n]+)" string="(?P<raw>true|false)">(?P<value>.*?)' + PARAMETER_CLOSE,
    re.DOTALL,
)


class MarkupError(ValueError):
    """Text of a user, a tool or a system message contains markup of the format, so it cannot be told apart."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of ids. stale_ids takes its place once a newer user message has arrived."""

    ids: tuple[int, ...]
    stale_ids: tuple[int, ...]
    user: int  # user messages so far


class Chat:
    """The format over one tokenizer.

    Raises:
        ValueError: the tokenizer lacks one of SPECIAL_TOKENS as a single token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
            raise ValueError(f"the tokenizer lacks {missing} as single tokens; add them and resize the embeddings")
        self._tokenizer = tokenizer
        self._special = {token: vocabulary[token] for token in SPECIAL_TOKENS}
        self._added = frozenset(tokenizer.get_added_vocab().values())
        self.bos_id, self.eos_id = self._special[BOS], self._special[EOS]
        self.think_open_id, self.think_close_id = self._special[THINK_OPEN], self._special[THINK_CLOSE]

    @classmethod
    def load(cls, path: str | Path) -> "Chat":
        """The format over the tokenizer of a checkpoint folder."""
        return cls(AutoTokenizer.from_pretrained(path))

    def conversation(self, messages: Iterable[Message], *, thinking: bool) -> "Conversation":
        """A conversation in this format that begins with messages."""
        return Conversation(self, messages, thinking=thinking)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of text, in which markup becomes the tokens it stands for."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Ids of text that must hold no markup.

        Raises:
            MarkupError: it does.
        """
        ids = self.encode(text)
        if not self._added.isdisjoint(ids):
            found = self._tokenizer.decode([i for i in ids if i in self._added][:1])
            raise MarkupError(f"text contains the reserved {found!r}; remove it: {text[:80]!r}")
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, markup included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_assistant(self, message: Message, *, thinking: bool) -> tuple[int, ...]:
        """The ids a policy would have sampled to say message, the end of sentence included.

        Raises:
            ValueError: reasoning without thinking.
        """
        if message.reasoning and not thinking:
            raise ValueError(f"a conversation without thinking has no reasoning, got {message.reasoning[:80]!r}")
        self.encode_plain(message.content)
        for call in message.tool_calls:
            for text in (call.name, *call.arguments, *map(_value, call.arguments.values())):
                self.encode_plain(text)
        answer = (*self.encode(message.content + format_calls(message.tool_calls)), self.eos_id)
        return (*self.encode_plain(message.reasoning), self.think_close_id, *answer) if thinking else answer

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
        """Read what the policy sampled, strictly.

        Raises:
            ValueError: no </think> or one too many, no end of sentence, bytes that are not UTF-8, broken calls.
        """
        head, rest = self.split([int(i) for i in ids], thinking=thinking)
        if not rest or rest[-1] != self.eos_id:
            raise ValueError(f"no end of sentence after {self.decode(rest)[-80:]!r}")
        reasoning, answer = self.decode(head[:-1]), self.decode(rest[:-1])
        content, _, calls = answer.partition(CALLS_OPEN)
        for text in (reasoning, content):
            _refuse_reserved(text)
        tool_calls = parse_calls(calls) if CALLS_OPEN in answer else ()
        return Message("assistant", content=content, reasoning=reasoning, tool_calls=tool_calls)


def format_calls(calls: Sequence[ToolCall]) -> str:
    """The DSML block of tool calls; empty without calls."""
    if not calls:
        return ""
    return CALLS_OPEN + "\n".join(map(_format_call, calls)) + CALLS_CLOSE


def _format_call(call: ToolCall) -> str:
    parameters = "\n".join(
        PARAMETER_OPEN + key + (RAW if isinstance(value, str) else JSON) + _value(value) + PARAMETER_CLOSE
        for key, value in call.arguments.items()
    )
    return f'{INVOKE_OPEN}{call.name}">\n{parameters}{INVOKE_CLOSE}'


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parse_calls(text: str) -> tuple[ToolCall, ...]:
    """Read a DSML block, from behind its opening to its end.

    Raises:
        ValueError: anything but well-formed calls and their closing.
    """
    body, closing, after = text.partition(CALLS_CLOSE)
    if not closing or after:
        raise ValueError(f"tool calls are not closed, or text follows them: {text[-80:]!r}")
    calls = [_parse_call(match) for match in _INVOKE.finditer(body)]
    if not calls or "\n".join(match[0] for match in _INVOKE.finditer(body)) != body:
        raise ValueError(f"broken tool calls: {body[:80]!r}")
    return tuple(calls)


def _refuse_reserved(text: str) -> None:
    if any(reserved in text for reserved in _RESERVED):
        raise ValueError(f"misplaced markup or broken characters in {text[:80]!r}")


def _parse_call(match: re.Match[str]) -> ToolCall:
    arguments: dict[str, Any] = {}
    _refuse_reserved(match["name"])
    text = match["parameters"]
    found = list(_PARAMETER.finditer(text))
    if "\n".join(parameter[0] for parameter in found) != text:
        raise ValueError(f"broken parameters of {match['name']!r}: {text[:80]!r}")
    for parameter in found:
        if parameter["name"] in arguments:
            raise ValueError(f"{match['name']!r} has the parameter {parameter['name']!r} twice")
        _refuse_reserved(parameter["name"] + parameter["value"])
        raw = parameter["raw"] == "true"
        arguments[parameter["name"]] = parameter["value"] if raw else _load_json(parameter["value"])
    return ToolCall(match["name"], arguments)


def _load_json(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:  # the policy wrote it: a malformed call, not the end of the run
        raise ValueError(f"JSON nested too deep: {text[:80]!r}") from error


class Conversation:
    """One conversation as the engine sees it: pieces of ids, of which a newer user message makes some stale.

    The last user message decides: reasoning before it is dropped, with everything up to </think>, and an
    opening <think> before it reads </think>. Tool results alone keep all reasoning [DeepSeek-V3.2, 3.2].
    """

    def __init__(self, chat: Chat, messages: Iterable[Message], *, thinking: bool):
        self._chat, self._thinking = chat, thinking
        self._pieces = [_Piece((chat.bos_id,), (chat.bos_id,), 0)]
        self._users = 0
        self._open_calls = 0
        self.messages: tuple[Message, ...] = ()
        self.add(messages)

    def prompt_ids(self) -> tuple[int, ...]:
        """The whole conversation, ready for the policy to go on."""
        return tuple(i for piece in self._pieces for i in (piece.ids if piece.user == self._users else piece.stale_ids))

    def add(self, messages: Iterable[Message]) -> None:
        """Append messages that this policy did not sample.

        Raises:
            MarkupError: a text contains markup.
            ValueError: tool results that do not match the calls before them.
        """
        for role, group in groupby(messages, key=lambda message: message.role):
            batch = tuple(group)
            if role == "tool":
                self._add_results(batch)
                continue
            if self._open_calls:
                raise ValueError(f"{self._open_calls} tool calls without results before a message of {role}")
            for message in batch:
                self._add_one(message)

    def add_sampled(self, ids: Sequence[int] | np.ndarray) -> Message:
        """Append what the policy sampled, as sampled, and return what it says.

        Raises:
            ValueError: it is malformed; nothing is appended.
        """
        message = self._chat.parse(ids, thinking=self._thinking)
        self._add_assistant(message, tuple(int(i) for i in ids))
        return message

    def _add_one(self, message: Message) -> None:
        chat = self._chat
        if message.role == "assistant":
            self._add_assistant(message, chat.encode_assistant(message, thinking=self._thinking))
            return
        ids = chat.encode_plain(message.content)
        if message.role == "user":
            self._users += 1
            ids = (*chat.encode(USER), *ids, *chat.encode(ASSISTANT))
        self._append(ids)
        if message.role == "user":
            self._append_opener()
        self.messages += (message,)

    def _add_assistant(self, message: Message, ids: tuple[int, ...]) -> None:
        reasoning, answer = self._chat.split(ids, thinking=self._thinking)
        self._pieces.append(_Piece(reasoning, (), self._users))
        self._append(answer)
        self._open_calls = len(message.tool_calls)
        self.messages += (message,)

    def _add_results(self, results: tuple[Message, ...]) -> None:
        if len(results) != self._open_calls:
            raise ValueError(f"{len(results)} tool results for {self._open_calls} tool calls")
        chat = self._chat
        self._append(chat.encode(RESULTS_OPEN + RESULT_OPEN))
        for i, result in enumerate(results):
            if i:
                self._append(chat.encode(RESULT_CLOSE + RESULT_OPEN))
            self._append(chat.encode_plain(result.content))
        self._append(chat.encode(RESULT_CLOSE + RESULTS_CLOSE))
        self._append_opener()
        self._open_calls = 0
        self.messages += results

    def _append(self, ids: tuple[int, ...]) -> None:
        self._pieces.append(_Piece(ids, ids, self._users))

    def _append_opener(self) -> None:
        close = (self._chat.think_close_id,)
        self._pieces.append(_Piece((self._chat.think_open_id,) if self._thinking else close, close, self._users))


def render(chat: Chat, messages: Sequence[Message], *, thinking: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """A demonstration as the sequences an engine would have seen had the policy sampled it.

    A new sequence starts where the prompt no longer extends the one before: at dropped reasoning.

    Returns:
        For each sequence its ids, int32 [N], and whether the policy sampled them, bool [N].
    """
    sequences: list[tuple[list[int], list[bool]]] = []
    conversation = Conversation(chat, (), thinking=thinking)
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
            conversation.add([message])
    return [(np.array(ids, np.int32), np.array(sampled, bool)) for ids, sampled in sequences]
