import asyncio
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.rewards.answers import (
    alternatives,
    boxed,
    equivalent,
    exact,
    final_answer,
    mathematics,
    normalised,
    numeric,
    quantity,
)


def same(answer: str | None, truth: str, seconds: float = 30.0) -> bool:
    return asyncio.run(equivalent(answer, truth, seconds=seconds))


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{5}", ("5",)),
        (r"\boxed{\frac{1}{2}} then \fbox {3}", (r"\frac{1}{2}", "3")),
        (r"\boxed{\{1, 2\}}", (r"\{1, 2\}",)),
        (r"\boxed{\boxed{3}}", ("3", r"\boxed{3}")),
        (r"\boxed{1} and \boxed{2", ("1",)),
        ("no box }", ()),
    ],
)
def test_boxes_end_at_the_brace_that_closes_them(text, contents):
    assert boxed(text) == contents


@pytest.mark.parametrize("part", [r"\boxed{", "<answer>", "answer", "answer: ", "*", r"\text{", "1,111", " or ", "1x"])
def test_long_texts_are_read_in_little_time(part):
    start = time.monotonic()
    text = part * 30_000
    boxed(text), final_answer(text), quantity(text), alternatives(text)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, no: \boxed{2}. Answer: 3", "2"),
        ("<answer>1</answer> <answer> 4 </answer> Answer: 3", "4"),
        ("Answer: 3\nAnswer: **7**", "7"),
        ("**Answer:** $x^2$.", "x^2"),
        ("The final answer is 12.", "12"),
        ("answer: 0.5", "0.5"),
        ("所以答案是 8。", "8"),
        ("Answer: ", None),
        ("It is 5, I answered.", None),
    ],
)
def test_the_final_answer_is_the_last_box_then_the_last_tag_then_the_last_answer_line(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "count"),
    [("3", 1), ("3 or 5", 2), ("3; 5", 2), (r"3 \text{ or } 5", 2), ("maybe 3", 1), ("3 or 3", 1), ("1, 2", 1)],
)
def test_alternatives_are_counted_and_parts_of_one_answer_are_not(answer, count):
    assert len(alternatives(answer)) == count


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("Paris", "paris", True),
        (" **New   York**. ", "new york", True),
        ("\uff21", "a", True),  # a full-width letter
        ("Paris or Rome", "Paris", False),
        ("Paris", ["Rome", "Paris"], True),
        ("", "Paris", False),
        (None, "Paris", False),
        ("3.0", "3", False),
    ],
)
def test_exact_answers_agree_after_normalisation(answer, truth, equal):
    assert exact(answer, truth) is equal


@pytest.mark.parametrize("truths", ["", [], ["Paris", " "]])
def test_an_empty_truth_is_refused(truths):
    with pytest.raises(ValueError, match="must not be empty"):
        exact("", truths)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("42", (42.0, "")),
        ("$42$", (42.0, "")),
        ("-1,250.5 km.", (-1250.5, "km")),
        ("7/2", (3.5, "")),
        (r"\frac{7}{2}", (3.5, "")),
        ("2.5e-3", (0.0025, "")),
        (r"2.5 \times 10^{-3} \text{ m}", (0.0025, "m")),
        ("2 x 10^3", (2000.0, "")),
        ("\u22125", (-5.0, "")),
        (r"12\%", (12.0, "%")),
        ("$3.50", (3.5, "$")),
        ("$3 per kg", (3.0, "$ per kg")),
        (".5", (0.5, "")),
        ("3-5", None),
        ("3 5", None),
        ("2^10", (1024.0, "")),
        ("1/0", None),
        ("five", None),
        ("1" * 5000, None),
        ("1e999", None),
    ],
)
def test_a_quantity_is_one_number_and_what_stands_behind_it(text, found):
    assert quantity(text) == (pytest.approx(found) if found and not found[1] else found)


@pytest.mark.parametrize(
    ("answer", "truth", "options", "right"),
    [
        ("3.1416", 3.14159265, {"relative": 1e-3}, True),
        ("3.2", 3.14159265, {"relative": 1e-3}, False),
        ("0.04", 0, {"absolute": 0.05}, True),
        ("1.5 km", 1500, {"units": {"m": 1, "km": 1000}}, True),
        ("1500", 1500, {"units": {"m": 1, "km": 1000}}, True),
        ("1500 ft", 1500, {"units": {"m": 1, "km": 1000}}, False),
        ("12%", 0.12, {"units": {"%": 0.01}}, True),
        ("12%", 12, {}, False),
        ("5 or 6", 5, {}, False),
        ("5 or 6", 5, {"units": {"m": 1}}, False),
        ("nan", 5, {}, False),
        (None, 5, {}, False),
    ],
)
def test_numbers_agree_within_the_tolerance_and_in_a_named_unit(answer, truth, options, right):
    assert numeric(answer, truth, **options) is right


