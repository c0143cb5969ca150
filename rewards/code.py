"""Code by unit tests in the sandbox. What a test expects never enters it: values come out and are compared outside.

Code under test can leave early, print, patch equality or look for its tests; all of it can only change what it hands
out, which is then not the expected value. Every test has a process and an empty folder of its own. All this is as
strong as the sandbox of the machine: see sandbox.isolation().
"""

import asyncio
import json
import math
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.rewards.sandbox import Limits, Result, run
from trimtab.rewards.types import Check

LIMITS = Limits(wall_seconds=10.0)
"""Of each test, unless others are given."""

# Takes {"call", "arguments"} from stdin; the value leaves as JSON on a copy of stdout, what the code prints on stderr.
_CALLER = """
import json, os, sys
channel = os.dup(1)
os.dup2(2, 1)
task = json.load(sys.stdin)
sys.path.insert(0, os.getcwd())
import solution
first, *names = task["call"].split(".")
function = getattr(solution, first)
for name in names:
    function = getattr(function() if isinstance(function, type) else function, name)
value = function(*task["arguments"])
with open(channel, "w") as out:
    json.dump(value, out)
"""


@dataclass(frozen=True, slots=True)
class ProgramTest:
    """A program reads stdin and must print stdout, up to spaces at the ends of lines and empty lines at the end."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class CallTest:
    """A function is called with the arguments and must return a value; both hold JSON values only.

    Tuples and lists are the same to JSON. Numbers with a fraction agree within a relative or absolute 1e-6, everything
    else exactly; true is not 1.
    """

    arguments: tuple[Any, ...]
    value: Any

    def __post_init__(self) -> None:
        try:
            json.dumps([self.arguments, self.value])
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments and value of a test must be JSON values, got {self}: {error}") from error


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


def code_block(text: str, languages: Sequence[str] = ("python", "py", "python3", "")) -> str | None:
    """The last closed ``` block of a text whose language is one of languages; None when there is none."""
    last, opened, inside = None, None, list[str]()
    for line in text.splitlines(keepends=True):
        if not line.startswith("```"):
            inside.append(line)
        elif opened is None:
            opened, inside = line[3:].strip().lower(), []
        else:
            last = "".join(inside) if opened in languages else last
            opened = None
    return last


async def program_score(
    code: str, tests: Sequence[ProgramTest], *, limits: Limits = LIMITS, at_once: int = 2
) -> CodeScore:
    """Run the code as a Python program once for each test, within limits each, at_once at a time.

    Raises:
        ValueError: there are no tests.
        Exception: whatever the sandbox raises when it cannot run; nothing can be said about the code.
    """

    async def check(test: ProgramTest) -> Check:
        result = await _run(code, ["solution.py"], test.stdin, limits)
        if failed := _failure(result):
            return Check(False, failed)
        return Check(True) if _lines(result.stdout) == _lines(test.stdout) else _wrong(result.stdout)

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
        Exception: whatever the sandbox raises when it cannot run; nothing can be said about the code.
    """
    if not all(name.isidentifier() for name in call.split(".")):
        raise ValueError(f"call must be a name such as 'solve' or 'Solution.solve', got {call!r}")

    async def check(test: CallTest) -> Check:
        task = json.dumps({"call": call, "arguments": test.arguments})
        result = await _run(code, ["-c", _CALLER], task, limits)
        if failed := _failure(result):
            return Check(False, failed)
        try:
            value = json.loads(result.stdout)
        except (ValueError, RecursionError):  # the code left early, or wrote to the channel itself
            return Check(False, f"no value was returned: {_end(result.stderr)}")
        return Check(True) if same_value(value, json.loads(json.dumps(test.value))) else _wrong(result.stdout)

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
    with tempfile.TemporaryDirectory(prefix="trimtab-code-") as folder:
        (Path(folder) / "solution.py").write_text(code, encoding="utf-8", errors="replace")
        return await run([sys.executable, "-I", *argv], folder=Path(folder), stdin=stdin, limits=limits)


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


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
