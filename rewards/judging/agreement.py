"""How far a judge can be trusted: agreement with labels, and the two biases that rewards would train on."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from trimtab.rewards.judging.verdicts import Preference

_SWAPPED: dict[Preference, Preference] = {"first": "second", "second": "first", "tie": "tie"}


def accuracy(verdicts: Sequence[bool], labels: Sequence[bool]) -> float:
    """Share of verdicts that equal their labels; nan without any."""
    _check_pairs(verdicts, labels)
    return float(np.mean(np.equal(verdicts, labels))) if verdicts else float("nan")


def cohen_kappa(verdicts: Sequence[bool], labels: Sequence[bool]) -> float:
    """Agreement beyond what chance would give: 1 is perfect, 0 is chance.

        kappa = (p - e) / (1 - e),  p = share that agrees,  e = sum over both classes of the product of their shares

    nan where both sides hold one and the same class alone, or nothing: chance would be perfect there.
    Source: J. Cohen, A coefficient of agreement for nominal scales (1960).

    >>> cohen_kappa([True, True, False, False], [True, False, False, False])
    0.5
    """
    _check_pairs(verdicts, labels)
    if not verdicts:
        return float("nan")
    said, true = float(np.mean(verdicts)), float(np.mean(labels))
    chance = said * true + (1 - said) * (1 - true)
    return (accuracy(verdicts, labels) - chance) / (1 - chance) if chance < 1 else float("nan")


def length_bias(verdicts: Sequence[bool], labels: Sequence[bool], lengths: Sequence[float]) -> float:
    """Correlation of verdict and length at equal truth, in [-1, 1]; above 0 the judge favours length.

    Verdicts and lengths are centred within the true and within the false, then correlated over both together: that
    longer answers are truly better is no bias. nan where one of them does not vary within a class.
    """
    _check_pairs(verdicts, labels)
    _check_pairs(verdicts, lengths)
    truth = np.array(labels, bool)
    said, long = np.array(verdicts, float), np.array(lengths, float)
    for of_class in (truth, ~truth):
        if of_class.any():
            said[of_class] -= said[of_class].mean()
            long[of_class] -= long[of_class].mean()
    scale = np.sqrt((said**2).sum() * (long**2).sum())
    return float((said * long).sum() / scale) if scale > 0 else float("nan")


async def position_flips(
    pairs: Sequence[tuple[str, str, str]], prefer: Callable[[str, str, str], Awaitable[Preference]]
) -> list[bool]:
    """Whether the verdict on each pair (task, one answer, another) changes when the two change places.

    Their mean is the position bias: 0 for a judge that reads, towards 1 for one that goes by the place.

    Args:
        prefer: takes task, first and second answer.

    Raises:
        JudgeError: there is no verdict on one of them.
    """

    async def flips(task: str, one: str, other: str) -> bool:
        there, back = await asyncio.gather(prefer(task, one, other), prefer(task, other, one))
        return there != _SWAPPED[back]

    return list(await asyncio.gather(*(flips(*pair) for pair in pairs)))


def _check_pairs(one: Sequence[object], other: Sequence[object]) -> None:
    if len(one) != len(other):
        raise ValueError(f"each verdict needs one counterpart, got {len(one)} verdicts and {len(other)}")
