"""Texts and conversations as token sequences, and sequences as batches that a seed and a step decide.

Shape suffix: N = tokens of a sequence.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer

from trimtab.environments.files import Row, read_rows
from trimtab.rollout.formats.chat import Format, render
from trimtab.rollout.formats.openai_messages import from_openai
from trimtab.rollout.formats.template import load_format

MAX_REASONS = 3


class Tokens(NamedTuple):
    """One sequence: its ids, int32 [N], and which of them the loss asks for, bool [N]; never the first."""

    ids_N: np.ndarray
    asked_N: np.ndarray


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sequences to train on and to measure on, and what was left out of the files, with reasons."""

    train: tuple[Tokens, ...]
    held_out: tuple[Tokens, ...]
    rows: int
    left_out: tuple[str, ...] = ()

    def statement(self) -> str:
        """What there is, in one line."""
        tokens = sum(len(one.ids_N) for one in self.train)
        text = f"{self.rows} rows: {len(self.train)} sequences of {tokens:,} tokens, {len(self.held_out)} held out"
        if self.left_out:
            text += f"; {len(self.left_out)} rows left out, such as {'; '.join(self.left_out[:MAX_REASONS])}"
        return text


def read_texts(files: Sequence[str], *, model: Path | str, field: str, max_len: int, held_out: int) -> Corpus:
    """Documents of JSONL or Parquet files, tokenised, ended by the tokenizer's end, cut into pieces of max_len.

    Pieces are sequences of their own: no token sees another document, nor an earlier piece. The pieces of the last rows
    are held out, so many rows as asked.

    Raises:
        ValueError: a file that cannot be read, nothing left to train on.
        FileNotFoundError: no such file.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pieces(row: Row) -> Iterator[Tokens]:
        ids = [*begin, *tokenizer.encode(row.text(field), add_special_tokens=False), *end]
        for start in range(0, len(ids), max_len):
            piece = np.array(ids[start : start + max_len], np.int32)
            if len(piece) > 1:
                yield Tokens(piece, np.arange(len(piece)) > 0)

    return _corpus(files, lambda row: list(pieces(row)), held_out)


def read_conversations(
    files: Sequence[str], *, model: Path | str, field: str, max_len: int, held_out: int, thinking: bool
) -> Corpus:
    """Conversations in OpenAI's form, in the checkpoint's own format; the loss asks for what assistants say.

    A row's own field `thinking` goes before the argument. One that the format cannot say, or that is longer than
    max_len, is left out whole.

    Raises:
        ValueError: a file that cannot be read, a checkpoint without a format, nothing left to train on.
        FileNotFoundError: no such file.
    """
    chat: Format = load_format(model)

    def sequences(row: Row) -> list[Tokens]:
        messages = row.value(field)
        if not isinstance(messages, list):
            raise ValueError(f"field {field!r} must be a list of messages")
        thinks = row.values.get("thinking")
        if not isinstance(thinks, bool | None):
            raise ValueError(f"field 'thinking' must be true or false, got {thinks!r}")
        said = from_openai(map(_plain, messages))
        found = [Tokens(*one) for one in render(chat, said, thinking=thinking if thinks is None else thinks)]
        if not found:
            raise ValueError("no assistant says anything")
        if (longest := max(len(one.ids_N) for one in found)) > max_len:
            raise ValueError(f"{longest} tokens, more than max_len = {max_len}")
        return found

    return _corpus(files, sequences, held_out)


def _plain(message: Any) -> dict[str, Any]:
    """Parquet gives every message all keys, and None where one has none."""
    if not isinstance(message, dict):
        raise ValueError(f"a message is an object, got {message!r}")
    return {key: value for key, value in message.items() if value is not None}


def _corpus(files: Sequence[str], read: Callable[[Row], list[Tokens]], held_out: int) -> Corpus:
    by_row: list[list[Tokens]] = []
    left_out: list[str] = []
    for file in files:
        for row in read_rows(file):
            try:
                by_row.append(read(row))
            except ValueError as error:  # of one row: it costs that row
                where = "" if str(error).startswith(row.where) else f"{row.where}: "
                left_out.append(f"{where}{error}")
    rows = len(by_row) + len(left_out)
    if len(by_row) <= held_out:
        reason = f"; left out: {'; '.join(left_out[:MAX_REASONS])}" if left_out else ""
        raise ValueError(
            f"{', '.join(files)}: {len(by_row)} of {rows} rows can be used, and {held_out} of them are held out: "
            f"nothing is left to train on{reason}"
        )
    train, rest = by_row[: len(by_row) - held_out], by_row[len(by_row) - held_out :]
    return Corpus(
        tuple(one for row in train for one in row), tuple(one for row in rest for one in row), rows, tuple(left_out)
    )


def batches(sequences: Sequence[Tokens], *, tokens: int, seed: int, start: int = 0) -> Iterator[list[Tokens]]:
    """Endless batches of at least so many tokens, each the shortest that has them; from number `start` on.

    Every sequence comes once before any comes again, in an order of its own each time. What a batch holds depends on
    the seed and its number alone.
    """
    epoch = _endless(len(sequences), seed)
    for number in count():
        batch, size = [], 0
        while size < tokens:
            batch.append(sequences[next(epoch)])
            size += len(batch[-1].ids_N)
        if number >= start:
            yield batch


def packs(batch: Sequence[Tokens], max_tokens: int) -> list[list[Tokens]]:
    """A batch in packs of at most max_tokens, similar lengths together; a longer sequence has one of its own."""
    found: list[list[Tokens]] = []
    room = 0
    for one in sorted(batch, key=lambda one: len(one.ids_N)):
        if len(one.ids_N) > room:
            found.append([])
            room = max_tokens
        found[-1].append(one)
        room -= len(one.ids_N)
    return found


def _endless(count: int, seed: int) -> Iterator[int]:
    rng = random.Random(f"batches{seed}")
    while True:
        order = list(range(count))
        rng.shuffle(order)
        yield from order
