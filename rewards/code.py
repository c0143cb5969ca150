"""Code by unit tests in the sandbox. What a test expects never enters it: values come out and are compared outside.

Code under test can leave early, print, patch equality or look for its tests; all of it can only change what it hands
out, which is then not the expected value. Every test has a process and an empty folder of its own. All this is as
strong as the sandbox of the machine: see sandbox.isolation().
"""

import asyncio
import json
import math
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from trimtab.rewards.code_inside import CALL_FUNCTION, RUN_PROGRAM
from trimtab.rewards.reading.blocks import code_block as code_block
from trimtab.rewards.sandbox import Limits, Result, run, scratch
from trimtab.rewards.types import Check, VerifierError

LIMITS = Limits(wall_seconds=10.0)
"""Of each test, unless others are given."""

_SPACES = re.compile(r"(\s+)")
_DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class ProgramTest:
    """A program reads stdin and must print stdout, or one of accepted, or what check says is right.

    Spaces at the ends of lines and empty lines at the end do not count; numbers with a fraction agree within a relative
    or absolute 1e-6. check takes what was printed, here and not in the sandbox, and stdout is one output that is right.
    """

    stdin: str
    stdout: str
    accepted: tuple[str, ...] = ()
    check: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class CallTest:
    """A function is called with the arguments and must return value, or one of accepted, or what check says is right.

    Arguments are JSON values. What is returned becomes one: tuples, ranges, queues, arrays and iterators are lists,
    sets are sorted lists, numbers of numpy, decimals and fractions are numbers. Numbers with a fraction agree within a
    relative or absolute 1e-6, everything else exactly; true is not 1. A set as value takes its members in any order.
    check takes the JSON value, here and not in the sandbox, and value is one that is right.
    """

    arguments: tuple[Any, ...]
    value: Any = None
    accepted: tuple[Any, ...] = ()
    check: Callable[[Any], bool] | None = None

    def __post_init__(self) -> None:
        try:
            json.dumps([self.arguments, *map(_listed, (self.value, *self.accepted))])
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments and value of a test must be JSON values, got {self}: {error}") from error

    def passes(self, value: Any) -> bool:
        """Whether a JSON value is right.

        Raises:
            VerifierError: check breaks at value.
        """
        if self.check is not None:
            return _checked(self.check, value, self.value)
        return any(_same_or_in_any_order(value, right) for right in (self.value, *self.accepted))


@dataclass(frozen=True, slots=True)
class CodeScore:
    """One check for each test, in order; a reason quotes what the code did, never what was expected."""

    checks: tuple[Check, ...]

    @property
    def share(self) -> float:
        """Share of the tests passed, in [0, 1]. A constant answer can earn part of it: train on all_passed, or mix."""
        return sum(check.passed for check in self.checks) / len(self.checks)

    @property
    def all_passed(self) -> bool:
        """Whether every test passed."""
        return all(check.passed for check in self.checks)


async def program_score(
    code: str, tests: Sequence[ProgramTest], *, limits: Limits = LIMITS, at_once: int = 2
) -> CodeScore:
    """Run the code as a Python program once for each test, within limits each, at_once at a time.

    Raises:
        ValueError: there are no tests.
        VerifierError: the check of a test breaks at what is right.
        Exception: whatever the sandbox raises when it cannot run; nothing can be said about the code.
    """

    async def check(test: ProgramTest) -> Check:
        result = await _run(code, ["-c", RUN_PROGRAM], test.stdin, limits)
        if failed := _failure(result):
            return Check(False, failed)
        return Check(True) if _prints(result.stdout, test) else _wrong(result.stdout)

    return await _score(tests, check, at_once)


async def call_score(
    code: str,
    call: str,
    tests: Sequence[CallTest],
    *,
    limits: Limits = LIMITS,
    at_once: int = 2,
) -> CodeScore:
    """Call a function of the code once for each test, each in a process of its own, within limits, at_once at a time.

    call names the function; "Solution.solve" is a method of a fresh Solution().

    Raises:
        ValueError: there are no tests, or call is not a dotted name.
        VerifierError: the check of a test breaks at what is right.
        Exception: whatever the sandbox raises when it cannot run; nothing can be said about the code.
    """
    if not all(name.isidentifier() for name in call.split(".")):
        raise ValueError(f"call must be a name such as 'solve' or 'Solution.solve', got {call!r}")

    async def check(test: CallTest) -> Check:
        task = json.dumps({"call": call, "arguments": test.arguments})
        result = await _run(code, ["-c", CALL_FUNCTION], task, limits)
        if failed := _failure(result):
            return Check(False, failed)
        try:
            value = json.loads(result.stdout)
        except (ValueError, RecursionError):  # the code left early, or wrote to the channel itself
            return Check(False, f"no value was returned: {_end(result.stderr)}")
        return Check(True) if test.passes(value) else _wrong(result.stdout)

    return await _score(tests, check, at_once)


