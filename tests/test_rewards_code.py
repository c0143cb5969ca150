import asyncio

import pytest

from trimtab.rewards.code import (
    LIMITS,
    CallTest,
    CodeScore,
    ProgramTest,
    call_score,
    code_block,
    program_score,
    same_value,
)
from trimtab.rewards.sandbox import Limits
from trimtab.rewards.types import Check, VerifierError

SUMS = (CallTest((1, 2), 3), CallTest((-1, 1), 0))
GREETINGS = (ProgramTest("Ann\n", "Hello, Ann\n"), ProgramTest("Bob\n", "Hello, Bob"))
SHORT = Limits(wall_seconds=2.0)


def calls(code: str, call: str = "add", tests=SUMS, limits: Limits = LIMITS) -> CodeScore:
    return asyncio.run(call_score(code, call, tests, limits=limits))


def programs(code: str, tests=GREETINGS, limits: Limits = LIMITS) -> CodeScore:
    return asyncio.run(program_score(code, tests, limits=limits))


def test_the_score_is_the_share_of_tests_passed():
    score = CodeScore((Check(True), Check(False, "late"), Check(True), Check(True)))
    assert (score.share, score.all_passed) == (0.75, False)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na = 1\n```\nor\n```py\nb = 2\n```\n", "b = 2\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("```python\na = 1\n```\n```json\n{}\n```", "a = 1\n"),
        ("```python\na = 1\n", None),
        ("a = 1", None),
    ],
)
def test_the_code_of_an_answer_is_its_last_closed_block(text, code):
    assert code_block(text) == code


def test_a_right_function_passes_and_a_constant_one_passes_in_part():
    assert calls("def add(a, b):\n    print('noise')\n    return a + b").all_passed
    constant = calls("def add(a, b):\n    return 3")
    assert (constant.share, constant.checks[1]) == (0.5, Check(False, "wrong result '3'"))


def test_a_method_is_called_on_a_fresh_object_and_tuples_count_as_lists():
    code = "class Solution:\n    def pair(self, a):\n        return (a, a / 3)"
    assert calls(code, "Solution.pair", [CallTest((1,), [1, 0.33333334])]).all_passed


def test_a_right_program_passes_whatever_spaces_end_its_lines():
    assert programs("print('Hello,', input(), ' ')").all_passed
    assert programs("print('Hello, Ann')").share == 0.5


@pytest.mark.parametrize(
    "code",
    [
        "import sys\ndef add(a, b):\n    sys.exit(0)",
        "import os\nos._exit(0)",
        "class Same:\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return Same()",
        "class Same(int):\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return Same(99)",
        "import json\njson.dump = lambda value, out: out.write('true')\ndef add(a, b):\n    return 0",
        "import os, atexit\natexit.register(lambda: os.write(3, b'passed'))\ndef add(a, b):\n    return 99",
        "import os\ndef add(a, b):\n    os.write(1, b'3'); os.write(2, b'3')",
        "import builtins\nbuiltins.print = builtins.all = lambda *a, **k: True\ndef add(a, b):\n    return 'passed'",
    ],
)
def test_code_that_cheats_passes_nothing(code):
    assert calls(code, tests=[CallTest((30, 47), 77)]).share == 0.0


SPY = """
import os, sys

def spy(secret):
    seen = [open(name).read() for name in os.listdir(".") if os.path.isfile(name)]
    frame = sys._getframe().f_back
    while frame:
        seen.append(repr(frame.f_locals))
        frame = frame.f_back
    seen += [open("/proc/self/cmdline").read(), repr(os.environ), sys.stdin.read()]
    return 70_000 + 771 if str(70_000 + 771) in "".join(seen) else 0
"""


def test_the_value_that_is_expected_is_nowhere_to_be_found_while_arguments_are():
    hidden, given = calls(SPY, "spy", [CallTest((1,), 70771), CallTest((70771,), 70771)]).checks
    assert (hidden.passed, given.passed) == (False, True)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def add(a, b):\n    return object()", "exit status 1"),
        ("def add(a, b)\n    return a", "exit status 1"),
        ("def plus(a, b):\n    return a + b", "no attribute 'add'"),
        ("def add(a, b):\n    raise KeyError('lost')", "KeyError: 'lost'"),
        ("def add(a, b):\n    return [[]] if a else add", "wrong result '[[]]'"),
    ],
)
def test_what_failed_is_said(code, reason):
    assert reason in calls(code, tests=[SUMS[0]]).checks[0].reason


def test_each_test_has_its_own_time_limit():
    code = "import time\ndef add(a, b):\n    time.sleep(60 if a < 0 else 0)\n    return a + b"
    assert calls(code, limits=SHORT).checks == (Check(True), Check(False, "stopped at the limit wall_seconds"))


def test_endless_output_fails():
    score = programs("while True: print('x' * 1000)", GREETINGS[:1], Limits(wall_seconds=10.0, output_bytes=10_000))
    assert "stopped at the limit output_bytes" in score.checks[0].reason