@given(st.floats(-1e9, 1e9), st.floats(0, 1e-3))
def test_a_number_always_equals_itself_as_it_is_printed(value, relative):
    assert numeric(repr(value), value, relative=relative)


@given(st.text(max_size=60))
def test_no_text_breaks_the_readers(text):
    found = quantity(text)
    assert found is None or math.isfinite(found[0])
    answer = final_answer(text)
    assert answer is None or normalised(answer) in normalised(text)
    assert len(alternatives(text)) >= 1
    assert exact(text, "x") is (normalised(text) == "x")


def test_truths_and_tolerances_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="finite, got nan"):
        numeric("1", float("nan"))
    with pytest.raises(ValueError, match="relative -1"):
        numeric("1", 1.0, relative=-1)


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("1/2", "0.5", True),
        (r"\frac12", "1/2", True),
        ("2*sqrt(3)", r"2\sqrt{3}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("0.333333", "1/3", True),
        ("0.3333", "1/3", False),
        ("x = 5", "5", True),
        ("y = 5", "x = 5", False),
        ("x = x", "x = 5", False),
        ("2pi", r"2\pi", True),
        ("3,5", r"\{5,3\}", True),
        ("(1,2)", "(2,1)", False),
        (r"x \le 3", r"(-\infty,3]", True),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        (r"x=3 \vee x=5", "x=5", False),  # math-verify alone takes the last of them
        (r"3\text{ or }5", "5", False),
        ("3 or 5", "3 or 5", True),
        ("5 or 3", "3 or 5", True),
        ("15 or 1", "3 or 5", False),  # the product of the letters would be the same
        ("3", "3 or 5", False),
        ("$x=6/2$ or $x=5$", "x=5 or x=3", True),
        ("3, 5", "3", False),
        ("7 $5$", "5", False),
        (r"it is \frac{1}{2}", r"\frac12", False),
        ("} 5 {", "5", False),
        ("", "5", False),
        (None, "5", False),
        ("1" * 3000, "1", False),
    ],
)
def test_equivalence_is_mathematical_and_hedged_or_garbled_answers_are_wrong(answer, truth, equal):
    assert same(answer, truth) is equal


def test_a_response_is_scored_by_its_final_answer():
    assert asyncio.run(mathematics(r"thus $x=\boxed{0.5}$", "1/2", seconds=30)) == 1.0
    assert asyncio.run(mathematics("thus 0.5", "1/2", seconds=30)) == 0.0


def test_a_comparison_that_hangs_is_wrong_and_its_worker_is_killed_and_replaced():
    assert same("2", "1+1")
    before = children()
    start = time.monotonic()
    assert same("9^{9^{9^9}}", "1", seconds=0.5) is False
    assert time.monotonic() - start < 20
    assert len(children()) <= len(before) and set(before) - set(children())
    assert same("2", "1+1")


def test_other_comparisons_and_the_event_loop_go_on_while_one_hangs():
    async def play() -> tuple[list[bool], int]:
        ticks = 0
        tasks = [asyncio.create_task(equivalent("9^{9^{9^9}}", "1", seconds=1.0))]
        tasks += [asyncio.create_task(equivalent(f"{n}+{n}", str(2 * n), seconds=30)) for n in range(5)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.01)
            ticks += 1
        return [task.result() for task in tasks], ticks

    results, ticks = asyncio.run(play())
    assert results == [False] + [True] * 5
    assert ticks > 20


def test_a_worker_killed_from_outside_does_not_make_an_answer_wrong():
    assert same("2", "1+1")
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    assert same("3", "1+2")


def test_a_truth_that_is_no_mathematics_is_refused():
    with pytest.raises(ValueError, match=r"cannot be read as mathematics: use exact"):
        same("5", r"\frac{1}{")
    with pytest.raises(ValueError, match="at most 2000 characters, got 3000"):
        same("5", "1" * 3000)
    with pytest.raises(ValueError, match="must not be empty"):
        same("5", "$ $ ")
    with pytest.raises(ValueError, match="above 0 seconds, got 0"):
        same("5", "6", seconds=0)


def test_workers_end_with_the_process_that_started_them():
    code = (
        "import asyncio, os\n"
        "from trimtab.rewards.answers import equivalent\n"
        "from trimtab.rewards.reading import equivalence\n"
        "assert asyncio.run(equivalent('2', '1+1', seconds=30))\n"
        "print(equivalence._idle.get().process.pid, flush=True)\n"
        "os._exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(done.stdout)
    for _ in range(200):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.05)
    pytest.fail(f"the worker {pid} outlived its parent")


def children() -> list[int]:
    """The workers that this process runs."""
    processes = psutil.Process().children()
    return [process.pid for process in processes if "trimtab.rewards.reading.math_worker" in process.cmdline()]
