"""Tasks that others wrote: datasets of reasoning-gym, files of prompts and answers, environments of verifiers."""

import importlib.util
import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from trimtab.environments.base import Message, Task
from trimtab.environments.files import Row, read_rows
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.functions import Reward, ToolEnv

_DRAWS = 10_000
"""Draws of an item before a split counts as empty."""

RowReward = Callable[[Message, Mapping[str, Any]], Mapping[str, float] | Awaitable[Mapping[str, float]]]
"""Takes the policy's message and the row, returns the named parts of the reward; may be a coroutine function."""


def gym_names() -> tuple[str, ...]:
    """The names of reasoning-gym's datasets that can be built by name alone: all but composite, which mixes others."""
    return tuple(sorted(DATASETS.keys() - {"composite"}))


class GymTask:
    """A dataset of reasoning-gym by name. A question is held out by its text.

    Reward parts: "outcome", 1.0 for the verifier's full mark, else 0.0; "verifier", the mark itself, which also goes to
    texts that merely contain the answer.

    Args:
        size: items of the dataset; a few datasets compute all of them at once.
        options: the dataset's own.

    Raises:
        ValueError: an unknown name, or options or a size that the dataset refuses.
    """

    def __init__(self, name: str, *, seed: int = 0, size: int = 1_000, **options: Any) -> None:
        if name not in DATASETS:
            raise ValueError(f"reasoning-gym has no dataset {name!r}; there are {', '.join(gym_names())}")
        try:
            self._dataset = reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
        except (AssertionError, TypeError, ValueError) as error:  # how its configurations refuse
            raise ValueError(f"reasoning-gym's {name} refuses size {size} and options {options}: {error}") from error
        self.name = name
        self._size = size

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        item = self._draw(rng, held_out=held_out)

        def reward(message: Message) -> Mapping[str, float]:
            mark = self._mark(message.content.strip(), item)
            return {"outcome": float(mark == 1.0), "verifier": mark}

        return _single_turn(item["question"], reward)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        """A question and the dataset's answer, without thinking.

        Raises:
            ValueError: the dataset knows no answers, only how to check them.
        """
        item = self._draw(rng, held_out=False)
        if not isinstance(item["answer"], str):
            raise ValueError(f"reasoning-gym's {self.name} has no answers to demonstrate; leave it out of a cold start")
        return Message("user", item["question"]), Message("assistant", item["answer"])

    def _mark(self, answer: str, item: Mapping[str, Any]) -> float:
        try:
            return float(self._dataset.score_answer(answer, item))
        except Exception:  # a verifier that cannot even parse what a model wrote
            return 0.0

    def _draw(self, rng: random.Random, *, held_out: bool) -> dict[str, Any]:
        for _ in range(_DRAWS):
            item = self._dataset[rng.randrange(self._size)]
            if is_held_out(item["question"]) == held_out:
                return item
        raise ValueError(f"reasoning-gym's {self.name}: no {_split(held_out)} question among {self._size}; raise size")


class RowsTask:
    """Prompts and answers of a .jsonl or .parquet file, scored by the user's reward. A row is held out by its prompt.

    Args:
        prompt, answer: the names of the fields; a prompt is a text, an answer anything but null.
        system: the system message; none when empty.

    Raises:
        ValueError: a row without prompt or answer, no rows, a file that read_rows refuses; names file, line and field.
        FileNotFoundError: no such file.
    """

    def __init__(
        self, path: Path | str, reward: RowReward, *, prompt: str = "prompt", answer: str = "answer", system: str = ""
    ) -> None:
        rows = list(read_rows(path))
        if not rows:
            raise ValueError(f"{path}: no rows")
        self._splits: dict[bool, list[Row]] = {False: [], True: []}
        for row in rows:
            row.value(answer)
            self._splits[is_held_out(row.text(prompt))].append(row)
        self._path = path
        self._reward = reward
        self._prompt = prompt
        self._answer = answer
        self._system = system

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        row = self._draw(rng, held_out=held_out)
        return _single_turn(row.text(self._prompt), lambda message: self._reward(message, row.values), self._system)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        """A prompt and its answer, without thinking.

        Raises:
            ValueError: the answer is no text.
        """
        row = self._draw(rng, held_out=False)
        opening = (Message("system", self._system),) if self._system else ()
        return *opening, Message("user", row.text(self._prompt)), Message("assistant", row.text(self._answer))

    def _draw(self, rng: random.Random, *, held_out: bool) -> Row:
        rows = self._splits[held_out]
        if not rows:
            raise ValueError(f"{self._path}: no {_split(held_out)} row; about one prompt in five is held out: add rows")
        return rng.choice(rows)


def verifiers_task(environment: Any, **arguments: Any) -> Task:
    """An environment of the verifiers library, or the name of an installed one (of its hub) with its arguments.

    Raises:
        ValueError: verifiers is not installed, or the environment cannot be played (see verifiers.VerifiersTask).
    """
    if importlib.util.find_spec("verifiers") is None:
        raise ValueError("environments of verifiers need it installed: pip install 'verifiers>=0.1.14,<0.2'")
    import verifiers

    from trimtab.environments.adapters.verifiers import VerifiersTask

    if isinstance(environment, str):
        environment = verifiers.load_environment(environment, **arguments)
    return VerifiersTask(environment)


def _single_turn(prompt: str, reward: Reward, system: str = "") -> Callable[[], ToolEnv]:
    return lambda: ToolEnv(prompt, (), reward, system=system, max_messages=1)


def _split(held_out: bool) -> str:
    return "held-out" if held_out else "training"
