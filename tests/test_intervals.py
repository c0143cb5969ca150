from math import sqrt

import pytest

from trimtab.grpo.results.intervals import paired_by_prompt, paired_interval


def test_the_interval_is_that_of_the_differences():
    # differences 1, 0, 1, 0: mean 1/2, sample variance (4 * 1/4) / 3 = 1/3, standard error sqrt(1/3 / 4) = 1/sqrt(12)
    half = 1.959963984540054 / sqrt(12)
    found = paired_interval([0, 1, 0, 0.5], [1, 1, 1, 0.5])
    assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-12)


def test_what_all_prompts_share_cancels_out():
    # unpaired, these values have a standard deviation of 0.4; the differences are all 0.1
    assert paired_interval([0.1, 0.5, 0.9], [0.2, 0.6, 1.0]) == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)


def test_another_confidence_has_another_width():
    # 68.27 % is one standard error
    middle, low, high = paired_interval([0, 0], [0, 1], confidence=0.6826894921370859)
    assert (middle, high - middle, middle - low) == pytest.approx((0.5, 0.5, 0.5), abs=1e-9)


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0]), ([1.0, 0.0], [1.0])])
def test_too_few_pairs_are_refused(before, after):
    with pytest.raises(ValueError, match="two pairs or more"):
        paired_interval(before, after)


def test_prompts_are_paired_by_name_and_a_lost_one_is_left_out():
    before, after = {"a": 0.0, "b": 1.0, "lost": 1.0}, {"b": 1.0, "a": 1.0, "new": 0.0}
    assert paired_by_prompt(before, after) == paired_interval([0.0, 1.0], [1.0, 1.0])
