"""The learning rate by rollout batch."""


def lr_factor(step: int, *, steps: int, warmup_steps: int, end_share: float) -> float:
    """The learning rate of a rollout batch as a share of lr.

    A linear rise over the warm-up, 1 at batch warmup_steps, and a linear fall to end_share at the last batch, which is
    steps - 1. A run that is all warm-up ends before it reaches 1.

    >>> [lr_factor(step, steps=6, warmup_steps=1, end_share=0.2) for step in range(6)]
    [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = steps - 1 - warmup_steps
    return 1.0 if left < 1 else round(1.0 - (1.0 - end_share) * min(step - warmup_steps, left) / left, 12)
