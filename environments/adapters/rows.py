"""Rows of a file as tasks: prompts with the answers that their authors know, scored by the user's reward or by one of
ROW_REWARDS."""

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.environments.base import Known, Message
from trimtab.environments.files import Row, read_rows
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.functions import Reward, ToolEnv
from trimtab.rewards.answers import (
    alternatives,
    choice,
    exact,
    final_answer,
    mathematics,
    numeric,
    quantity,
    unreadable,
)
from trimtab.rewards.guards import hedges

RowReward = Callable[[Message, Mapping[str, Any]], Mapping[str, float] | Awaitable[Mapping[str, float]]]
"""Takes the policy's message and the row, returns the named parts of the reward; may be a coroutine function."""

_LISTED = 10
"""Rows that are named before the rest is counted."""


class RowsTask:
    """Prompts and answers of a .jsonl or .parquet file, scored by the user's reward. A row is held out by its prompt.

    Args:
        prompt, answer: the names of the fields; a prompt is a text, an answer anything but null.
        system: the system message; none when empty.
        witness: the field that holds an answer that earns full marks, where the field answer holds something else, such
            as tests; `trimtab grade-check` tries it.
        max_unfit: share of rows that cannot be graded, above which the file is refused; those below it are left out.

    Raises:
        ValueError: a row without prompt or answer, no rows, a file that read_rows refuses, too many unfit rows; names
            file, line and field.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        path: Path | str,
        reward: RowReward,
        *,
        prompt: str = "prompt",
        answer: str = "answer",
        system: str = "",
        witness: str = "",
        max_unfit: float = 0.1,
    ) -> None:
        self._path, self._reward = path, reward
        self._prompt, self._answer, self._system, self._witness = prompt, answer, system, witness or answer
        rows = list(read_rows(path))
        if not rows:
            raise ValueError(f"{path}: no rows")
        for row in rows:
            row.value(answer)
            row.text(prompt)
        self.left_out: Mapping[str, str] = self.unfit(rows)
        """Rows that cannot be graded, by file and line, with the reason."""
        self._leave_out(len(rows), max_unfit)
        self._splits: dict[bool, list[Row]] = {False: [], True: []}
        for row in rows:
            if row.where not in self.left_out:
                self._splits[is_held_out(row.text(prompt))].append(row)

    def unfit(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Rows that cannot be graded, by file and line, with the reason; here none."""
        return {}

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        return self._env_of(self._draw(rng, held_out=held_out))

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        """A prompt and its answer, without thinking.

        Raises:
            ValueError: the answer is no text.
        """
        row = self._draw(rng, held_out=False)
        opening = (Message("system", self._system),) if self._system else ()
        return *opening, Message("user", row.text(self._prompt)), Message("assistant", row.text(self._answer))

    def known(self, most: int) -> Iterator[Known]:
        """At most so many rows with their own answers, spread over the file; rows whose answer is no text are none."""
        rows = [row for split in self._splits.values() for row in split]
        step = max(len(rows) / most, 1.0)
        for row in (rows[int(i * step)] for i in range(min(most, len(rows)))):
            own = row.values.get(self._witness)
            if isinstance(own, str | int | float) and not isinstance(own, bool) and str(own).strip():
                yield Known(row.where, row.text(self._prompt), str(own), self._env_of(row))

    def _env_of(self, row: Row) -> Callable[[], ToolEnv]:
        return SingleTurn(row.text(self._prompt), lambda message: self._reward(message, row.values), self._system)

    def _leave_out(self, rows: int, most: float) -> None:
        if not self.left_out:
            return
        lines = [f"  {where}: {reason}" for where, reason in list(self.left_out.items())[:_LISTED]]
        rest = len(self.left_out) - len(lines)
        told = "\n".join(lines + [f"  and {rest} more"] * (rest > 0))
        count = f"{self._path}: {len(self.left_out)} of {rows} rows cannot be graded"
        if len(self.left_out) > most * rows:
            raise ValueError(f"{count}, more than max_unfit = {most:g}; mend or remove them:\n{told}")
        _tell(f"{count} and are left out:\n{told}")

    def _draw(self, rng: random.Random, *, held_out: bool) -> Row:
        rows = self._splits[held_out]
        if not rows:
            split = "held-out" if held_out else "training"
            raise ValueError(f"{self._path}: no {split} row; about one prompt in five is held out: add rows")
        return rng.choice(rows)


class MathsTask(RowsTask):
    """Mathematics of a file: the final answer must be equivalent to the row's (rewards/answers.py: mathematics), and
    must not hedge. All truths are read at the start; rows whose truth cannot be read are left out.

    Raises:
        ValueError: as RowsTask.
    """

    def __init__(self, path: Path | str, *, answer: str = "answer", **options: Any) -> None:
        super().__init__(path, row_reward("maths", answer), answer=answer, **options)

    def unfit(self, rows: Sequence[Row]) -> Mapping[str, str]:
        truths = [str(row.value(self._answer)) for row in rows]
        with ThreadPoolExecutor(1) as thread:  # there may be a loop in this one
            wrong = thread.submit(asyncio.run, unreadable(truths)).result()
        return {row.where: wrong[truth] for row, truth in zip(rows, truths, strict=True) if truth in wrong}


def row_reward(kind: str, answer: str = "answer") -> RowReward:
    """The reward of a kind, one of ROW_REWARDS: part "outcome" for the final answer against a field of the row, none
    for one that hedges, and "format" for having one.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in ROW_REWARDS:
        raise ValueError(f"no reward for rows is named {kind!r}; there are {', '.join(ROW_REWARDS)}")
    right = ROW_REWARDS[kind]

    async def reward(message: Message, row: Mapping[str, Any]) -> Mapping[str, float]:
        said, truth = final_answer(message.content), str(row[answer])
        hedged = len(alternatives(truth)) == 1 and hedges(message.content)
        earned = said is not None and not hedged and await right(message.content, truth)
        return {"outcome": float(earned), "format": float(said is not None)}

    return reward


async def _maths(text: str, truth: str) -> bool:
    return await mathematics(text, truth) == 1.0


async def _exact(text: str, truth: str) -> bool:
    return exact(final_answer(text), truth)


async def _choice(text: str, truth: str) -> bool:
    return choice(final_answer(text), truth)


async def _number(text: str, truth: str) -> bool:
    wanted = quantity(truth)
    if wanted is None:
        raise ValueError(f"the truth {truth!r} is no number")
    return numeric(final_answer(text), wanted[0], relative=1e-4, units={wanted[1]: 1.0})


ROW_REWARDS: Mapping[str, Callable[[str, str], Awaitable[bool]]] = {
    "maths": _maths,
    "exact": _exact,
    "choice": _choice,
    "number": _number,
}
"""Whether the final answer of a text is the truth, by name."""


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """Makes episodes of one message about one prompt; equal prompts are equal."""

    prompt: str
    reward: Reward = field(compare=False)
    system: str = ""

    def __call__(self) -> ToolEnv:
        return ToolEnv(self.prompt, (), self.reward, system=self.system, max_messages=1)


@cache
def _tell(text: str) -> None:
    """Say it once: tasks are loaded more than once."""
    print(f"trimtab: {text}", file=sys.stderr)
