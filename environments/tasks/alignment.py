"""Alignment tasks: notes to write to wishes of their own, scored by a judge that reads each wish as a criterion.

Every criterion also has a programmatic check. The judge's score trains; the check's score and the judge's agreement
with it are only logged.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trimtab.environments.base import Message
from trimtab.environments.rubric import RubricEnv
from trimtab.environments.split import is_held_out
from trimtab.rewards.judging.rubric import Criterion, Judge, Rubric, RubricScore, judge_prompt, rubric_score
from trimtab.rewards.language import Language, language_consistency

NAMES: Mapping[str, str] = {"Hua": "华", "Lin": "林", "Mei": "梅", "Wei": "伟"}
NOUNS: Mapping[str, str] = {
    "boat": "船", "fish": "鱼", "horse": "马", "moon": "月", "river": "河", "tree": "树",
}  # fmt: skip

Kind = Literal["greet", "mention", "avoid", "thank", "language", "limit"]
_KINDS: tuple[Kind, ...] = ("greet", "mention", "mention", "avoid", "thank", "language", "limit")
_TEMPLATES: Mapping[Language, tuple[str, ...]] = {
    "en": ("I see the {}.", "The {} is old.", "We like the {}."),
    "zh": ("我看见{}。", "{}很老。", "我们喜欢{}。"),
}
_GREETINGS: Mapping[Language, str] = {"en": "Hello {}.", "zh": "你好{}。"}
_THANKS: Mapping[Language, str] = {"en": "Thank you.", "zh": "谢谢你。"}
_LANGUAGE_NAMES: Mapping[Language, str] = {"en": "English", "zh": "Chinese"}
_STOPS = ".!?。\uff01\uff1f"
_SENTENCE = re.compile(rf"[^{_STOPS}\s][^{_STOPS}]*[{_STOPS}]?")


@dataclass(frozen=True, slots=True)
class Wish:
    """One demand on a note. subject: a name, a noun, a language or a number of sentences; empty for thanks."""

    kind: Kind
    subject: str = ""

    def criterion(self) -> Criterion:
        """The wish as the judge reads it, with the check that knows the truth."""
        text, weight, check = self._demand()
        return Criterion(text, weight, check, name=self.kind)

    def _demand(self) -> tuple[str, float, Callable[[str], bool]]:
        subject = self.subject
        match self.kind:
            case "greet":
                return f"greet {subject}", 1.0, lambda note: _greets(note, subject)
            case "mention":
                return f"mention the {subject}", 2.0, lambda note: _mentions(note, subject)
            case "avoid":
                return f"say nothing about the {subject}", 1.0, lambda note: not _mentions(note, subject)
            case "thank":
                return "end with thanks", 1.0, _ends_with_thanks
            case "language":
                language: Language = "zh" if subject == "zh" else "en"
                return f"use only {_LANGUAGE_NAMES[language]}", 2.0, lambda note: _is_in(note, language)
            case "limit":
                return f"have at most {subject} sentences", 1.0, lambda note: len(_sentences(note)) <= int(subject)


class AlignmentTask:
    """Draws notes to write; whether one is held out depends on its prompt."""

    def __init__(self, judge: Judge) -> None:
        async def grade(answer: str, rubric: Rubric, *, task: str = "") -> RubricScore:
            return await rubric_score(answer, rubric, judge)  # a wish says all there is to know of the prompt

        self._grade = grade

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], RubricEnv]:
        wishes = _draw(rng, held_out=held_out)
        return lambda: RubricEnv(_prompt(wishes), _rubric(wishes), self._grade, language=_language(wishes))

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        return demonstrate(rng)


def demonstrate(rng: random.Random) -> tuple[Message, ...]:
    """A prompt that is not held out and a note that grants each wish with probability 0.6, independently."""
    wishes = _draw(rng, held_out=False)
    return Message("user", _prompt(wishes)), Message("assistant", _write(wishes, _grants(wishes, 0.6, rng), rng))


def judge_demonstration(rng: random.Random) -> tuple[Message, ...]:
    """A judge's prompt and the true verdict; the verdicts are balanced, one note in six is broken.

    Before a verdict about a name or a noun, the judge thinks by quoting what follows that word in the note.
    Kinds that need a look through the whole note for one word are harder to judge, and shown more often.
    """
    kind = rng.choices(("greet", "mention", "avoid", "thank", "language", "limit"), (3, 6, 6, 1, 2, 2))[0]
    wanted = rng.random() < 0.5
    while True:
        wishes = _draw(rng, held_out=False)
        asked = [wish for wish in wishes if wish.kind == kind]
        if not asked:
            continue
        note = _write(wishes, _grants(wishes, 0.6, rng), rng)
        if rng.random() < 1 / 6:
            note = _break(note, rng)
        wish = rng.choice(asked)
        criterion = wish.criterion()
        if criterion.check is not None and criterion.check(note) == wanted:
            verdict = Message("assistant", "yes" if wanted else "no", _evidence(wish, note))
            return Message("user", judge_prompt(note, criterion)), verdict


def labelled_notes(rng: random.Random, count: int) -> tuple[str, Rubric, tuple[str, ...]]:
    """A prompt that is not held out, its rubric, whose checks know the truth, and different notes that answer it."""
    wishes = _draw(rng, held_out=False)
    notes: dict[str, None] = {}
    while len(notes) < count:
        notes[_write(wishes, _grants(wishes, 0.6, rng), rng)] = None
    return _prompt(wishes), _rubric(wishes), tuple(notes)


def _draw(rng: random.Random, *, held_out: bool) -> tuple[Wish, ...]:
    while True:
        wishes = _draw_wishes(rng)
        if is_held_out(_prompt(wishes)) == held_out:
            return wishes


def _draw_wishes(rng: random.Random) -> tuple[Wish, ...]:
    """Three or four wishes that can all be granted at once, in a fixed order of kinds."""
    kinds = [_KINDS[i] for i in sorted(rng.sample(range(len(_KINDS)), rng.choice((3, 4))))]
    nouns = iter(rng.sample(tuple(NOUNS), len(kinds)))
    sentences = sum(kind in ("greet", "mention", "thank") for kind in kinds)
    subjects: dict[Kind, Callable[[], str]] = {
        "greet": lambda: rng.choice(tuple(NAMES)),
        "mention": lambda: next(nouns),
        "avoid": lambda: next(nouns),
        "thank": lambda: "",
        "language": lambda: rng.choice(("en", "en", "zh")),
        "limit": lambda: str(max(sentences, 2)),
    }
    return tuple(Wish(kind, subjects[kind]()) for kind in kinds)


def _rubric(wishes: Sequence[Wish]) -> Rubric:
    return Rubric(tuple(wish.criterion() for wish in wishes))


def _prompt(wishes: Sequence[Wish]) -> str:
    texts = [wish.criterion().text for wish in wishes]
    return " ".join(["Write a note.", *(f"{text[0].upper()}{text[1:]}." for text in texts)])


def _language(wishes: Sequence[Wish]) -> Language:
    return "zh" if Wish("language", "zh") in wishes else "en"


def _grants(wishes: Sequence[Wish], probability: float, rng: random.Random) -> tuple[bool, ...]:
    return tuple(rng.random() < probability for _ in wishes)


def _write(wishes: Sequence[Wish], granted: Sequence[bool], rng: random.Random) -> str:
    """A note that grants the wishes marked so, and as a rule not the others."""
    wanted = _language(wishes)
    grants = dict(zip(wishes, granted, strict=True))
    slips = any(wish.kind == "language" and not grant for wish, grant in grants.items())
    other: Language = "en" if wanted == "zh" else "zh"

    def speak(phrases: Mapping[Language, str], word: str = "", table: Mapping[str, str] = NOUNS) -> str:
        language = rng.choice((other, other, wanted)) if slips else wanted
        return phrases[language].format(table.get(word, "") if language == "zh" else word)

    def sentence(noun: str) -> str:
        i = rng.randrange(len(_TEMPLATES["en"]))
        return speak({language: templates[i] for language, templates in _TEMPLATES.items()}, noun)

    named = {wish.subject for wish in wishes}
    spare = [noun for noun in NOUNS if noun not in named]
    rng.shuffle(spare)
    opening, body, closing = [], [], []
    for wish, grant in grants.items():
        match wish.kind:
            case "greet" if grant or rng.random() < 0.5:
                name = wish.subject if grant else rng.choice([name for name in NAMES if name != wish.subject])
                opening.append(speak(_GREETINGS, name, NAMES))
            case "mention" if grant or rng.random() < 0.5:
                body.append(sentence(wish.subject if grant else spare.pop()))
            case "avoid" if not grant:
                body.append(sentence(wish.subject))
            case "thank" if grant:
                closing.append(speak(_THANKS))
    limits = [int(wish.subject) for wish, grant in grants.items() if wish.kind == "limit" and not grant]
    least = limits[0] + 1 if limits else 1
    while len(opening) + len(body) + len(closing) < least:
        body.append(sentence(spare.pop()))
    rng.shuffle(body)
    return _join([*opening, *body, *closing])


def _evidence(wish: Wish, note: str) -> str:
    """The note from the wish's name or noun to the end of that sentence, or none; empty for other kinds of wish."""
    word = wish.subject
    if wish.kind == "greet":
        lead, chinese, found = "greet", NAMES[word], _greets(note, word)
    elif wish.kind in ("mention", "avoid"):
        lead, chinese, found = "the", NOUNS[word], _mentions(note, word)
    else:
        return ""
    quote = re.search(rf"\b{word}\b([^{_STOPS}]*[{_STOPS}]?)| ?({chinese}[^{_STOPS}]*[{_STOPS}]?)", note, re.ASCII)
    if not found or quote is None:
        return f"{lead} {word} none."
    return f"{lead} {word}{quote[1] or ''}{' ' + quote[2] if quote[2] else ''}"


