"""How sure a difference between two evaluations is."""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import NormalDist, fmean, stdev


def paired_interval(
    before: Sequence[float], after: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean difference of paired values with its interval: d +- z sd(d_i) / sqrt(n), d_i = after_i - before_i.

    The pairs are the same prompts, each value a mean over its samples: how hard a prompt is cancels out. The interval
    is the normal one; below some thirty pairs it is too narrow.

    Returns:
        (difference, low, high)

    Raises:
        ValueError: fewer than two pairs, or an unequal number.

    >>> paired_interval([0.0, 0.0], [1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"an interval needs two pairs or more, got {len(before)} values before, {len(after)} after")
    differences = [last - first for first, last in zip(before, after, strict=True)]
    middle = fmean(differences)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * stdev(differences) / sqrt(len(differences))
    return middle, middle - half, middle + half


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float] | None:
    """The normal interval of a mean over prompts, m +- z sd / sqrt(n); None for fewer than two.

    >>> mean_interval([0.5, 0.5])
    (0.5, 0.5)
    """
    if len(values) < 2:
        return None
    half = NormalDist().inv_cdf((1 + confidence) / 2) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def paired_by_prompt(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float, float]:
    """paired_interval of the prompts that both evaluations hold, by name.

    Raises:
        ValueError: they share fewer than two.
    """
    shared = [prompt for prompt in before if prompt in after]
    return paired_interval([before[prompt] for prompt in shared], [after[prompt] for prompt in shared])
