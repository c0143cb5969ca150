"""The number that a short answer in sentences settles on."""

import re
from collections.abc import Collection
from fractions import Fraction

LONGEST = 4000
"""Characters of an answer that is read: the patterns take time with the square of its length."""
_PLAIN = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"[\u2212\u2013]", "-"),
        (r"\\times|\\cdot|[\u00d7\u00b7]|(?<=\d)\s+x\s+(?=\d)", "*"),
        (r"\\div|\u00f7", "/"),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # 1,234
        (r"\*\*|__|`|\\[()\[\]]|\\boxed|[{}$€£¥]", ""),  # emphasis, formulas, currencies
        (r"(?im)^\s*(?:step\s*)?\d{1,2}\s*(?:[.)]\s|:)", ""),  # the number of a step, not one that is claimed
    )
)
_DIGITS = re.compile(r"\d+(?:\.\d+)?")
_NUMBER = re.compile(rf"(?<![\w.])-?{_DIGITS.pattern}(?![\w%]|\.\d)")
_SIDE = rf"-?{_DIGITS.pattern}(?:\s*[-+*/]\s*-?{_DIGITS.pattern})*"
_EQUATION = re.compile(rf"(?<![\w.]){_SIDE}(?:\s*=\s*{_SIDE})+(?![\w%]|\.\d)")
_OPERATION = re.compile(rf"\s*([-+*/]?)\s*(-?{_DIGITS.pattern})")
_HEDGE = re.compile(r"\b(?:or|maybe|perhaps|probably|possibly|alternatively|either|might|could|guess)\b|\?", re.I)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")


def settled_number(text: str, given: Collection[int | Fraction] = ()) -> Fraction | None:
    """The last number of a text, if the text settles on it; None otherwise.

    It settles if every other number is the same one, is given (stands in the question), or belongs to a calculation
    that is right, as in 10 + 30 = 40; and if the sentence of the last number does not hedge (or, maybe, might). So a
    second result, a wrong step or a list of candidates leaves nothing. Read are 1,234 and -7 and 2.50, with emphasis,
    currencies and units around them; 42%, 3rd and 1.2.3 make the whole unreadable.

    >>> settled_number("12 + 30 = 42.", given=(12, 30))
    Fraction(42, 1)
    """
    if len(text) > LONGEST:
        return None
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers or len(numbers) < len(_DIGITS.findall(text)):
        return None
    last = Fraction(numbers[-1][0])
    working = [found.span() for found in _EQUATION.finditer(text) if _is_right(found[0])]
    loose = {Fraction(n[0]) for n in numbers if not any(start <= n.start() < end for start, end in working)}
    if {abs(number) for number in loose - {last}} - {abs(Fraction(number)) for number in given}:
        return None
    return None if _HEDGE.search(_sentence(text, numbers[-1].start())) else last


def _is_right(equation: str) -> bool:
    """Whether all sides are equal and at least one is a calculation."""
    sides = equation.split("=")
    calculates = any(len(_DIGITS.findall(side)) > 1 for side in sides)
    values = {_value(side) for side in sides}
    return calculates and len(values) == 1 and None not in values


def _value(side: str) -> Fraction | None:
    """A sum of products; None where it divides by zero."""
    total, product = Fraction(0), Fraction(0)
    for sign, digits in _OPERATION.findall(side):
        number = Fraction(digits)
        if sign in ("*", "/"):
            if sign == "/" and not number:
                return None
            product = product * number if sign == "*" else product / number
        else:
            total, product = total + product, -number if sign == "-" else number
    return total + product


def _sentence(text: str, place: int) -> str:
    """The sentence around a place, its end included."""
    ends = [end.end() for end in _SENTENCE_END.finditer(text)]
    start = max((end for end in ends if end <= place), default=0)
    return text[start : min((end for end in ends if end > place), default=len(text))]
