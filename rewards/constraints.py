"""Instructions whose following a program can check, after the verifiable instructions of IFEval (arXiv 2311.07911).

A constraint is what the policy is told and how the answer is checked. Files name it by kind and options:
constraint("words", at_most=50).
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import regex

from trimtab.rewards.format import fits_schema, has_sections, is_json
from trimtab.rewards.language import NAMES, Language, language_consistency
from trimtab.rewards.types import Check

_ALONE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # scripts without spaces between words
_LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}_\u200c\u200d]--[{_ALONE}]]"
_WORD = regex.compile(
    rf"\p{{Han}}|[\p{{Hiragana}}\p{{Katakana}}ー]+|[[{_ALONE}]--[\p{{Han}}\p{{Hiragana}}\p{{Katakana}}]]+"
    rf"|{_LETTER}++(?:['\u2019.,-]{_LETTER}++)*+",
    regex.V1,
)
_SENTENCE_END = re.compile(
    r"[\u3002\uff01\uff1f\u0964\u0965\u061f\u06d4]+|(?<![.!?\u2026])[.!?\u2026]++(?=[\"')\]\u201d\u2019*_]*+(?:\s|$))"
)
_ABBREVIATION = re.compile(r"\b(?:[A-HJ-Z]|Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e|Fig|approx|cf|al|ca)\.$")
_MAY_END = re.compile(r"\b(?:etc|a\.m|p\.m|Inc|Ltd|Co|Corp|Jr|Sr|Ph\.D|U\.S|U\.K|No)\.$")
"""What a sentence may end with: it goes on where a small letter or a digit follows."""
_ITEM = re.compile(
    r"^[ \t]*(?:>[ \t]*)*(?:[-*+\u2022\u25e6\u25aa][ \t]+|\(?(?:\d{1,3}|[A-Za-z])[.)][ \t]+)(?=\S)", re.MULTILINE
)
_RULE = re.compile(r"^[ \t]*(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$", re.MULTILINE)
_BULLET = re.compile(r"^[ \t]*[-*+\u2022\u25e6\u25aa][ \t]+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^[ \t]*\d+[.)][ \t]+\S", re.MULTILINE)
_TITLE = re.compile(r"<<[^<>\n]+>>")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")


@dataclass(frozen=True, slots=True)
class Constraint:
    """text is the instruction as the policy reads it; check tells whether an answer follows it, and if not, why."""

    text: str
    check: Callable[[str], Check]


@dataclass(frozen=True, slots=True)
class ConstraintScore:
    """One check for each constraint, in order."""

    checks: tuple[Check, ...]

    @property
    def share(self) -> float:
        """Share of the constraints followed, in [0, 1] (the instruction-level accuracy of IFEval)."""
        return sum(check.passed for check in self.checks) / len(self.checks)

    @property
    def all_followed(self) -> bool:
        """Whether every constraint is followed (the prompt-level accuracy of IFEval)."""
        return all(check.passed for check in self.checks)


def constraint_score(answer: str, constraints: Sequence[Constraint]) -> ConstraintScore:
    """Check an answer against every constraint. An answer without a letter or digit follows none.

    Raises:
        ValueError: there are no constraints.
    """
    if not constraints:
        raise ValueError("an answer needs at least one constraint to be scored by")
    if not re.search(r"\w", answer):
        return ConstraintScore((Check(False, "the answer is empty"),) * len(constraints))
    return ConstraintScore(tuple(constraint.check(answer) for constraint in constraints))


def constraint(kind: str, **options: Any) -> Constraint:
    """The constraint of a kind: one of KINDS, with its options.

    Raises:
        ValueError: an unknown kind, or options that it does not take.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown constraint {kind!r}; there are {', '.join(KINDS)}")
    try:
        return KINDS[kind](**options)
    except TypeError as error:
        raise ValueError(f"wrong options for the constraint {kind!r}: {error}") from error


def count_words(text: str) -> int:
    """Words of a text, in any script; "don't", "3.5" and "well-known" are one each, as is each Han character."""
    return len(_WORD.findall(_composed(text)))


