"""The ledger: which prompts a step drew, and what became of each."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from trimtab.grpo.batch import Trajectory
from trimtab.grpo.sampling.mixture import Draw
from trimtab.rollout.types import Episode, Group


def ledger_row(
    step: int, draws: Sequence[Draw], groups: Iterable[Group], batch: Iterable[Trajectory]
) -> dict[str, Any]:
    """One line of ledger.jsonl: for every draw, in order, its prompt and sampled tokens as digests and how many of its
    episodes trained; a group that was lost has no tokens."""
    played = {group.name: group for group in groups}
    trained = Counter(trajectory.name for trajectory in batch)
    prompts = []
    for draw in draws:
        group = played.get(draw.name)
        row = {"name": draw.name, "domain": draw.domain, "episodes": 0, "trained": 0}
        if group is not None:
            row |= {
                "episodes": len(group.episodes),
                "trained": sum(trained[episode.name] for episode in group.episodes),
                "prompt": _digest([group.episodes[0]], sampled=False),
                "tokens": _digest(group.episodes, sampled=True),
            }
        prompts.append(row)
    return {"step": step, "prompts": prompts}


def _digest(episodes: Iterable[Episode], *, sampled: bool) -> str:
    """Of the opening's tokens, or of all tokens of all segments."""
    found = hashlib.sha256()
    for episode in episodes:
        for segment in episode.segments if sampled else episode.segments[:1]:
            end = len(segment.token_ids) if sampled else int(segment.sampled.argmax())
            found.update(segment.token_ids[:end].tobytes())
    return found.hexdigest()[:16]
