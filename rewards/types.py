"""What rewards are functions of: one answer, the answers of a group, the segments of an episode."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


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
        ValueError: the reward did not return one value for each answer.
    """
    values = tuple(float(value) for value in reward(answers))
    if len(values) != len(answers):
        name = getattr(reward, "__name__", repr(reward))
        raise ValueError(f"{name} must return one value for each of {len(answers)} answers, got {len(values)}")
    return values
