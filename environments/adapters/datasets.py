"""Tasks that others wrote: datasets of reasoning-gym, files of prompts and answers, environments of verifiers."""

import importlib.util
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from trimtab.environments.adapters.rows import MathsTask, RowReward, RowsTask, SingleTurn, row_reward
from trimtab.environments.base import Known, Message, Task, VoidEpisode
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.functions import ToolEnv
from trimtab.rewards.gym import fair_mark, takes_canary
from trimtab.rewards.types import VerifierError

__all__ = ["GymTask", "MathsTask", "RowReward", "RowsTask", "gym_names", "row_reward", "verifiers_task"]

_DRAWS = 10_000
"""Draws of an item before a split counts as empty."""
_TRIED = 2
"""Items that canaries are tried on when a task is made; they are tried again behind every full mark."""


def gym_names() -> tuple[str, ...]:
    """The names of reasoning-gym's datasets that can be built by name alone: all but composite, which mixes others."""
    return tuple(sorted(DATASETS.keys() - {"composite"}))


class GymTask:
    """A dataset of reasoning-gym by name. A question is held out by its text.

    Reward parts: "outcome", 1.0 for the verifier's full mark, else 0.0; "verifier", the mark itself, which also goes to
    texts that merely contain the answer. Answers that name rivals, and full marks that go to anything, earn nothing
    (rewards/gym.py: fair_mark). A verifier that breaks at the dataset's own answer voids the episode.

    Args:
        size: items of the dataset; a few datasets compute all of them at once.
        options: the dataset's own.

    Raises:
        ValueError: an unknown name, options or a size that the dataset refuses, or a verifier that gives full marks to
            rubbish (canaries, tried here) where there is no answer to compare with, or none to its own answers.
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
        self._try_canaries()

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        return self._env_of(self._draw(rng, held_out=held_out))

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        """A question and the dataset's answer, without thinking.

        Raises:
            ValueError: the dataset knows no answers, only how to check them.
        """
        item = self._draw(rng, held_out=False)
        if not isinstance(item["answer"], str):
            raise ValueError(f"reasoning-gym's {self.name} has no answers to demonstrate; leave it out of a cold start")
        return Message("user", item["question"]), Message("assistant", item["answer"])

    def known(self, most: int) -> Iterator[Known]:
        """At most so many items with the dataset's own answers."""
        for i in range(min(most, self._size)):
            item = self._dataset[i]
            if isinstance(item["answer"], str):
                yield Known(f"{self.name} {i}", item["question"], item["answer"], self._env_of(item))

    def _env_of(self, item: Mapping[str, Any]) -> Callable[[], ToolEnv]:
        def reward(message: Message) -> Mapping[str, float]:
            mark = self._mark(message.content.strip(), item)
            return {"outcome": float(mark == 1.0), "verifier": mark}

        return SingleTurn(item["question"], reward)

    def _mark(self, answer: str, item: Mapping[str, Any]) -> float:
        try:
            return fair_mark(self._score(item), answer, item["answer"])
        except VerifierError as error:
            raise VoidEpisode(f"reasoning-gym's {self.name}: {error}") from error

    def _score(self, item: Mapping[str, Any]) -> Callable[[str], float]:
        return lambda answer: self._dataset.score_answer(answer, item)

    def _try_canaries(self) -> None:
        """Raises ValueError for a verifier that tells nothing."""
        for i in range(min(self._size, _TRIED)):
            item = self._dataset[i]
            truth = item["answer"]
            if not isinstance(truth, str) and (taken := takes_canary(self._score(item), truth)):
                raise ValueError(f"reasoning-gym's {self.name} gives full marks to {taken[0]!r}: leave it out")
            if isinstance(truth, str) and self._mark(truth, item) < 1.0:
                raise ValueError(f"reasoning-gym's {self.name} refuses its own answer {truth[:80]!r}: leave it out")

    def _draw(self, rng: random.Random, *, held_out: bool) -> dict[str, Any]:
        for _ in range(_DRAWS):
            item = self._dataset[rng.randrange(self._size)]
            if is_held_out(item["question"]) == held_out:
                return item
        raise ValueError(f"reasoning-gym's {self.name}: no {_split(held_out)} question among {self._size}; raise size")


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


def _split(held_out: bool) -> str:
    return "held-out" if held_out else "training"
