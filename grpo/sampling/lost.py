"""What is lost on the way, and when it is too much."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

from trimtab.grpo.config import Config
from trimtab.grpo.sampling.mixture import Draw, PlayedBatch
from trimtab.rollout.types import Lost

ENOUGH = 8
"""Groups of a domain that are looked at together: fewer say too little."""
SHOWN = 3
"""Different reasons that are told."""


class TooManyLost(RuntimeError):
    """Too little of a domain can be scored: a judge, a tool, a reward or the data is broken."""

    def __init__(self, domain: str, share: str, lost: Iterable[Lost]):
        lost = tuple(lost)
        reasons = "; ".join(islice(dict.fromkeys(f"{one.reason} ({one.kind})" for one in lost), SHOWN))
        super().__init__(f"domain {domain}: {share}: {reasons or 'no reason is known'}")
        self.__cause__ = next((one.cause for one in lost if one.cause is not None), None)


class LostGroups:
    """Counts the groups of each domain that were drawn and lost, over its latest steps."""

    def __init__(self, config: Config):
        self._most = {name: domain.max_lost for name, domain in config.domains.items()}
        trained = [name for name, domain in config.domains.items() if domain.prompts]
        self._steps: dict[str, deque[tuple[int, int]]] = {name: deque() for name in trained}

    def add(self, draws: Sequence[Draw], played: PlayedBatch) -> dict[str, float]:
        """Count a step. Returns the share of each domain's groups that it lost, as lost/DOMAIN.

        Raises:
            TooManyLost: over the latest steps a domain has lost more than its max_lost.
        """
        shares = {}
        for name, steps in self._steps.items():
            drawn = sum(draw.domain == name for draw in draws)
            lost = drawn - sum(group.domain == name for group in played.groups)
            shares[f"lost/{name}"] = lost / drawn
            steps.append((drawn, lost))
            while sum(drawn for drawn, _ in islice(steps, 1, None)) >= ENOUGH:
                steps.popleft()
            all_drawn, all_lost = (sum(numbers) for numbers in zip(*steps, strict=True))
            if all_drawn >= ENOUGH and all_lost > self._most[name] * all_drawn:
                share = f"{all_lost} of its latest {all_drawn} groups were lost (max_lost is {self._most[name]:g})"
                raise TooManyLost(name, share, (one for one in played.lost if one.domain == name))
        return shares


def without_advantage(draws: Sequence[Draw], played: PlayedBatch, *, kl: bool) -> str:
    """Why no episode of a step has an advantage, and what trains all the same.

    Args:
        kl: whether the KL of groups with equal rewards pulls.
    """
    groups, lost = len(played.groups), len(draws) - len(played.groups)
    reasons = list(islice(dict.fromkeys(one.reason for one in played.lost), SHOWN))
    parts = [f"{groups} of {len(draws)} groups have equal rewards" if groups else ""]
    parts += [f"{lost} were lost ({'; '.join(reasons)})" if lost else ""]
    return f"{'only the KL' if kl else 'nothing'} trains: {', '.join(filter(None, parts))}"
