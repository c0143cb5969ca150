"""Arithmetic from reasoning-gym that a small instruct model can begin to solve: it answers in sentences of its own."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import reasoning_gym

from trimtab.environments.base import Message, Step
from trimtab.environments.split import is_held_out
from trimtab.rewards.numbers import settled_number

_SIZE = 1_000_000
"""Virtual size of a dataset: an item is computed from its index."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with a number for an answer; called, it makes an environment. Equal questions are one prompt."""

    prompt: str
    answer: Fraction

    def __call__(self) -> "NumberEnv":
        return NumberEnv(self)

    @property
    def given(self) -> tuple[Fraction, ...]:
        """The numbers of the question, without signs."""
        return tuple(Fraction(digits) for digits in re.findall(r"\d+(?:\.\d+)?", self.prompt))


class NumberEnv:
    """One question. Reward part "outcome": 1.0 if the message settles on the right number (rewards/numbers.py)."""

    def __init__(self, question: Question) -> None:
        self._question = question

    async def start(self) -> tuple[Message, ...]:
        return (Message("user", self._question.prompt),)

    async def step(self, message: Message) -> Step:
        number = settled_number(message.content, self._question.given)
        return Step(rewards={"outcome": float(number == self._question.answer)}, done=True)


class NumberTask:
    """Questions of one dataset. Whether one is held out depends on its numbers, whatever their order."""

    DATASET: ClassVar[str]
    """A name of reasoning-gym's ..."""
    OPTIONS: ClassVar[Mapping[str, Any]]
    """... and what it is built with."""

    def __init__(self) -> None:
        self._dataset = reasoning_gym.create_dataset(self.DATASET, seed=0, size=_SIZE, **self.OPTIONS)

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Question:
        while True:
            item = self._dataset[rng.randrange(_SIZE)]
            question = Question(item["question"], Fraction(item["answer"]))
            if self._wants(question) and is_held_out(f"{self.DATASET} {sorted(question.given)}") == held_out:
                return question

    def _wants(self, question: Question) -> bool:
        return True

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        question = self.sample(rng)
        return Message("user", question.prompt), Message("assistant", f"The answer is {question.answer}.")


class SumTask(NumberTask):
    """Sums of two numbers of two digits. The dataset's differences are left out: a small model does not learn in
    minutes to go below zero."""

    DATASET = "chain_sum"
    OPTIONS: ClassVar = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}

    def _wants(self, question: Question) -> bool:
        return " + " in question.prompt


class DigitSumTask(NumberTask):
    """Sums and differences of two digits: some hundred questions, which a model may learn by heart."""

    DATASET = "chain_sum"
    OPTIONS: ClassVar = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


class ProductTask(NumberTask):
    """Products of two digits."""

    DATASET = "products"
    OPTIONS: ClassVar = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
