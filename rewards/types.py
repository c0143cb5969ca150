"""What rewards are functions of: one answer, the answers of a group, the segments of an episode."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


class VerifierError(Exception):
    """A verifier broke on what is right as well: nothing can be said about the answer, which is void and no zero."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the policy, or one segment of an episode, as a reward sees it.

    length is in tokens, reasoning included; rewards holds the named, unweighted parts given so far.
    """

    text: str
    reasoning: str = ""
    length: int = 0
    rewards: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """The verdict of a program on a text; reason says why it failed and is empty where it passed."""

    passed: bool
    reason: str = ""

    @property
    def score(self) -> float:
        """1.0 where the text passed, else 0.0."""
        return float(self.passed)


Reward = Callable[[Answer], float]
"""Scores one answer by itself."""
GroupReward = Callable[[Sequence[Answer]], Sequence[float]]
"""Compares the answers to one prompt; one value for each, in their order."""
ProcessReward = Callable[[Sequence[Answer]], Sequence[float]]
"""Scores the segments of one episode, in the order they were played; one value for each."""


def group_values(reward: GroupReward | ProcessReward, answers: Sequence[Answer]) -> tuple[float, ...]:
    """What the reward gives to the answers.

    Raises:
        ValueError: the reward did not return one finite value for each answer.
    """
    values = tuple(float(value) for value in reward(answers))
    name = getattr(reward, "__name__", repr(reward))
    if len(values) != len(answers):
        raise ValueError(f"{name} must return one value for each of {len(answers)} answers, got {len(values)}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name} must return finite numbers, got {values}")
    return values


def named_parts(parts: object) -> dict[str, float]:
    """The parts of a reward; a value is anything that float takes, of numpy and torch too, but no text.

    Raises:
        ValueError: something else than names with finite numbers.
    """
    if not isinstance(parts, Mapping):
        raise ValueError(f'a reward returns named parts, such as {{"outcome": 1.0}}, got {parts!r}')
    found = {}
    for name, value in parts.items():
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not isinstance(name, str) or not math.isfinite(number):
            raise ValueError(f"a part of a reward is a name with a finite number, got {name!r}: {value!r}")
        found[name] = number
    return found
