import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.rewards.length import by_group, kimi_length_rewards, overlong_penalty, relative_penalties
from trimtab.rewards.types import Answer, group_values


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


@pytest.mark.parametrize(
    ("lengths", "correct", "rewards"),
    [
        # min 100, max 300: lambda = 1/2 - (length - 100) / 200
        ([100, 200, 300], [True, True, True], (0.5, 0.0, -0.5)),
        ([100, 200, 300], [False, False, False], (0.0, 0.0, -0.5)),  # short and wrong gains nothing
        ([100, 300], [False, True], (0.0, -0.5)),
        ([50, 50], [True, False], (0.0, 0.0)),
        ([], [], ()),
    ],
)
def test_the_reward_of_kimi_compares_with_the_whole_group(lengths, correct, rewards):
    assert kimi_length_rewards(lengths, correct) == pytest.approx(rewards)


@pytest.mark.parametrize(
    ("lengths", "correct", "slack", "penalties"),
    [
        ([100, 300, 200, 20], [True, True, True, False], 1, (0.0, -1.0, -0.5, 0.0)),
        ([100, 300, 900], [True, True, False], 1, (0.0, -1.0, 0.0)),  # a wrong answer does not set the scale
        ([100, 900], [False, False], 1, (0.0, 0.0)),
        ([900, 100], [True, False], 1, (0.0, 0.0)),
        ([100, 110], [True, True], 100, (0.0, -0.1)),
        ([], [], 1, ()),
    ],
)
def test_the_relative_penalty_compares_correct_answers_only(lengths, correct, slack, penalties):
    assert relative_penalties(lengths, correct, slack=slack) == pytest.approx(penalties)


GROUPS = st.lists(st.tuples(st.integers(0, 9999), st.booleans()), max_size=8)


@given(GROUPS, st.floats(0, 0.99))
def test_with_a_weight_below_one_every_correct_answer_stays_above_every_wrong_one(group, weight):
    penalties = relative_penalties([length for length, _ in group], [right for _, right in group])
    totals = [right + weight * penalty for (_, right), penalty in zip(group, penalties, strict=True)]
    wrong = [total for total, (_, right) in zip(totals, group, strict=True) if not right]
    assert all(total > max(wrong, default=-1) for total, (_, right) in zip(totals, group, strict=True) if right)


@given(GROUPS)
def test_no_wrong_answer_gains_from_its_length(group):
    lengths, correct = [length for length, _ in group], [right for _, right in group]
    for values in (kimi_length_rewards(lengths, correct), relative_penalties(lengths, correct)):
        assert all(value <= 0 for value, right in zip(values, correct, strict=True) if not right)


def test_groups_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="got 2 for 1"):
        kimi_length_rewards([1, 2], [True])
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        relative_penalties([-1, 2], [True, True])
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        relative_penalties([1], [True], slack=0)


def test_a_penalty_becomes_a_group_reward_by_the_part_that_says_what_is_correct():
    answers = [Answer("a", length=10, rewards={"solved": 1.0}), Answer("b", length=30, rewards={"solved": 1.0})]
    answers.append(Answer("c", length=90, rewards={"solved": 0.5}))
    assert group_values(by_group(relative_penalties, part="solved"), answers) == (0.0, -1.0, 0.0)
    with pytest.raises(ValueError, match="needs the reward part 'right' of every answer, got solved"):
        by_group(relative_penalties, part="right")(answers)


def test_a_group_reward_that_loses_an_answer_is_refused():
    def short(answers):
        return [0.0]

    with pytest.raises(ValueError, match="short must return one value for each of 2 answers, got 1"):
        group_values(short, [Answer("a"), Answer("b")])
