"""Answers that a program can check: exact, numeric and mathematical. Each takes the answer alone, see final_answer."""

import asyncio
import math
import re
from collections.abc import Collection, Mapping

from trimtab.rewards.reading.equivalence import compare_expressions
from trimtab.rewards.reading.final import boxed, final_answer
from trimtab.rewards.reading.notation import is_words, readable_latex
from trimtab.rewards.reading.plain import alternatives, bare, normalised
from trimtab.rewards.reading.quantities import quantity
from trimtab.rewards.types import VerifierError

__all__ = [
    "alternatives",
    "boxed",
    "choice",
    "equivalent",
    "exact",
    "final_answer",
    "mathematics",
    "normalised",
    "numeric",
    "quantity",
    "unreadable",
]
_CHOICE = re.compile(r"(?:option |choice )?[(\[]?([a-z])(?:[)\].:](?P<behind>.*)|$)", re.DOTALL)
_LETTERS = re.compile(r"(?:[\s,;/&+()\[\].:]|and\b|or\b|\b[a-z]\b)*")


def exact(answer: str | None, truths: str | Collection[str]) -> bool:
    """Whether the answer equals the truth, or one of several, after normalised(); an empty answer equals nothing.

    Raises:
        ValueError: a truth is empty, or there is none.
    """
    wanted = {normalised(truth) for truth in ([truths] if isinstance(truths, str) else truths)}
    if not wanted or "" in wanted:
        raise ValueError(f"a truth must not be empty, got {truths!r}")
    return answer is not None and normalised(answer) in wanted


def numeric(
    answer: str | None,
    truth: float,
    *,
    relative: float = 1e-6,
    absolute: float = 0.0,
    units: Mapping[str, float] | None = None,
) -> bool:
    """Whether the answer is a number within the larger of relative * |truth| and absolute of the truth.

    units names what may stand behind the number, with its size in the unit of the truth: {"m": 1, "km": 1000} for a
    length in metres, {"%": 0.01} for a share. A bare number counts in the unit of the truth; a unit that is not
    named is a wrong answer, as are two numbers.

    Raises:
        ValueError: the truth is not finite, or a tolerance is negative.

    >>> numeric("1.5 km", 1500, units={"m": 1, "km": 1000})
    True
    """
    if not math.isfinite(truth):
        raise ValueError(f"a numeric truth must be finite, got {truth}")
    if relative < 0 or absolute < 0:
        raise ValueError(f"tolerances must not be negative, got relative {relative}, absolute {absolute}")
    found = quantity(answer) if answer is not None else None
    if found is None:
        return False
    value, unit = found
    factors = {"": 1.0, **(units or {})}
    return unit in factors and abs(value * factors[unit] - truth) <= max(relative * abs(truth), absolute)


def choice(answer: str | None, truth: str) -> bool:
    """Whether the answer picks the choice of a letter: "C", "(C)", "C. Paris" or "option C"; two letters pick none.

    Raises:
        ValueError: the truth is no single letter.

    >>> choice("(C) 42 m", "C")
    True
    """
    letter = normalised(truth)
    if len(letter) != 1 or not letter.isalpha():
        raise ValueError(f"the truth of a choice is a letter such as C, got {truth!r}")
    said = _CHOICE.fullmatch(normalised(answer or ""))
    if said is None or said[1] != letter:
        return False
    behind = said["behind"] or ""
    return len(alternatives(answer or "")) == 1 and not (behind.strip() and _LETTERS.fullmatch(behind))


async def equivalent(answer: str | None, truth: str, *, seconds: float = 5.0) -> bool:
    r"""Whether the answer and the truth, in LaTeX or plain notation, are the same mathematics.

    By the library `math-verify`, in a process that is killed after seconds; an answer that cannot be shown equal in
    that time is wrong. Decimal fractions agree with irrational and repeating values to 6 places and to a
    ten-thousandth of the value, 50\% is 0.5 and 50, of an equation such as x = 5 the right side may answer, units are
    ignored: use numeric() where they count. Words are compared as exact() does. An answer with more alternatives()
    than the truth is wrong.

    Raises:
        ValueError: the truth is empty or cannot be parsed, or seconds is not above 0.
        VerifierError: the processes cannot be started, or break at the truth itself: nothing can be said.
    """
    truth = bare(truth)
    if not truth:
        raise ValueError("a truth must not be empty")
    answer = bare(answer or "")
    if answer == truth:
        return True
    given, wanted = alternatives(answer), alternatives(truth)
    if not answer or len(given) > len(wanted):
        return False
    if all(map(is_words, wanted)):  # to the library, letters are a product: "on" would be "no"
        return {normalised(part) for part in given} == {normalised(part) for part in wanted}
    if len(wanted) > 1:  # "or" is no mathematics to the library
        return await compare_expressions(_set(given), _set(wanted), seconds=seconds)
    return await compare_expressions(readable_latex(answer), readable_latex(truth), seconds=seconds)


async def unreadable(truths: Collection[str], *, seconds: float = 5.0) -> dict[str, str]:
    """Those truths that equivalent() cannot read, with the reason."""
    different = list(dict.fromkeys(truths))
    asked = [_readable(truth, seconds) for truth in different]
    reasons = await asyncio.gather(*asked)
    return {truth: reason for truth, reason in zip(different, reasons, strict=True) if reason}


async def _readable(truth: str, seconds: float) -> str:
    """Empty where a truth can be read, else why not."""
    if quantity(truth) is not None:
        return ""
    try:  # "0" equals few truths, so that each is read
        await equivalent("0", truth, seconds=seconds)
    except (ValueError, VerifierError) as error:
        return str(error)
    return ""


async def mathematics(response: str, truth: str, *, seconds: float = 5.0) -> float:
    """1.0 when the final_answer of a whole response is equivalent to the truth, else 0.0; raises as equivalent does."""
    return float(await equivalent(final_answer(response), truth, seconds=seconds))


def _set(parts: Collection[str]) -> str:
    return r"\{" + ", ".join(readable_latex(bare(part)) for part in parts) + r"\}"
