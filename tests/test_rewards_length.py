import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.rewards.length import overlong_penalty


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (80, 0.0), (81, -0.025), (100, -0.5), (120, -1.0), (5000, -1.0)]
)
def test_the_penalty_is_zero_to_the_soft_limit_and_linear_to_the_hard_one(length, penalty):
    assert overlong_penalty(length, soft=80, hard=120) == pytest.approx(penalty)


@pytest.mark.parametrize(("length", "soft", "hard"), [(1, 80, 80), (1, 90, 80), (1, -1, 80), (-1, 10, 80)])
def test_limits_that_make_no_sense_are_refused(length, soft, hard):
    with pytest.raises(ValueError, match="got"):
        overlong_penalty(length, soft=soft, hard=hard)


@given(st.integers(0, 500), st.integers(0, 100), st.integers(1, 100))
def test_a_longer_answer_never_costs_less(length, soft, room):
    now, longer = (overlong_penalty(n, soft=soft, hard=soft + room) for n in (length, length + 1))
    assert -1.0 <= longer <= now <= 0.0
