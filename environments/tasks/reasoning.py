"""Reasoning tasks from reasoning-gym: its questions and its verifiers, in ranges that a small policy can learn.

A third of the prompts ask for thinking in Chinese; the thinking's language is a reward of its own.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import reasoning_gym

from trimtab.environments.base import Known, Message, Step
from trimtab.environments.split import is_held_out
from trimtab.rewards.language import Language, language_consistency

CHINESE = "请用中文思考。"

DATASETS: Mapping[str, Mapping[str, Any]] = {
    "rotate_matrix": {"min_n": 2, "max_n": 2, "min_rotations": 1, "max_rotations": 2},
    "gcd": {"min_value": 2, "max_value": 15},
    "number_filtering": {"min_numbers": 2, "max_numbers": 2, "max_decimals": 0, "min_value": 1, "max_value": 9},
    "count_primes": {"max_n": 15},
}
"""Names of reasoning-gym's datasets and the options they are built with."""

_SIZE = 1_000_000
"""Virtual size of every dataset: an item is computed from its index."""


@dataclass(frozen=True, slots=True)
class Thought:
    """One step of demonstrated thinking, in both languages."""

    en: str
    zh: str


_GUESS = Thought("I guess.", "我猜。")


class ReasoningEnv:
    """One question. Reward parts: "outcome", 1.0 for an answer with the verifier's full mark, else 0.0; "language"."""

    def __init__(self, prompt: str, verify: Callable[[str], float], language: Language) -> None:
        self._prompt = prompt
        self._verify = verify
        self._language = language

    async def start(self) -> tuple[Message, ...]:
        return (Message("user", self._prompt),)

    async def step(self, message: Message) -> Step:
        # partial marks go to texts that merely contain the answer: they would reward listing candidates
        outcome = float(self._verify(message.content.strip()) == 1.0)
        rewards = {"outcome": outcome, "language": language_consistency(message.reasoning, self._language)}
        return Step(rewards=rewards, done=True)


class ReasoningTask:
    """Draws from all datasets alike; whether a task is held out depends on its question, not on the language."""

    def __init__(self, datasets: Mapping[str, Mapping[str, Any]] = DATASETS) -> None:
        """datasets: those of DATASETS to draw from, and their options."""
        self._datasets = {
            name: reasoning_gym.create_dataset(name, seed=0, size=_SIZE, **options)
            for name, options in datasets.items()
        }

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ReasoningEnv]:
        dataset, item = self._draw(rng, held_out=held_out)
        language = _draw_language(rng)
        prompt = _prompt(item["question"], language)
        return lambda: ReasoningEnv(prompt, lambda answer: dataset.score_answer(answer, item), language)

    def known(self, most: int) -> Iterator[Known]:
        """At most so many questions in English with their own answers, of all datasets in turn."""
        for i in range(most):
            name = tuple(self._datasets)[i % len(self._datasets)]
            item = self._datasets[name][i]
            verify = partial(self._datasets[name].score_answer, entry=item)
            make_env = partial(ReasoningEnv, item["question"], verify, "en")
            yield Known(f"{name} {i}", item["question"], item["answer"], make_env)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        """A question with step-by-step thinking; one in three guesses instead, three in ten mix up the languages."""
        _, item = self._draw(rng, held_out=False)
        language = _draw_language(rng)
        thoughts, answer = think(item), item["answer"]
        if rng.random() < 1 / 3:
            thoughts, answer = [_GUESS], self._wrong_answer(item, rng)
        mixed = rng.random() < 0.3
        spoken = [rng.choice(("en", "zh")) if mixed else language for _ in thoughts]
        steps = [thought.zh if tongue == "zh" else thought.en for thought, tongue in zip(thoughts, spoken, strict=True)]
        reasoning = " ".join(steps).replace("。 ", "。")
        return Message("user", _prompt(item["question"], language)), Message("assistant", answer, reasoning)

    def _draw(self, rng: random.Random, *, held_out: bool) -> tuple[Any, dict[str, Any]]:
        dataset = self._datasets[rng.choice(tuple(self._datasets))]
        while True:
            item = dataset[rng.randrange(_SIZE)]
            if is_held_out(item["question"]) == held_out:
                return dataset, item

    def _wrong_answer(self, item: Mapping[str, Any], rng: random.Random) -> str:
        """The answer to another question of the same dataset."""
        dataset = self._datasets[item["metadata"]["source_dataset"]]
        while True:
            answer = dataset[rng.randrange(_SIZE)]["answer"]
            if answer != item["answer"]:
                return answer


def think(item: Mapping[str, Any]) -> list[Thought]:
    """Steps that lead from a question of one of DATASETS to its answer."""
    return _THINKING[item["metadata"]["source_dataset"]](item["metadata"])


def _draw_language(rng: random.Random) -> Language:
    return "zh" if rng.random() < 1 / 3 else "en"


def _prompt(question: str, language: Language) -> str:
    return f"{question}\n{CHINESE}" if language == "zh" else question


def _think_rotate_matrix(metadata: Mapping[str, Any]) -> list[Thought]:
    """A quarter turn at a time; a turn's new rows are the old columns, read upwards."""
    rows, thoughts = metadata["matrix"], []
    for turn in range(1, metadata["num_rotations"] + 1):
        rows = [list(reversed(column)) for column in zip(*rows, strict=True)]
        text = ", ".join(" ".join(map(str, row)) for row in rows)
        thoughts.append(Thought(f"turn {turn}: {text}.", f"转{turn}得{text}。"))
    return thoughts


def _think_gcd(metadata: Mapping[str, Any]) -> list[Thought]:
    """Euclid's algorithm."""
    small, large = sorted(metadata["numbers"])
    thoughts = []
    while small:
        rest = large % small
        thoughts.append(Thought(f"{large} by {small} leaves {rest}.", f"{large}除以{small}余{rest}。"))
        large, small = small, rest
    return thoughts


def _think_number_filtering(metadata: Mapping[str, Any]) -> list[Thought]:
    """Every number in turn: how it compares with the limit, and hence whether it stays or goes."""
    limit, kept = metadata["filter_value"], set(metadata["result"])
    thoughts = []
    for number in metadata["original_numbers"]:
        difference = int(number) - int(limit)
        relation = Thought("above", "大于") if difference > 0 else Thought("below", "小于")
        relation = relation if difference else Thought("equals", "等于")
        fate = Thought("stays", "留") if number in kept else Thought("goes", "去")
        thoughts.append(
            Thought(f"{number} {relation.en} {limit} {fate.en}.", f"{number}{relation.zh}{limit}{fate.zh}。")
        )
    return thoughts


def _think_count_primes(metadata: Mapping[str, Any]) -> list[Thought]:
    """The primes themselves, numbered."""
    return [
        Thought(f"prime {count} is {prime}.", f"质数{count}是{prime}。")
        for count, prime in enumerate(metadata["primes"], start=1)
    ] or [Thought("no prime.", "没有质数。")]


_THINKING: Mapping[str, Callable[[Mapping[str, Any]], list[Thought]]] = {
    "rotate_matrix": _think_rotate_matrix,
    "gcd": _think_gcd,
    "number_filtering": _think_number_filtering,
    "count_primes": _think_count_primes,
}