def same_value(value: Any, expected: Any) -> bool:
    """Whether two JSON values are equal as CallTest says."""
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(expected, dict):
        return (
            isinstance(value, dict)
            and value.keys() == expected.keys()
            and all(same_value(value[key], expected[key]) for key in expected)
        )
    if isinstance(expected, float) and isinstance(value, int | float) and not isinstance(value, bool):
        close = value == expected or (math.isnan(expected) and math.isnan(value))
        return close or (abs(value) < 1e300 and math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6))
    if isinstance(value, float) and isinstance(expected, int) and not isinstance(expected, bool):
        return value == expected
    return type(value) is type(expected) and bool(value == expected)


async def _run(code: str, argv: Sequence[str], stdin: str, limits: Limits) -> Result:
    async with scratch() as folder:
        (folder / "solution.py").write_text(code, encoding="utf-8", errors="replace")
        return await run([sys.executable, "-I", *argv], folder=folder, stdin=stdin, limits=limits)


async def _score(tests: Sequence[Any], check: Callable[[Any], Awaitable[Check]], at_once: int) -> CodeScore:
    if not tests:
        raise ValueError("code needs at least one test: without tests everything would pass")
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}")
    places = asyncio.Semaphore(at_once)

    async def place(test: Any) -> Check:
        async with places:
            return await check(test)

    return CodeScore(tuple(await asyncio.gather(*map(place, tests))))


def _failure(result: Result) -> str:
    if result.exceeded:
        return f"stopped at the limit {result.exceeded}"
    return f"exit status {result.returncode}: {_end(result.stderr)}" if result.returncode else ""


def _wrong(output: str) -> Check:
    return Check(False, f"wrong result {_end(output)!r}")


def _end(text: str) -> str:
    return text.strip()[-200:] or "nothing was said"


def _prints(output: str, test: ProgramTest) -> bool:
    if test.check is not None:
        return _checked(test.check, output, test.stdout)
    return any(_same_text(output, right) for right in (test.stdout, *test.accepted))


def _checked(check: Callable[[Any], bool], value: Any, right: Any) -> bool:
    """What check says of a value; a check that breaks says no, if it takes what is right."""
    try:
        return bool(check(value))
    except Exception as error:  # the user's own, on what a program of a model handed out
        try:
            check(right)
        except Exception:
            raise VerifierError(f"the check of a test breaks at what is right, {right!r}: {error!r}") from error
        return False


def _same_text(output: str, expected: str) -> bool:
    """Whether two outputs are the same, line by line and up to the form of numbers with a fraction."""
    pairs = [[_SPACES.split(line.rstrip()) for line in text.rstrip().splitlines()] for text in (output, expected)]
    printed, wanted = ([len(line) for line in lines] for lines in pairs)
    if printed != wanted:
        return False
    tokens = zip(*(chain.from_iterable(lines) for lines in pairs), strict=True)
    return all(one == other or _same_fraction(one, other) for one, other in tokens)


def _same_fraction(one: str, other: str) -> bool:
    if not (_DECIMAL.fullmatch(one) and _DECIMAL.fullmatch(other)) or "." not in one + other:
        return False
    return math.isclose(float(one), float(other), rel_tol=1e-6, abs_tol=1e-6)


def _same_or_in_any_order(value: Any, right: Any) -> bool:
    if not isinstance(right, set | frozenset):
        return same_value(value, json.loads(json.dumps(right)))
    left = list(value) if isinstance(value, list) else [math.nan]
    for member in _listed(right):
        found = next((i for i, one in enumerate(left) if same_value(one, json.loads(json.dumps(member)))), None)
        if found is None:
            return False
        left.pop(found)
    return not left


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, set | frozenset) else value
