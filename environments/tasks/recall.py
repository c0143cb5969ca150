"""Recall over long contexts: values by key, values over two keys, and words to say again, at distances that are known.

Words are invented, of two syllables each, and always behind a space: a small tokenizer has one token for each, and no
answer can be guessed.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from trimtab.environments.base import Message, Step
from trimtab.environments.split import is_held_out

SYLLABLES = [a + b for a, b in product("bdfgklmnprstvz", "aeio")]
WORDS = tuple(sorted({a + b for a, b in product(SYLLABLES[::3], SYLLABLES[1::3])}))
"""361 words: keys, values and what is to be said again."""
COPIED = 12
"""Words of a stretch that is to be said again."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a world, its answer, and how many facts before the end of the world the answer stands."""

    text: str
    answer: str
    distance: int


@dataclass(frozen=True, slots=True)
class World:
    """Facts in a row, such as "bade fimo", and what is asked about them. Called, it makes an environment."""

    facts: tuple[tuple[str, str], ...]
    asked: tuple[Asked, ...]

    def __call__(self) -> "RecallEnv":
        return RecallEnv(self)

    @property
    def opening(self) -> str:
        return f"facts: {'; '.join(f'{key} {value}' for key, value in self.facts)}. {self.asked[0].text}"


@dataclass(frozen=True, slots=True)
class Recital:
    """Facts in a row, and a recital of all that follows from them.

    asked are pairs of places: where in the recital a value begins, and where among the facts the one that tells it.
    """

    facts: str
    recital: str
    asked: tuple[tuple[int, int], ...]

    @property
    def messages(self) -> tuple[Message, Message]:
        return Message("user", self.facts), Message("assistant", self.recital)


class RecallEnv:
    """One question about one world. Reward part "outcome": 1.0 for the answer and nothing else."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def start(self) -> tuple[Message, ...]:
        return (Message("user", self._world.opening),)

    async def step(self, message: Message) -> Step:
        return Step(rewards={"outcome": float(message.content.strip() == self._world.asked[0].answer)}, done=True)


class RecallTask:
    """Worlds of between `least` and `most` facts; short ones are where learning starts. Whether one is held out depends
    on its first fact."""

    def __init__(self, least: int = 2, most: int = 96, questions: int = 12) -> None:
        """questions: of one demonstration, which is a conversation; an environment asks one."""
        self._least, self._most, self._questions = least, most, questions

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], RecallEnv]:
        return self.world(rng, held_out=held_out, questions=1)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        return conversation(self.world(rng, held_out=False, questions=self._questions))

    def world(self, rng: random.Random, *, held_out: bool, questions: int) -> World:
        """A world with so many questions."""
        while True:
            facts = _facts(rng, round(self._least * (self._most / self._least) ** rng.random()))
            if is_held_out(f"recall {facts[0]}") == held_out:
                return World(facts, tuple(_ask(rng, facts) for _ in range(questions)))


def recital(rng: random.Random, least: int, most: int) -> Recital:
    """Between so many facts; the same in another order, or in the same (copying); then values over two keys."""
    facts = _facts(rng, round(least * (most / least) ** rng.random()))
    known = dict(facts)
    told, places = "facts:", dict[str, int]()
    for key, value in facts:
        places[key] = len(told)
        told += f" {key} {value};"
    again = list(facts) if rng.random() < 1 / 3 else rng.sample(facts, len(facts))
    linked = [(key, value) for key, value in facts if value in known]
    said, asked = "once:", list[tuple[int, int]]()
    for key, value in again:
        asked.append((len(said) + len(key) + 1, places[key]))
        said += f" {key} {value};"
    said += " twice:" if linked else ""
    for key, value in rng.sample(linked, len(linked)):
        asked.append((len(said) + len(key) + 1, min(places[key], places[value])))
        said += f" {key} {known[value]};"
    return Recital(told, said, tuple(asked))


def conversation(world: World) -> tuple[Message, ...]:
    """All questions of a world and their answers."""
    texts = (world.opening, *(one.text for one in world.asked[1:]))
    pairs = zip(texts, world.asked, strict=True)
    return tuple(
        message for text, one in pairs for message in (Message("user", text), Message("assistant", one.answer))
    )


def _facts(rng: random.Random, count: int) -> tuple[tuple[str, str], ...]:
    """Keys are different; a third of the values are keys of other facts."""
    keys = rng.sample(WORDS, count)
    values = [word for word in WORDS if word not in set(keys)]
    return tuple((key, rng.choice(keys if rng.random() < 1 / 3 else values)) for key in keys)


def _ask(rng: random.Random, facts: Sequence[tuple[str, str]]) -> Asked:
    known = dict(facts)
    places = {key: i for i, (key, _) in enumerate(facts)}
    match rng.choice(("value", "value", "hop", "copy")):
        case "hop" if linked := [key for key, value in facts if known.get(value, value) != value]:
            key = rng.choice(linked)
            first = min(places[key], places[known[key]])
            return Asked(f"twice {key}?", f"is {known[known[key]]}", len(facts) - first)
        case "copy":
            start = rng.randrange(max(len(facts) - COPIED, 1))
            words = [value for _, value in facts[start : start + COPIED]]
            return Asked(f"from {facts[start][0]}?", " ".join(["is", *words]), len(facts) - start)
    key = rng.choice([key for key, _ in facts])
    return Asked(f"once {key}?", f"is {known[key]}", len(facts) - places[key])
