"""The verifiers of reasoning-gym as functions by name, for questions of its datasets that come from a file."""

from collections.abc import Callable, Mapping
from typing import Any

import reasoning_gym

Verifier = Callable[[str, Mapping[str, Any]], float]
"""Takes an answer and the question's entry; returns the mark, in [0, 1]."""


def gym_verifier(name: str) -> Verifier:
    """The verifier of a dataset. An entry is what the dataset yields: question, answer and metadata.

    Less than the full mark also goes to texts that merely contain the answer: train on marks of 1.0 alone. An answer
    on which a verifier breaks has the mark 0.0.

    Raises:
        ValueError: there is no dataset of that name. From the verifier: an entry lacks metadata.
    """
    try:
        score = reasoning_gym.get_score_answer_fn(name)
    except ValueError as error:
        raise ValueError(f"reasoning-gym has no dataset {name!r}: see adapters.datasets.gym_names()") from error

    def verify(answer: str, entry: Mapping[str, Any]) -> float:
        if missing := {"question", "answer", "metadata"} - entry.keys():
            raise ValueError(f"an entry of reasoning-gym's {name} lacks {', '.join(sorted(missing))}")
        try:
            return float(score(answer, dict(entry)))
        except Exception:  # a verifier that cannot parse what a model wrote
            return 0.0

    return verify
