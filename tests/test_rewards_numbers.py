from fractions import Fraction

import pytest

from trimtab.rewards.numbers import settled_number

GIVEN = (12, 30)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("42.", 42),
        ("= 42.", 42),
        ("12 + 30 = 42", 42),
        ("The sum of 12 and 30 is **42** apples.", 42),
        (r"\(12 + 30 = 42\), so the answer is $\boxed{42}$.", 42),
        ("10 + 30 = 40, then 40 + 2 = 42. The answer is 42.", 42),
        ("1. 12 + 30 = 42\n2. The answer: 42", 42),
        ("Step 1: add 12 and 30.\nThat is 42!", 42),
        ("12 - 30 = -18", -18),
        ("12 \u2212 30 = \u221218", -18),
        ("12-30=-18", -18),
        ("It is 1,234.50 dollars", Fraction(2469, 2)),
        ("$1,234", 1234),
        (r"12 \times 30 = 360", 360),
        ("12 x 30 = 360", 360),
        ("12 * 30 / 4 + 2 = 92", 92),
        ("12 + 30 = 41", 41),  # wrong, but settled
        ("12 and 30", 30),
    ],
)
def test_a_text_settles_on_its_last_number(text, number):
    assert settled_number(text, GIVEN) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "forty-two",
        "41 or 42",
        "Maybe 42.",
        "Is it 42?",
        "It could be 42.",
        "41, 42",
        "40 41 42",
        "41 = 41, 42 = 42",
        "12 + 30 = 41. No, 12 + 30 = 42.",
        "The answer is 41. The answer is 42.",
        "10 + 30 = 50, 50 - 8 = 42",  # a wrong step
        "42%",
        "the 42nd",
        "1.2.42",
        "42/0 = 42 and 7",
        "\n".join(f"{i}. {i}" for i in range(1, 43)),
    ],
)
def test_hedges_lists_and_second_results_leave_nothing(text):
    assert settled_number(text, GIVEN) is None


def test_numbers_of_the_question_are_given_whatever_their_sign():
    assert settled_number("12 + (-30) = -18", GIVEN) == -18
    assert settled_number("12 + (-30) = -18") is None