def count_sentences(text: str) -> int:
    """Sentences: they end with . ! ? or the forms of other scripts, the last also without; not at "e.g." or 3.5.

    An item of a list is at least one, and its number or bullet none.
    """
    return sum(map(_sentences, _ITEM.split(_RULE.sub("", text))))


def _sentences(text: str) -> int:
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        before, behind = text[max(start, end.start() - 8) : end.end()], text[end.end() : end.end() + 80].lstrip()
        if behind and (
            _ABBREVIATION.search(before) or (_MAY_END.search(before) and (behind[0].islower() or behind[0].isdigit()))
        ):
            continue
        count += bool(re.search(r"\w", text[start : end.end()]))
        start = end.end()
    return count + bool(re.search(r"\w", text[start:]))


def count_bullets(text: str) -> int:
    """Lines that begin with a bullet; a line of * * * or - - - is a rule."""
    return len(_BULLET.findall(_RULE.sub("", text)))


def count_paragraphs(text: str) -> int:
    """Paragraphs of a text: what empty lines, or rules such as *** or - - -, separate."""
    parts = re.split(r"\n\s*\n", _RULE.sub("\n\n", text))
    return sum(bool(re.search(r"\w", part)) for part in parts)


def counted(unit: str, count: Callable[[str], int], *, at_least: int = 0, at_most: int | None = None) -> Constraint:
    """Between at_least and at_most of a unit, such as "words", as count finds them.

    Raises:
        ValueError: no bound, a bound that is no whole number, or bounds that exclude each other.
    """
    for bound in (at_least, at_most):
        if bound is not None and (type(bound) is not int or bound < 0):
            raise ValueError(f"a number of {unit} must be a whole number, got {bound!r}")
    if at_most is None and at_least == 0:
        raise ValueError(f"a number of {unit} needs a bound: at_least, at_most or both")
    if at_most is not None and at_most < at_least:
        raise ValueError(f"at_most must not be below at_least, got {at_most} {unit} and {at_least}")

    def check(answer: str) -> Check:
        number = count(answer)
        within = at_least <= number and (at_most is None or number <= at_most)
        return Check(True) if within else Check(False, f"{number} {unit}")

    if at_least == at_most:
        wanted = f"exactly {at_least}"
    else:
        bounds = [f"at least {at_least}"] * (at_least > 0) + [f"at most {at_most}"] * (at_most is not None)
        wanted = " and ".join(bounds)
    return Constraint(f"Write {wanted} {unit}.", check)


def includes(*, phrases: Sequence[str], times: int = 1) -> Constraint:
    """Every phrase, at least times, in any case; a phrase that begins or ends with a letter does so at a word's end."""
    patterns = _phrases(phrases)
    if times < 1:
        raise ValueError(f"times must be at least 1, got {times}")

    def check(answer: str) -> Check:
        missing = [phrase for phrase, pattern in patterns.items() if len(pattern.findall(_composed(answer))) < times]
        return Check(False, f"too few of {', '.join(missing)}") if missing else Check(True)

    often = f", each at least {times} times" if times > 1 else ""
    return Constraint(f"Include {_quoted(phrases)}{often}.", check)


def excludes(*, phrases: Sequence[str]) -> Constraint:
    """None of the phrases, in any case, as whole words."""
    patterns = _phrases(phrases)

    def check(answer: str) -> Check:
        found = [phrase for phrase, pattern in patterns.items() if pattern.search(_composed(answer))]
        return Check(False, f"holds {', '.join(found)}") if found else Check(True)

    return Constraint(f"Do not use {_quoted(phrases, 'or')}.", check)


def starts_with(*, text: str) -> Constraint:
    """The answer begins with a text, in this case, spaces aside."""
    wanted = _some(text)
    return Constraint(
        f'Begin with "{wanted}".', lambda answer: _check(answer.strip().startswith(wanted), "begins else")
    )


def ends_with(*, text: str) -> Constraint:
    """The answer ends with a text, in this case, spaces aside."""
    wanted = _some(text)
    return Constraint(f'End with "{wanted}".', lambda answer: _check(answer.strip().endswith(wanted), "ends otherwise"))


def upper_case() -> Constraint:
    """No small letter, and at least one capital."""
    return Constraint("Write in capital letters only.", lambda answer: _check(answer.isupper(), "has small letters"))


