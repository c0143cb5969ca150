"""The program of one worker process of `equivalence.py`: reads questions from standard input, answers one byte each.

A worker may hang or run out of memory at any question: it is made to be killed. An alarm ends it even where its parent
has died.
"""

import json
import os
import resource
import signal
import sys
from fractions import Fraction
from typing import Any

READY, EQUAL, DIFFERENT, UNREADABLE_TRUTH = b"r", b"1", b"0", b"t"

_MEMORY = 2 << 30  # bytes of address space; SymPy alone needs about a tenth

_RELATIVE = 1e-4
"""By how much of the truth an answer may differ, where both have values."""

_WARM_UP = (("1", "1"), ("sin(x)^2", "1-cos(x)^2"), (r"x \le 3", r"(-\infty, 3]"), ("a", r"\text{b}"))
"""Comparisons that import what others need, before the first time limit."""


def main() -> None:
    """Answer questions, each a line of JSON [answer, truth, seconds], until standard input ends."""
    channel = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for answer, truth in _WARM_UP:
        _compare(answer, truth)
    os.write(channel, READY)
    for line in sys.stdin:
        answer, truth, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
        reply = _compare(answer, truth)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(channel, reply)


def _compare(answer: str, truth: str) -> bytes:
    from math_verify import verify  # type: ignore[import-untyped]

    try:
        wanted = _parse(truth)
        if not wanted:
            return UNREADABLE_TRUTH
        given = _parse(answer)
        if not given or not verify(wanted, given, allow_set_relation_comp=True, timeout_seconds=None):
            return DIFFERENT
        return EQUAL if _values_agree(given[0], wanted[0], "%" in answer + truth) else DIFFERENT
    except (MemoryError, RecursionError):
        return DIFFERENT


def _values_agree(given: Any, wanted: Any, percent: bool) -> bool:
    """False where two expressions that the library calls equal, as it rounds to 6 places, have different values."""
    from sympy import Basic, Eq, FiniteSet, Interval, MatrixBase, Tuple

    if isinstance(given, Eq) or isinstance(wanted, Eq):
        given, wanted = (side.rhs if isinstance(side, Eq) else side for side in (given, wanted))
    if isinstance(given, MatrixBase) and isinstance(wanted, MatrixBase):
        given, wanted = Tuple(*given), Tuple(*wanted)
    if isinstance(given, FiniteSet) and isinstance(wanted, FiniteSet):
        return len(given) == len(wanted) and all(
            any(_values_agree(one, other, percent) for one in given.args) for other in wanted.args
        )
    if isinstance(given, Tuple | Interval) and isinstance(wanted, Tuple | Interval):
        pairs = zip(given.args[:2] if isinstance(given, Interval) else given.args, wanted.args, strict=False)
        return all(_values_agree(one, other, percent) for one, other in pairs)
    if not (isinstance(given, Basic) and isinstance(wanted, Basic)):
        return True
    try:
        return any(_close(given * factor, wanted) for factor in ((1, 100, Fraction(1, 100)) if percent else (1,)))
    except (AttributeError, TypeError, ValueError, ArithmeticError, NotImplementedError):  # no numbers: sets, relations
        return True


def _close(given: Any, wanted: Any) -> bool:
    """Whether two expressions have values at one point that agree."""
    from sympy import Float

    symbols = sorted(given.free_symbols | wanted.free_symbols, key=str)
    point = {symbol: Float(f"1.{37 + 11 * i}") for i, symbol in enumerate(symbols)}
    one, other, between = (side.subs(point).evalf(20) for side in (given, wanted, given - wanted))
    if not (one.is_comparable or one.is_complex) or not (other.is_comparable or other.is_complex):
        return True
    if _vanishes(other):
        return _vanishes(one)
    return _vanishes(between) or bool(abs(between).evalf(20) <= _RELATIVE * abs(other).evalf(20))


def _vanishes(value: Any) -> bool:
    """Whether a value is 0, or what is left of a difference that has no digits."""
    return bool(value == 0 or (value.is_Float and value._prec == 1))


def _parse(text: str) -> list[Any]:
    """The expression of a whole text, in a list; empty where it is none. No part of a text stands for it."""
    from math_verify import LatexExtractionConfig, parse  # here: the parent imports this module for its constants

    found = parse(
        f"\\boxed{{{text}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return [_with_imaginary_unit(one) for one in found]


def _with_imaginary_unit(expression: Any) -> Any:
    """i as the imaginary unit, except where something runs over it."""
    from sympy import Expr, I, Product, Sum

    if not isinstance(expression, Expr) or expression.atoms(Sum, Product):
        return expression
    return expression.subs({symbol: I for symbol in expression.free_symbols if str(symbol) == "i"})


if __name__ == "__main__":
    main()
