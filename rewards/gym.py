"""The verifiers of reasoning-gym as functions by name, for questions of its datasets that come from a file."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import reasoning_gym

from trimtab.rewards.reading.plain import alternatives, normalised
from trimtab.rewards.reading.quantities import quantity
from trimtab.rewards.types import VerifierError

Verifier = Callable[[str, Mapping[str, Any]], float]
"""Takes an answer and the question's entry; returns the mark, in [0, 1]."""

CANARIES = ("", "nan", "0", "1", "banana")
"""Answers that must not have the full mark, unless they are the answer."""

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\s\d]")
_PARTS = re.compile(r"[\n;]|,(?!\d{3}(?!\d))")


def gym_verifier(name: str) -> Verifier:
    """The verifier of a dataset. An entry is what the dataset yields: question, answer and metadata.

    Less than the full mark also goes to texts that merely contain the answer: train on marks of 1.0 alone. Full marks
    are checked as fair_mark() says.

    Raises:
        ValueError: there is no dataset of that name. From the verifier: an entry lacks metadata.
        VerifierError: from the verifier, as fair_mark().
    """
    try:
        score = reasoning_gym.get_score_answer_fn(name)
    except ValueError as error:
        raise ValueError(f"reasoning-gym has no dataset {name!r}: see adapters.datasets.gym_names()") from error

    def verify(answer: str, entry: Mapping[str, Any]) -> float:
        if missing := {"question", "answer", "metadata"} - entry.keys():
            raise ValueError(f"an entry of reasoning-gym's {name} lacks {', '.join(sorted(missing))}")
        return fair_mark(partial(_score, score, entry), answer, entry["answer"])

    return verify


def fair_mark(score: Callable[[str], float], answer: str, truth: Any) -> float:
    """The mark of an answer; 0.0 for a full mark that is not earned.

    It is not earned where the answer names rivals of the truth ("44 or 7"), and where the verifier also gives it to
    CANARIES, unless the answer is the truth up to spaces and the form of its numbers. An answer at which the verifier
    breaks has 0.0, as long as the truth has the full mark.

    Args:
        truth: the dataset's own answer; None where it has none.

    Raises:
        VerifierError: it breaks at the truth too, or takes canaries where there is no truth.
    """
    try:
        mark = float(score(answer))
    except Exception as error:  # of other people's code, at what a model wrote
        if isinstance(truth, str) and not _is_full(score, truth):
            raise VerifierError(f"a verifier breaks at its own answer {truth[:80]!r}: {error!r}") from error
        return 0.0
    if mark < 1.0 or (isinstance(truth, str) and normalised(answer) == normalised(truth)):
        return mark
    if not isinstance(truth, str):
        if taken := takes_canary(score, truth):
            raise VerifierError(f"a verifier gives full marks to {taken[0]!r}")
        return mark
    loose = takes_canary(score, truth) and not _same(answer, truth)
    return 0.0 if loose or names_rivals(answer, truth) else mark


def takes_canary(score: Callable[[str], float], truth: Any) -> tuple[str, ...]:
    """Those canaries that have the full mark and are not the truth."""
    others = [canary for canary in CANARIES if not isinstance(truth, str) or not _same(canary, truth)]
    return tuple(canary for canary in others if _is_full(score, canary))


def names_rivals(answer: str, truth: str) -> bool:
    """Whether an answer leaves more open than the truth: alternatives, a second number beside a number, a second word
    beside a word."""
    if len(alternatives(answer)) > len(alternatives(truth)):
        return True
    parts = [part.strip() for part in _PARTS.split(answer) if part.strip()]
    if wanted := quantity(truth):
        numbers = {found[0] for part in parts if (found := quantity(part))}
        return any(abs(number - wanted[0]) > 1e-6 * abs(wanted[0]) for number in numbers)
    return len(parts) > 1 and not any(_PARTS.search(text) or " " in text.strip() for text in (truth, *parts))


def _same(answer: str, truth: str) -> bool:
    """Whether two texts have the same letters and signs, and numbers of the same value."""
    numbers = quantity(answer), quantity(truth)
    if numbers[0] and numbers[1]:
        return numbers[0][1] == numbers[1][1] and abs(numbers[0][0] - numbers[1][0]) <= 1e-6 * abs(numbers[1][0])
    tokens = [[_token(token) for token in _TOKEN.findall(text.casefold())] for text in (answer, truth)]
    return tokens[0] == tokens[1]


def _token(text: str) -> str | float:
    return float(text) if text[0].isdigit() else text


def _is_full(score: Callable[[str], float], answer: str) -> bool:
    try:
        return float(score(answer)) >= 1.0
    except Exception:  # of other people's code
        return False


def _score(score: Callable[..., float], entry: Mapping[str, Any], answer: str) -> float:
    return score(answer, dict(entry))
