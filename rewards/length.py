"""Length penalty: answers may run to a soft limit for free and to a hard limit at a rising price."""


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
    return -min(max(length - soft, 0) / (hard - soft), 1.0)
