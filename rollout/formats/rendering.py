"""A tokenizer with its chat template: messages to text, text to ids, ids to text."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.formats.chat import FormatError, MarkupError
from trimtab.rollout.formats.letters import CUT, alternatives, cut
from trimtab.rollout.formats.openai_messages import to_openai
from trimtab.rollout.formats.strict_json import map_texts


@dataclass(frozen=True, slots=True)
class Habits:
    """How a template wants its messages."""

    parts: bool = False
    """Content as a list of parts, as of models that see images too."""
    text_arguments: bool = False
    """Arguments of calls as JSON text instead of objects."""
    write_calls: Callable[[Sequence[ToolCall]], str] | None = None
    """Writes calls into the content, for a template that leaves them out."""


class Rendering:
    """What a template makes of messages.

    It gets messages in OpenAI's form with the reasoning as reasoning_content (gpt-oss: thinking), the tools of a system
    message, and enable_thinking.

    Raises:
        ValueError: the tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer needs a chat_template, without which it is no chat model's; set one")
        self._tokenizer = tokenizer
        self.habits = Habits()
        tokens = {str(token): int(i) for i, token in tokenizer.added_tokens_decoder.items()}
        self.added = {text: i for text, i in tokens.items() if text.strip()}
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        self.source = "\n".join(named.values()) or str(tokenizer.chat_template)
        self._for_tools = "tool_use" if "tool_use" in named else None
        self._known = frozenset(tokenizer.get_vocab().values())
        self._anchor = next((text for text in special if not tokenizer.added_tokens_decoder[tokens[text]].rstrip), "")
        self._special = tuple(filter(str.strip, special))
        self.reserve(())

    def reserve(self, marks: Iterable[str]) -> None:
        """Count marks as reserved, beside the tokenizer's special tokens: no policy may write them."""
        self.reserved = tuple(dict.fromkeys((*self._special, *marks)))
        self._marks = alternatives(self.reserved)
        self._all = alternatives((*self.reserved, *self.added))

    def data(self, text: str, *, said: bool = False) -> str:
        """text with every added token in it cut, so that it is data to template and tokenizer (letters.py).

        Args:
            said: whether an assistant says it, who may use tokens that are words (Gemma has <table>): only what is
                reserved is cut.
        """
        return cut(text, self._marks if said else self._all)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of text, in which marks become the tokens they stand for, save those that are cut.

        Raises:
            MarkupError: the tokenizer cannot write a mark in other tokens than its own.
        """
        first, *pieces = text.split(CUT)
        ids = tuple(self._tokenizer.encode(first, add_special_tokens=False))
        for piece in pieces:  # behind a token, since some tokenizers begin every text with a space
            ids += tuple(self._tokenizer.encode(self._anchor + piece, add_special_tokens=False)[bool(self._anchor) :])
        if pieces and self.decode(ids) != self.decode(self.encode(text.replace(CUT, ""))):
            mark = (first[-1] + pieces[0])[:40]
            raise MarkupError(f"the tokenizer writes what begins {mark!r} only as a token of its own; remove it")
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, marks included, its spaces as they are."""
        text = self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    def unknown(self, ids: Iterable[int]) -> list[int]:
        """Those of ids that the tokenizer lacks: rows of the vocabulary that only pad it."""
        return sorted({*ids} - self._known)

    def render(self, messages: Sequence[Message], *, thinking: bool, turn: bool, calls: bool = False) -> str:
        """The template's text of messages; with turn, the beginning of the policy's next turn behind it.

        Args:
            calls: take the template for tools, of a tokenizer that has one, although nothing in messages asks for it.

        Raises:
            FormatError: messages that the template refuses, tools that it leaves out.
            ValueError: messages that do not follow each other.
        """
        records = to_openai(messages)
        tools = [map_texts(tool, self.data) for record in records for tool in record.pop("tools", ())]
        records = self._records(records, messages)
        calls = calls or bool(tools) or any(message.tool_calls for message in messages)
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    records,
                    tools or None,
                    chat_template=self._for_tools if calls else None,
                    add_generation_prompt=turn,
                    tokenize=False,
                    enable_thinking=thinking,
                    thinking=thinking,
                )
            )
        except Exception as error:  # the template is the user's code and fails as it likes
            raise FormatError(f"the template refuses {[message.role for message in messages]}: {error}") from error
        names = [tool["function"]["name"] for tool in tools]
        if left_out := [name for name in names if name not in text]:
            raise FormatError(
                f"the template leaves out the tools {left_out}; describe them in the system message's text"
            )
        return text

    def _records(self, records: list[dict[str, Any]], messages: Sequence[Message]) -> list[dict[str, Any]]:
        names: list[str] = []
        count = 0
        for record, message in zip(records, messages, strict=True):
            record["content"] = self.data(record["content"], said=message.role == "assistant")
            if record["role"] == "tool":
                record["name"] = names.pop(0)
                record["tool_call_id"] = _call_id(int(record["tool_call_id"].removeprefix("call_")))
            if message.reasoning:
                reasoning = self.data(message.reasoning, said=True)
                record["reasoning_content"] = reasoning
                if "thinking" in self.source and "reasoning_content" not in self.source:
                    record["thinking"] = reasoning
            if message.tool_calls:
                names = [call.name for call in message.tool_calls]
                self._set_calls(record, message, count)
                count += len(names)
            if self.habits.parts:
                record["content"] = [{"type": "text", "text": record["content"]}]
        return records

    def _set_calls(self, record: dict[str, Any], message: Message, count: int) -> None:
        if self.habits.write_calls is not None:
            del record["tool_calls"]
            record["content"] += self.habits.write_calls(message.tool_calls)
            return
        for i, call in enumerate(record["tool_calls"]):
            call["id"] = _call_id(count + i)
            if not self.habits.text_arguments:
                call["function"]["arguments"] = map_texts(
                    json.loads(call["function"]["arguments"]), partial(self.data, said=True)
                )


def _call_id(number: int) -> str:
    """Nine letters and digits, which Mistral's templates ask for."""
    return f"call{number:05d}"
