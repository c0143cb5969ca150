"""The task and the recipe with which rivals.py runs trimtab, and the prompts and rewards that its rivals get too."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from trimtab.environments.base import Message, Step
from trimtab.grpo.config import Config, Domain, LossSettings, Rollout
from trimtab.rewards.types import Answer
from trimtab.rollout.types import Sampling

BETA = 0.001
MINIBATCHES = 2
"""Optimiser steps a batch."""


def question(rng: random.Random) -> str:
    """A prompt; all have the same length in letters."""
    return f"What is {rng.randrange(100, 1000)} + {rng.randrange(100, 1000)}? Think, and give the sum last."


def chances(count: int) -> list[float]:
    """Rewards of a group that differ, whatever was answered."""
    return [i / (count - 1) for i in range(count)]


def chance(answers: Sequence[Answer]) -> list[float]:
    return chances(len(answers))


class SumEnv:
    """Asks, and ends."""

    def __init__(self, text: str) -> None:
        self._text = text

    async def start(self) -> tuple[Message, ...]:
        return (Message("user", self._text),)

    async def step(self, message: Message) -> Step:
        return Step(rewards={"outcome": 0.0}, done=True)


class SumTask:
    """Sums of two numbers, never verified: what is measured is the machinery."""

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], SumEnv]:
        text = question(rng)
        return lambda: SumEnv(text)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        return (Message("user", question(rng)), Message("assistant", "0"))


def recipe() -> Config:
    """Sizes come on the command line."""
    here = str(Path(__file__).resolve())
    return Config(
        domains={
            "sums": Domain(
                task=f"{here}:SumTask",
                weights={"chance": 1.0},
                group_rewards={"chance": f"{here}:chance"},
                loss=LossSettings(beta=BETA),
                thinking=False,
            )
        },
        rollout=Rollout(actors=1, max_num_seqs=256),
        sampling=Sampling(temperature=1.0, top_p=0.95, top_k=64),
        minibatches=MINIBATCHES,
        lr=1e-6,
        steps=10_000,
        save_every=10_000,
        held_out=1,
    )
