"""Length penalties that keep accuracy first: a wrong answer gains nothing by being short."""

from collections.abc import Callable, Sequence

from trimtab.rewards.types import Answer, GroupReward


def overlong_penalty(length: int, *, soft: int, hard: int) -> float:
    """Penalty in [-1, 0] for an answer of length tokens: 0 up to soft, then linear, -1 from hard on.

        penalty = -clip((length - soft) / (hard - soft), 0, 1)

    Source: soft overlong punishment of DAPO, equation 13 (arXiv 2503.14476), with soft = L_max - L_cache and
    hard = L_max.

    Raises:
        ValueError: length or soft is negative, or soft is not below hard.

    >>> overlong_penalty(90, soft=80, hard=120)
    -0.25
    """
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    if not 0 <= soft < hard:
        raise ValueError(
            f"the soft limit must lie in [0, hard): lower soft or raise hard, got soft {soft}, hard {hard}"
        )
    return 0.0 - min(max(length - soft, 0) / (hard - soft), 1.0)  # not -0.0, which logs would show


def kimi_length_rewards(lengths: Sequence[int], correct: Sequence[bool]) -> tuple[float, ...]:
    """Length reward in [-1/2, 1/2] of each answer of a group, relative to the lengths of all of them.

        lambda_i = 1/2 - (length_i - min) / (max - min), min and max over the group
        reward_i = lambda_i where correct, min(0, lambda_i) where wrong; 0 for all when max = min

    A short correct answer is paid, a short wrong one is not, a long one pays either way. Source: Kimi k1.5,
    section 2.3.3 (arXiv 2501.12599); its authors train without it first, then with a constant weight.

    Raises:
        ValueError: the two sequences differ in length, or a length is negative.
    """
    _check_group(lengths, correct)
    if not lengths or max(lengths) == min(lengths):
        return (0.0,) * len(lengths)
    shortest, spread = min(lengths), max(lengths) - min(lengths)
    shares = [0.5 - (length - shortest) / spread for length in lengths]
    return tuple(share if right else min(0.0, share) for share, right in zip(shares, correct, strict=True))


def relative_penalties(lengths: Sequence[int], correct: Sequence[bool], *, slack: int = 1) -> tuple[float, ...]:
    """Penalty in [-1, 0] of each correct answer against the shortest correct one of its group; 0 for wrong answers.

        penalty_i = -(length_i - min_c) / max(max_c - min_c, slack) where correct, else 0

    min_c and max_c are over the correct answers only, so that nothing is charged where none, or one, is correct and
    a wrong answer neither pays nor sets the scale. slack, in tokens, keeps small differences cheap. With a weight
    below that of correctness, every correct answer stays above every wrong one. The length term of Kimi k1.5
    (arXiv 2501.12599, section 2.3.3), shifted to a maximum of 0 and restricted to the correct answers.

    Raises:
        ValueError: the two sequences differ in length, a length is negative, or slack is below 1.

    >>> relative_penalties([100, 300, 200, 20], [True, True, True, False])
    (0.0, -1.0, -0.5, 0.0)
    """
    _check_group(lengths, correct)
    if slack < 1:
        raise ValueError(f"slack must be at least 1 token, got {slack}")
    right = [length for length, is_right in zip(lengths, correct, strict=True) if is_right]
    if not right:
        return (0.0,) * len(lengths)
    spread = max(max(right) - min(right), slack)
    return tuple(
        -(length - min(right)) / spread if is_right else 0.0 for length, is_right in zip(lengths, correct, strict=True)
    )


def by_group(
    penalty: Callable[[Sequence[int], Sequence[bool]], Sequence[float]], *, part: str, threshold: float = 1.0
) -> GroupReward:
    """A group reward from a length penalty: an answer is correct where its reward part is at least threshold.

    The reward raises ValueError for an answer without that part.
    """

    def reward(answers: Sequence[Answer]) -> Sequence[float]:
        for answer in answers:
            if part not in answer.rewards:
                given = ", ".join(answer.rewards) or "none"
                raise ValueError(f"the length penalty needs the reward part {part!r} of every answer, got {given}")
        return penalty([answer.length for answer in answers], [answer.rewards[part] >= threshold for answer in answers])

    return reward


def _check_group(lengths: Sequence[int], correct: Sequence[bool]) -> None:
    if len(lengths) != len(correct):
        raise ValueError(f"a group needs one length for each answer, got {len(lengths)} for {len(correct)}")
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths must not be negative, got {min(lengths)}")
