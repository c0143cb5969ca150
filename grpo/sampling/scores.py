"""Reward parts that a recipe weighs or reports must come."""

from collections.abc import Iterable

from trimtab.grpo.config import Config
from trimtab.rollout.types import Group

ENOUGH = 32
"""Answered episodes of a domain in which a part must have come once."""
ALWAYS = frozenset({"length"})
"""Parts that every domain has."""


class PartMissing(RuntimeError):
    """A part that is weighed or reported has never come: its name is wrong, or the reward does not give it."""


class ExpectedParts:
    """What parts have come, by domain."""

    def __init__(self, config: Config):
        self._asked = {
            name: {domain.score, *(part for part, weight in domain.weights.items() if weight)} - ALWAYS
            for name, domain in config.domains.items()
        }
        self._weighed = {name: {*domain.weights} - ALWAYS for name, domain in config.domains.items()}
        self._came: dict[str, set[str]] = {name: set() for name in config.domains}
        self._answered = dict.fromkeys(config.domains, 0)

    def add(self, groups: Iterable[Group]) -> None:
        """Look at what was played.

        Raises:
            PartMissing: a part has not come in so many answers, or none that trains has.
        """
        for group in groups:
            for episode in group.episodes:
                if episode.ended == "done":
                    self._came[group.domain] |= episode.rewards.keys()
                    self._answered[group.domain] += 1
        for domain, answered in self._answered.items():
            came, asked = self._came[domain], self._asked[domain]
            missing = sorted(asked - came)
            none_trains = bool(answered) and bool(self._weighed[domain]) and not self._weighed[domain] & came
            if missing and (answered >= ENOUGH or none_trains):
                found = ", ".join(map(repr, sorted(came))) or "none"
                raise PartMissing(
                    f"domain {domain}: no answer of {answered} has the reward part {missing[0]!r}, which its weights "
                    f"or its score name; the parts that came are {found}: mend the name, or the reward"
                )
