"""A reward of one's own: prices to work out, scored by rules.

python examples/own_rule_reward.py                                    shows two episodes with a scripted policy
trimtab train examples/own_rule_reward.py:recipe --model CHECKPOINT   trains on it
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence

from trimtab.environments.base import Message
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.functions import ToolEnv
from trimtab.grpo.commands.preview import preview
from trimtab.grpo.config import Config, Domain, LossSettings, Rollout
from trimtab.rewards.answers import final_answer, numeric
from trimtab.rewards.guards import empty_thinking, hedges
from trimtab.rewards.language import language_consistency
from trimtab.rewards.types import Answer
from trimtab.rollout.types import Sampling


def score(message: Message, price: float) -> Mapping[str, float]:
    """The parts of the reward, each by its name: what they weigh is the recipe's business."""
    answer = final_answer(message.content)
    right = numeric(answer, price, absolute=0.005, units={"euros": 1, "€": 1, "cents": 0.01})
    return {
        "outcome": float(right and not hedges(message.content)),
        "format": float(answer is not None),
        "language": language_consistency(message.reasoning, "en"),
        "lazy": float(empty_thinking(message.reasoning)),  # logged: the recipe gives it no weight
    }


def shortest_right(answers: Sequence[Answer]) -> Sequence[float]:
    """A group reward: 1.0 for the shortest of the right answers to a prompt."""
    lengths = [answer.length for answer in answers if answer.rewards.get("outcome") == 1.0]
    return [float(answer.rewards.get("outcome") == 1.0 and answer.length == min(lengths)) for answer in answers]


class PriceTask:
    """What several things cost together."""

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        while True:
            count, cents = rng.randint(2, 30), rng.randint(5, 995)
            question = f"What do {count} pens cost at {cents / 100:.2f} euros each? End with: Answer: ..."
            if is_held_out(question) == held_out:
                break
        return lambda: ToolEnv(question, (), lambda message: score(message, count * cents / 100))

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        raise ValueError("no demonstrations: start from a checkpoint, --model CHECKPOINT")


def recipe() -> Config:
    prices = Domain(
        task=f"{__file__}:PriceTask",
        weights={"outcome": 1.0, "format": 0.1, "language": 0.1, "length": 0.2, "shortest": 0.1},
        group_rewards={"shortest": f"{__file__}:shortest_right"},
        length="relative",
        loss=LossSettings(beta=0.0),
    )
    return Config(domains={"prices": prices}, rollout=Rollout(max_len=2048), sampling=Sampling(max_tokens=1024))


def say(prompt: str, seed: int) -> Message:
    """A policy that knows its tables, or with an odd seed cannot make up its mind."""
    count, euros = re.findall(r"do (\d+) pens cost at ([\d.]+)", prompt)[-1]
    price = f"{int(count) * float(euros):.2f} euros"
    thinking = f"I multiply {count} by {euros}, and that makes {price}."
    return Message("assistant", f"Answer: {price}{' or nothing' if seed % 2 else ''}", thinking)


if __name__ == "__main__":
    preview(recipe(), say)