def lower_case() -> Constraint:
    """No capital letter, and at least one small one."""
    return Constraint("Write in small letters only.", lambda answer: _check(answer.islower(), "has capital letters"))


def in_language(*, language: Language, share: float = 0.9) -> Constraint:
    """At least a share of the words is in a language, as language_consistency counts them."""
    language_consistency("", language)  # an unknown language shows here
    if not 0 < share <= 1:
        raise ValueError(f"the share of words must lie in (0, 1], got {share}")

    def check(answer: str) -> Check:
        found = language_consistency(answer, language)
        return _check(found >= share, f"{found:.0%} of the words are in {language}")

    return Constraint(f"Write in {NAMES[language]}.", check)


def json_only(*, schema: Mapping[str, Any] | None = None) -> Constraint:
    """The answer is one JSON value and nothing else; with a schema, one that satisfies it."""
    if schema is None:
        return Constraint("Answer with JSON only.", is_json)
    fits_schema("null", schema)  # a wrong schema shows here, not at the first answer
    return Constraint(
        f"Answer only with JSON that satisfies this schema: {schema}.", partial(fits_schema, schema=schema)
    )


def sections(*, titles: Sequence[str]) -> Constraint:
    """Markdown headings with these titles, in order."""
    has_sections("", titles)  # wrong titles show here
    return Constraint(f"Use the headings {_quoted(titles)}, in this order.", partial(has_sections, titles=titles))


def no_commas() -> Constraint:
    """No comma, Latin, Chinese or Arabic."""
    return Constraint(
        "Use no commas.", lambda answer: _check(not re.search("[,\uff0c\u3001\u060c]", answer), "has a comma")
    )


def titled() -> Constraint:
    """A title in double angle brackets."""
    return Constraint(
        "Give a title in double angle brackets, such as <<title>>.",
        lambda answer: _check(bool(_TITLE.search(answer)), "has no <<title>>"),
    )


KINDS: Mapping[str, Callable[..., Constraint]] = {
    "words": partial(counted, "words", count_words),
    "sentences": partial(counted, "sentences", count_sentences),
    "paragraphs": partial(counted, "paragraphs, with an empty line between them", count_paragraphs),
    "bullets": partial(counted, "bullet points", count_bullets),
    "numbered": partial(counted, "numbered points", lambda text: len(_NUMBERED.findall(text))),
    "placeholders": partial(counted, "placeholders such as [name]", lambda text: len(_PLACEHOLDER.findall(text))),
    "includes": includes,
    "excludes": excludes,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "upper_case": upper_case,
    "lower_case": lower_case,
    "language": in_language,
    "json": json_only,
    "sections": sections,
    "no_commas": no_commas,
    "title": titled,
}
"""The kinds of constraints, by the name that files use."""


def _check(passed: bool, reason: str) -> Check:
    return Check(True) if passed else Check(False, reason)


def _phrases(phrases: Sequence[str]) -> dict[str, regex.Pattern[str]]:
    if isinstance(phrases, str) or not phrases or not all(phrase.strip() for phrase in phrases):
        raise ValueError(f"phrases must be a list of texts, none empty, got {phrases!r}")
    return {phrase: _phrase(_composed(phrase)) for phrase in phrases}


def _phrase(phrase: str) -> regex.Pattern[str]:
    left = rf"(?<!{_LETTER})" if regex.match(_LETTER, phrase, regex.V1) else ""
    right = rf"(?!{_LETTER})" if regex.search(rf"{_LETTER}\Z", phrase, regex.V1) else ""
    return regex.compile(f"{left}{regex.escape(phrase, literal_spaces=True)}{right}", regex.V1 | regex.IGNORECASE)


def _composed(text: str) -> str:
    """Letters with their accents as one character, as far as there is one."""
    return unicodedata.normalize("NFC", text)


def _quoted(texts: Sequence[str], join: str = "and") -> str:
    *first, last = [f'"{text}"' for text in texts]
    return f"{', '.join(first)} {join} {last}" if first else last


def _some(text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text must not be empty, got {text!r}")
    return text.strip()
