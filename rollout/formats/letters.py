"""The text of the world is data: whatever it spells, no token of a format comes of it.

Where text holds what a tokenizer reads as a token of its own (a question about <|im_end|>), it is cut behind the first
letter by CUT, which no template knows and no token holds. Both sides are tokenised apart, so that the model sees the
same letters and no mark.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from trimtab.environments.base import Message

CUT = "\ufdd0"  # not a character, by definition of Unicode


def alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of the longest of texts at each place, single letters left out; of nothing where there are none."""
    longest = sorted({text for text in texts if len(text) > 1}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) if longest else r"(?!)")


def cut(text: str, marks: re.Pattern[str]) -> str:
    """text with CUT behind the first letter of every mark in it."""
    text = readable(text).replace(CUT, "\ufffd")
    while marks.search(text):
        text = marks.sub(lambda match: match[0][0] + CUT + match[0][1:], text)
    return text


def readable(text: str) -> str:
    """text, with a replacement character for each half of a surrogate pair, which no tokenizer takes and no file."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cleaned(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Messages of the world as every tokenizer and file takes them: a lone half of a surrogate pair is replaced."""
    return tuple(replace(message, content=readable(message.content)) for message in messages)
