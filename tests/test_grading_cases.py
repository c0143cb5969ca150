"""A hundred answers are graded right (benchmarks/grading.py tells how many an earlier version graded right)."""

import asyncio
from typing import Any

import pytest
from grading_cases import CASES, Case

from trimtab.rewards.answers import exact, final_answer, mathematics, numeric
from trimtab.rewards.code import code_block
from trimtab.rewards.constraints import constraint


def verdict(case: Case) -> Any:
    match case.kind:
        case "maths":
            return asyncio.run(mathematics(case.text, case.truth, seconds=30.0)) == 1.0
        case "number":
            return numeric(case.text, case.truth)
        case "exact":
            return exact(final_answer(case.text), case.truth)
        case "code":
            return code_block(case.text) == case.truth
        case kind:
            return constraint(kind, **case.truth).check(case.text).passed


def test_there_are_a_hundred_of_every_kind():
    assert len(CASES) == 100 and len({(case.kind, case.text, str(case.truth)) for case in CASES}) == 100
    assert sum(not case.right for case in CASES) > 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.text[:24]}")
def test_a_case_is_graded_right(case):
    assert verdict(case) is case.right
