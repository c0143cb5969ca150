"""A small world of invented entities whose pages link to each other, and two-hop questions with known answers.

Generated from a seed: 60 towns, 100 people, 40 companies, 60 books and 40 rivers, each with a page. Every relation has
one object, and no two entities share a name, so that every question has exactly one answer.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

from trimtab.environments.rows import Document

Kind = Literal["town", "person", "company", "book", "river"]

COUNTS: Mapping[Kind, int] = {"town": 60, "person": 100, "company": 40, "book": 60, "river": 40}


@dataclass(frozen=True, slots=True)
class Relation:
    """What an entity's page says about one thing. kind: of the object when it is an entity, None for a plain value."""

    name: str
    sentence: str
    kind: Kind | None = None


RELATIONS: Mapping[Kind, tuple[Relation, ...]] = {
    "town": (
        Relation("mayor", "The mayor of {0} is {1}.", "person"),
        Relation("river", "{0} lies on the {1}.", "river"),
        Relation("founding year", "The town was founded in {1}."),
        Relation("population", "It has {1} inhabitants."),
    ),
    "person": (
        Relation("birthplace", "{0} was born in {1}.", "town"),
        Relation("employer", "Most people know {0} from years at {1}.", "company"),
        Relation("birth year", "The year of birth is {1}."),
        Relation("instrument", "In the evenings {0} plays the {1}."),
    ),
    "company": (
        Relation("seat", "{0} has its seat in {1}.", "town"),
        Relation("founder", "It was founded by {1}.", "person"),
        Relation("product", "The company makes {1}."),
        Relation("opening year", "It opened its doors in {1}."),
    ),
    "book": (
        Relation("author", "{0} is a novel by {1}.", "person"),
        Relation("setting", "The story is set in {1}.", "town"),
        Relation("publication year", "It was published in {1}."),
    ),
    "river": (
        Relation("mouth", "The {0} reaches the sea near {1}.", "town"),
        Relation("length in kilometres", "Its course measures {1} kilometres."),
    ),
}
_INSTRUMENTS = ("cello", "oboe", "harp", "lute", "trumpet", "viola", "flute", "drums")
_PRODUCTS = ("clocks", "bicycles", "lenses", "paper", "kettles", "ropes", "pianos", "lamps", "tiles", "compasses")
_SUFFIXES: Mapping[Kind, tuple[str, ...]] = {
    "town": ("burg", "ford", "stad", "haven"),
    "company": (" Works", " & Sons", " Brothers"),
    "river": ("a", "en"),
    "person": ("",),
    "book": ("",),
}
_WEATHER = ("mild", "windy", "dry", "foggy", "wet")


@dataclass(frozen=True, slots=True)
class Entity:
    """One page. facts: the object of each relation of its kind, by the relation's name."""

    id: str
    kind: Kind
    name: str
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """Two hops: from start to a bridge by the first relation, from there to the answer by the second."""

    text: str
    start: Entity
    bridge: Entity
    relations: tuple[str, str]
    answer: str


@dataclass(frozen=True, slots=True)
class World:
    """All entities by name."""

    entities: Mapping[str, Entity]

    def documents(self) -> list[Document]:
        """A page for each entity: its facts, then the pages that link to it."""
        links: dict[str, list[str]] = {name: [] for name in self.entities}
        for entity in self.entities.values():
            for relation in RELATIONS[entity.kind]:
                if relation.kind:
                    links[entity.facts[relation.name]].append(f"{entity.name} ({relation.name})")
        return [Document(entity.id, entity.name, _page(entity, links[name])) for name, entity in self.entities.items()]

    def question(self, rng: random.Random) -> Question:
        """A two-hop question. Its text depends on the start and the relations alone.

        >>> generate().question(random.Random(0)).text.startswith("What is the ")
        True
        """
        start = rng.choice(tuple(self.entities.values()))
        first = rng.choice([relation for relation in RELATIONS[start.kind] if relation.kind])
        bridge = self.entities[start.facts[first.name]]
        second = rng.choice(RELATIONS[bridge.kind])
        text = f"What is the {second.name} of the {first.name} of {start.name}?"
        return Question(text, start, bridge, (first.name, second.name), bridge.facts[second.name])


def generate(seed: int = 0) -> World:
    """The world of a seed, the same on every machine."""
    rng = random.Random(seed)
    names = _names(rng)
    entities = {}
    for kind, count in COUNTS.items():
        for number in range(count):
            name = names[kind][number]
            facts = {
                relation.name: rng.choice(names[relation.kind]) if relation.kind else _value(relation.name, rng)
                for relation in RELATIONS[kind]
            }
            entities[name] = Entity(f"{kind}-{number:03d}", kind, name, facts)
    return World(entities)


def sentence(entity: Entity, relation: str) -> str:
    """What an entity's page says of a relation."""
    form = next(form for form in RELATIONS[entity.kind] if form.name == relation)
    return form.sentence.format(entity.name, entity.facts[relation])


def _names(rng: random.Random) -> dict[Kind, list[str]]:
    stems = ["".join(parts) for parts in product(("b", "d", "k", "l", "m", "r", "t", "v"), "aeiou", ("l", "n", "r"))]
    words = [(first + second[:2]).capitalize() for first, second in product(stems, stems[::7])]
    rng.shuffle(words)
    unused = iter(dict.fromkeys(words))
    names: dict[Kind, list[str]] = {}
    for kind, count in COUNTS.items():
        names[kind] = [next(unused) + rng.choice(_SUFFIXES[kind]) for _ in range(count)]
        if kind == "person":
            names[kind] = [f"{name} {next(unused)}" for name in names[kind]]
        elif kind == "book":
            names[kind] = [f"The {name} Papers" for name in names[kind]]
    return names


def _value(relation: str, rng: random.Random) -> str:
    match relation:
        case "population":
            return str(rng.randrange(1_000, 90_000))
        case "length in kilometres":
            return str(rng.randrange(20, 900))
        case "instrument":
            return rng.choice(_INSTRUMENTS)
        case "product":
            return rng.choice(_PRODUCTS)
        case "founding year":
            return str(rng.randrange(900, 1700))
        case _:
            assert relation.endswith("year"), relation
            return str(rng.randrange(1700, 2000))


def _page(entity: Entity, links: list[str]) -> str:
    """Facts in an order of the page's own, between remarks that answer nothing."""
    rng = random.Random(entity.id)
    facts = [sentence(entity, relation.name) for relation in RELATIONS[entity.kind]]
    rng.shuffle(facts)
    remark = f"{entity.name} is a {entity.kind}; the weather of its pages is {rng.choice(_WEATHER)}."
    paragraphs = [" ".join([remark, *facts])]
    if links:
        paragraphs.append("Mentioned by: " + ", ".join(links) + ".")
    return "\n".join(paragraphs)