def test_tests_do_not_see_what_others_wrote():
    code = (
        "import os\ndef add(a, b):\n    seen = os.path.exists('mark')\n    open('mark', 'w').close()\n    return seen"
    )
    assert calls(code, tests=[CallTest((1, 2), False), CallTest((2, 1), False)]).all_passed


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (1, 1, True),
        (1, True, False),
        (True, 1, False),
        (1.0, 1, True),
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.31, 0.3, False),
        (True, 1.0, False),
        (10**400, 1.5, False),
        (float("inf"), float("inf"), True),
        (float("nan"), float("nan"), True),
        ([1, [2]], [1, [2]], True),
        ([1, 2], [2, 1], False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ("1", 1, False),
        (None, False, False),
    ],
)
def test_values_are_equal_as_json_with_a_tolerance_for_fractions(value, expected, same):
    assert same_value(value, expected) is same


def test_tests_and_names_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least one test"):
        programs("print(1)", [])
    with pytest.raises(ValueError, match=r"'import os; os\.x'"):
        calls("", "import os; os.x")
    with pytest.raises(ValueError, match="must be JSON values"):
        CallTest(({1, 2},), 3)


def test_a_program_that_needs_common_names_without_an_import_passes():
    code = (
        "class Solution:\n    def top(self, a: List[int], k: int) -> Optional[int]:\n        return nlargest(k, a)[-1]"
    )
    assert calls(code, "Solution.top", [CallTest(([3, 1, 2], 2), 2)]).all_passed
    assert programs("print(sum(defaultdict(int, a=1).values()), math.gcd(4, 6))", [ProgramTest("", "1 2")]).all_passed
    future = "from __future__ import annotations\nimport sys\nprint(len(sys.argv), __name__)"
    assert programs(future, [ProgramTest("", "1 __main__")]).all_passed


@pytest.mark.parametrize(
    ("returned", "value"),
    [
        ("__import__('numpy').int64(3)", 3),
        ("__import__('numpy').arange(3) / 2", [0.0, 0.5, 1.0]),
        ("__import__('numpy').bool_(True)", True),
        ("{2, 3, 1}", [1, 2, 3]),
        ("[3, 1, 2]", {1, 2, 3}),
        ("{(1, 2): {3}}.values()", [[3]]),
        ("deque([1, 2])", [1, 2]),
        ("Counter('aab')", {"a": 2, "b": 1}),
        ("{1: 'x'}", {"1": "x"}),
        ("range(3)", [0, 1, 2]),
        ("(i * i for i in range(3))", [0, 1, 4]),
        ("__import__('fractions').Fraction(1, 2)", 0.5),
        ("0.30000000001", 0.3),
    ],
)
def test_values_of_common_types_are_taken(returned, value):
    assert calls(f"def give():\n    return {returned}", "give", [CallTest((), value)]).all_passed


@pytest.mark.parametrize(("returned", "value"), [("[2, 1]", [1, 2]), ("[1, 1, 2]", {1, 2}), ("'3'", 3), ("1.5", 1)])
def test_values_that_differ_are_refused(returned, value):
    assert not calls(f"def give():\n    return {returned}", "give", [CallTest((), value)]).all_passed


@pytest.mark.parametrize(
    ("printed", "stdout", "right"),
    [
        ("0.5", "0.50", True),
        ("x = 0.3333333333", "x = 0.33333333", True),
        ("1e-3", "0.001", True),
        ("3.0", "3", True),
        ("0.5", "0.51", False),
        ("12", "12.5", False),
        ("07", "7", False),
        ("1  2", "1 2", False),
        ("1 2", "1\n2", False),
        ("1.0 2", "1 3", False),
    ],
)
def test_printed_fractions_agree_in_value_and_all_else_to_the_letter(printed, stdout, right):
    assert programs(f"print({printed!r})", [ProgramTest("", stdout)]).all_passed is right


def test_several_outputs_may_be_right_and_a_checker_may_decide():
    assert programs("print('YES')", [ProgramTest("", "yes", accepted=("Yes", "YES"))]).all_passed
    assert calls("def f(): return [2, 1]", "f", [CallTest((), [1, 2], accepted=([2, 1],))]).all_passed
    roots = CallTest((), 1.41421, check=lambda found: abs(found * found - 2) < 1e-3)
    assert calls("def f(): return -1.4142", "f", [roots]).all_passed
    assert not calls("def f(): return 1.5", "f", [roots]).all_passed
    assert programs("print(7)", [ProgramTest("", "3", check=lambda text: int(text) % 2 == 1)]).all_passed


def test_a_check_that_breaks_at_what_is_right_says_nothing_and_at_other_output_says_no():
    odd = ProgramTest("", "3", check=lambda text: int(text) % 2 == 1)
    assert not programs("print('seven')", [odd]).all_passed
    with pytest.raises(VerifierError, match="breaks at what is right, 'three'"):
        programs("print('seven')", [ProgramTest("", "three", check=odd.check)])
