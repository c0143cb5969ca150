"""A small world of invented entities whose pages link to each other, and questions with known answers.

Generated from a seed: 60 towns, 100 people, 40 companies, 60 books and 40 rivers, each with a page. Every relation has
one object, and no two entities share a name, so that every question has exactly one answer. A question follows
relations from page to page, or adds up what several pages say; pages can be long, so that no window holds all it takes.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

from trimtab.environments.files import Document

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
NUMBERS: Mapping[Kind, str] = {
    "town": "population",
    "person": "birth year",
    "company": "opening year",
    "book": "publication year",
    "river": "length in kilometres",
}
"""Of each kind a relation whose object is a number."""
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
_FILLER = (
    "Much of what is told of {0} rests on letters that nobody has counted.",
    "In spring the talk about {0} is louder than in autumn.",
    "A visitor once wrote three lines on {0} and crossed out two.",
    "Some say that {0} was better known in former times.",
    "What the archive holds on {0} is kept in a grey box.",
    "Those who ask about {0} are sent from one desk to the next.",
    "There is a song on {0}, of which only the refrain is left.",
    "The old account of {0} is long, and most of it is about the rain.",
)


@dataclass(frozen=True, slots=True)
class Entity:
    """One page. facts: the object of each relation of its kind, by the relation's name."""

    id: str
    kind: Kind
    name: str
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the facts it takes: each entity's page says that of the relation at the same place."""

    text: str
    entities: tuple[Entity, ...]
    relations: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class World:
    """All entities by name."""

    entities: Mapping[str, Entity]

    def documents(self, *, filler: int = 0) -> list[Document]:
        """A page for each entity: its facts, then the pages that link to it.

        Args:
            filler: when above 0, each fact stands alone in a section of at least so many characters, between
                sentences that answer nothing; a blank line ends a section.
        """
        links: dict[str, list[str]] = {name: [] for name in self.entities}
        for entity in self.entities.values():
            for relation in RELATIONS[entity.kind]:
                if relation.kind:
                    links[entity.facts[relation.name]].append(f"{entity.name} ({relation.name})")
        return [
            Document(entity.id, entity.name, _page(entity, links[name], filler))
            for name, entity in self.entities.items()
        ]

    def question(self, rng: random.Random, *, hops: int = 2) -> Question:
        """A question that takes one page after the other. Its text depends on the start and the relations alone.

        >>> generate().question(random.Random(0)).text.startswith("What is the ")
        True
        """
        path = [rng.choice(tuple(self.entities.values()))]
        relations = []
        for _ in range(hops - 1):
            relations.append(rng.choice([one for one in RELATIONS[path[-1].kind] if one.kind]).name)
            path.append(self.entities[path[-1].facts[relations[-1]]])
        relations.append(rng.choice(RELATIONS[path[-1].kind]).name)
        asked = " of the ".join(reversed(relations))
        text = f"What is the {asked} of {path[0].name}?"
        return Question(text, tuple(path), tuple(relations), path[-1].facts[relations[-1]])

    def total(self, rng: random.Random, *, count: int = 4) -> Question:
        """A question that takes a number of each of count entities of one kind, and their sum.

        >>> generate().total(random.Random(0), count=2).text.startswith("What is the sum of the ")
        True
        """
        kind = rng.choice(tuple(NUMBERS))
        asked = rng.sample([entity for entity in self.entities.values() if entity.kind == kind], count)
        relation = NUMBERS[kind]
        names = " and ".join(entity.name for entity in asked)
        total = sum(int(entity.facts[relation]) for entity in asked)
        return Question(f"What is the sum of the {relation} of {names}?", tuple(asked), (relation,) * count, str(total))


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


def _page(entity: Entity, links: list[str], filler: int) -> str:
    """Facts in an order of the page's own, between remarks that answer nothing."""
    rng = random.Random(entity.id)
    facts = [sentence(entity, relation.name) for relation in RELATIONS[entity.kind]]
    rng.shuffle(facts)
    remark = f"{entity.name} is a {entity.kind}; the weather of its pages is {rng.choice(_WEATHER)}."
    mentions = ["Mentioned by: " + ", ".join(links) + "."] if links else []
    if not filler:
        return "\n".join([" ".join([remark, *facts]), *mentions])
    return "\n\n".join([remark, *(_section(entity.name, fact, filler, rng) for fact in facts), *mentions])


def _section(name: str, fact: str, filler: int, rng: random.Random) -> str:
    """A fact somewhere between at least filler characters of other sentences."""
    others: list[str] = []
    while sum(map(len, others)) < filler:
        others.append(rng.choice(_FILLER).format(name))
    others.insert(rng.randint(0, len(others)), fact)
    return f"On {name}. " + " ".join(others)