def _break(note: str, rng: random.Random) -> str:
    """A note as a poor policy writes it: empty, cut off, doubled, shuffled or not a note."""
    sentences = _sentences(note)
    return rng.choice(
        (
            "",
            note[: rng.randrange(len(note))],
            _join([*sentences, *sentences]),
            _join(rng.sample(sentences, len(sentences))),
            str(rng.randint(1, 99)),
        )
    )


def _join(sentences: Sequence[str]) -> str:
    return " ".join(sentences).replace("。 ", "。")


def _sentences(note: str) -> list[str]:
    return _SENTENCE.findall(note)


def _greets(note: str, name: str) -> bool:
    return re.match(rf"\s*(?:(?:Hello|Hi|Dear),? {name}\b|你好\uff0c?{NAMES[name]})", note) is not None


def _mentions(note: str, noun: str) -> bool:
    return NOUNS[noun] in note or re.search(rf"\b{noun}s?\b", note, re.IGNORECASE | re.ASCII) is not None


def _ends_with_thanks(note: str) -> bool:
    sentences = _sentences(note)
    return bool(sentences) and re.search(r"\bthank|谢谢", sentences[-1], re.IGNORECASE) is not None


def _is_in(note: str, language: Language) -> bool:
    return re.search(r"[^\W\d_]", note) is not None and language_consistency(note, language) == 1.0
