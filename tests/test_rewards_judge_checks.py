import asyncio
import math
import random

import pytest

from trimtab.rewards.judging.agreement import accuracy, cohen_kappa, length_bias, position_flips

T, F = True, False


@pytest.mark.parametrize(
    ("verdicts", "labels", "share", "kappa"),
    [
        ([T, T, F, F], [T, T, F, F], 1.0, 1.0),
        ([F, F, T, T], [T, T, F, F], 0.0, -1.0),
        ([T, F, T, F], [T, T, F, F], 0.5, 0.0),
        ([T, T, T, T], [T, T, T, F], 0.75, 0.0),  # always yes agrees often, and by chance alone
        # p = 0.7; yes shares 0.5 and 0.6, e = 0.3 + 0.2 = 0.5, kappa = 0.2 / 0.5
        ([T] * 5 + [F] * 5, [T] * 4 + [F] + [T] * 2 + [F] * 3, 0.7, 0.4),
    ],
)
def test_agreement_and_agreement_beyond_chance(verdicts, labels, share, kappa):
    assert accuracy(verdicts, labels) == pytest.approx(share)
    assert cohen_kappa(verdicts, labels) == pytest.approx(kappa)


@pytest.mark.parametrize(("verdicts", "labels"), [([], []), ([T, T], [T, T])])
def test_kappa_is_undefined_where_chance_is_perfect(verdicts, labels):
    assert math.isnan(cohen_kappa(verdicts, labels))


def test_length_bias_is_the_correlation_within_each_truth():
    # True: lengths 1, 3 verdicts no, yes; false: 10, 30, no, yes. Centred lengths -1, 1, -10, 10, verdicts all +-0.5:
    # correlation (0.5 + 0.5 + 5 + 5) / sqrt(202 * 1)
    bias = length_bias([F, T, F, T], [T, T, F, F], [1, 3, 10, 30])
    assert bias == pytest.approx(11 / math.sqrt(202))
    assert length_bias([T, F, T, F], [T, T, F, F], [1, 3, 10, 30]) == pytest.approx(-11 / math.sqrt(202))


def test_that_true_answers_are_longer_is_no_length_bias():
    lengths = [8, 9, 8, 9, 1, 2, 1, 2]
    assert length_bias([T, T, F, F, F, F, T, T], [T] * 4 + [F] * 4, lengths) == pytest.approx(0)  # errors at any length
    assert math.isnan(length_bias([T] * 4 + [F] * 4, [T] * 4 + [F] * 4, lengths))  # nothing but the truth decides


def test_a_judge_that_pays_for_length_shows():
    rng = random.Random(0)
    labels = [rng.random() < 0.5 for _ in range(400)]
    lengths = [rng.randrange(100) for _ in labels]
    fair = [label if rng.random() < 0.8 else not label for label in labels]
    bought = [label or length > 60 for label, length in zip(labels, lengths, strict=True)]
    assert abs(length_bias(fair, labels, lengths)) < 0.15 < 0.4 < length_bias(bought, labels, lengths)


@pytest.mark.parametrize(
    ("prefer", "flips"),
    [
        (lambda first, second: "first", [T, T]),
        (lambda first, second: "first" if len(first) > len(second) else "second", [F, F]),
        (lambda first, second: "tie", [F, F]),
        (lambda first, second: "tie" if first == "a" else "first", [T, T]),
    ],
)
def test_a_verdict_that_goes_by_the_place_flips(prefer, flips):
    async def asked(task: str, first: str, second: str):
        return prefer(first, second)

    assert asyncio.run(position_flips([("write", "a", "bcd"), ("write", "a", "bc")], asked)) == flips


def test_verdicts_without_counterparts_are_refused():
    with pytest.raises(ValueError, match="2 verdicts and 1"):
        length_bias([T, F], [T, F], [1.0])
