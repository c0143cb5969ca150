"""Rubrics: an answer earns the weighted share of the criteria that a judge finds satisfied, less its faults.

Here a judge is asked for one yes or no a criterion, which a small model can learn to say; verdicts.py asks for all
verdicts of an answer at once, with reasons.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from trimtab.rewards.format import without_thinking
from trimtab.rewards.guards import escape_markup

_VERDICT = re.compile(
    r"[\s*_>\"'`#]*(yes|no)\b[\s*_\"'`]*(?:\Z|[.,;:!\u2013\u2014-]|(?:because|since|as)\b)", re.IGNORECASE
)
_YES_NO = re.compile(r"\b(?:yes|no)\b", re.I)

Judge = Callable[[str], Awaitable[str]]
"""Takes the text of a prompt, returns the text of a verdict."""


class JudgeError(Exception):
    """The judge gave no usable verdict: nothing can be said about the answer."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One demand on an answer.

    text completes the question "Does it ...?" and is shown to the judge; check, where the demand can be checked by
    a program, is the truth that verdicts are compared with; name is what criteria of the same kind share in reports. A
    weight below 0 is for what an answer must not do: it is taken off where the criterion is met.
    """

    text: str
    weight: float = 1.0
    check: Callable[[str], bool] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("the text of a criterion must not be empty")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(
                f"the weight of criterion {self.text!r} must be above 0, or below for a fault, got {self.weight}"
            )


@dataclass(frozen=True, slots=True)
class Rubric:
    """The criteria of one prompt; at least one with a weight above 0."""

    criteria: tuple[Criterion, ...]

    def __post_init__(self) -> None:
        if not self.criteria:
            raise ValueError("a rubric needs at least one criterion")
        if all(criterion.weight < 0 for criterion in self.criteria):
            raise ValueError("a rubric needs at least one criterion with a weight above 0: there is nothing to earn")


@dataclass(frozen=True, slots=True)
class RubricScore:
    """Verdicts by criterion, with the judge's reasons where it gave any."""

    rubric: Rubric
    verdicts: tuple[bool, ...]
    truths: tuple[bool | None, ...]
    """What the checks say; None for a criterion without one."""
    rationales: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """Weight of the criteria that the judge found satisfied, over the weights above 0, cut to [0, 1]."""
        return _weighted_share(self.rubric.criteria, self.verdicts)

    @property
    def truth(self) -> float | None:
        """The score by the checked criteria alone, in [0, 1]; None when none of a weight above 0 has a check."""
        checked = [(c, truth) for c, truth in zip(self.rubric.criteria, self.truths, strict=True) if truth is not None]
        if not any(c.weight > 0 for c, _ in checked):
            return None
        return _weighted_share([c for c, _ in checked], [truth for _, truth in checked])

    @property
    def agreement(self) -> float | None:
        """Share of verdicts that equal the truth, over the checked criteria; None when none has a check."""
        pairs = [(v, truth) for v, truth in zip(self.verdicts, self.truths, strict=True) if truth is not None]
        return sum(verdict == truth for verdict, truth in pairs) / len(pairs) if pairs else None


class Grader(Protocol):
    """Scores an answer by a rubric; task is what the answer replies to."""

    async def __call__(self, answer: str, rubric: Rubric, *, task: str = "") -> RubricScore:
        """The score of the answer.

        Raises:
            JudgeError: there is no usable verdict.
        """


def judge_prompt(answer: str, criterion: Criterion, *, task: str = "") -> str:
    """The question put to the judge about one criterion; task, when given, is what the answer replies to. Both are
    escaped: what they hold is no markup of the judge's prompt."""
    asked = f"Task: {escape_markup(task)}\n" if task else ""
    return f"{asked}Text: {escape_markup(answer)}\nDoes it {criterion.text}? yes or no"


def parse_verdict(text: str) -> bool:
    """True for "yes", False for "no": the first word behind what the judge thought, in any case, with emphasis or
    punctuation, alone or with a reason behind it.

    Raises:
        ValueError: any other text; a judge that says both has given no verdict.
    """
    said = without_thinking(text)
    first = _VERDICT.match(said)
    if first is None or len({word.lower() for word in _YES_NO.findall(said)}) > 1:
        raise ValueError(f"a verdict begins with yes or no, and has not both, got {text[:200]!r}")
    return first[1].lower() == "yes"


async def rubric_score(answer: str, rubric: Rubric, judge: Judge, *, task: str = "") -> RubricScore:
    """Ask the judge once for each criterion, all at a time.

    Raises:
        JudgeError: a call failed or a verdict was neither yes nor no.
    """
    verdicts = await asyncio.gather(
        *(_ask(judge, judge_prompt(answer, criterion, task=task)) for criterion in rubric.criteria)
    )
    return RubricScore(rubric, tuple(verdicts), truths(answer, rubric))


def truths(answer: str, rubric: Rubric) -> tuple[bool | None, ...]:
    """What the checks of a rubric say of an answer; None for a criterion without a check."""
    return tuple(None if criterion.check is None else criterion.check(answer) for criterion in rubric.criteria)


async def _ask(judge: Judge, prompt: str) -> bool:
    try:
        return parse_verdict(await judge(prompt))
    except Exception as error:  # a judge is a model behind a network: whatever breaks, there is no verdict
        raise JudgeError(f"no verdict on {prompt!r}: {error}") from error


def _weighted_share(criteria: Sequence[Criterion], satisfied: Sequence[bool]) -> float:
    weights = [criterion.weight for criterion in criteria]
    earned = sum(weight for weight, yes in zip(weights, satisfied, strict=True) if yes)
    return min(max(earned / sum(weight for weight in weights if weight > 0), 0.0), 1.0)
