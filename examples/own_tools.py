"""An environment with tools of one's own: what it costs to send a parcel.

python examples/own_tools.py                                       shows two episodes with a scripted policy
trimtab train examples/own_tools.py:recipe --model CHECKPOINT      trains on it
"""

import random
import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from trimtab.environments.base import Message, ToolCall
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.functions import ToolEnv, tool
from trimtab.grpo.commands.preview import preview
from trimtab.grpo.config import Config, Domain, Rollout
from trimtab.rollout.types import Sampling

CROWNS = {"Chile": 17, "Japan": 23, "Norway": 9}


def price(kilograms: Annotated[int, Field(ge=1)], country: Literal["Chile", "Japan", "Norway"]) -> int:
    """The price of sending a parcel, in crowns.

    Args:
        kilograms: Its weight.
    """
    return 20 + CROWNS[country] * kilograms


class ParcelTask:
    """Parcels of one depot. Reward part "outcome": 1.0 for the right price alone, else 0.0."""

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        while True:
            parcel, country, weight = rng.randrange(1000), rng.choice(list(CROWNS)), rng.randint(1, 40)
            question = f"What does it cost to send parcel {parcel} to {country}?"
            if is_held_out(question) == held_out:
                break

        def weigh(number: int) -> str:
            """Weigh a parcel by its number."""
            if number != parcel:
                raise ValueError(f"there is no parcel {number}")  # the policy reads this as "error: ..."
            return f"{weight} kg"

        def reward(message: Message) -> dict[str, float]:
            return {"outcome": float(message.content.strip() == str(price(weight, country)))}

        return lambda: ToolEnv(question, [tool(weigh), tool(price)], reward, system="Answer with a number alone.")

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        raise ValueError("no demonstrations: start from a checkpoint, --model CHECKPOINT")


def recipe() -> Config:
    parcels = Domain(task=f"{__file__}:ParcelTask", length_soft=512, length_hard=1024)
    return Config(domains={"parcels": parcels}, rollout=Rollout(max_len=2048), sampling=Sampling(max_tokens=512))


def say(prompt: str, seed: int) -> Message:
    """A policy that weighs, asks for the price and answers; with an odd seed it guesses."""
    number, country = re.findall(r"parcel (\d+) to (\w+)", prompt)[-1]
    match re.findall("<result>(.*?)</result>", prompt):
        case [] if seed % 2:
            return Message("assistant", "50", "I guess.")
        case []:
            return Message("assistant", "", "First its weight.", (ToolCall("weigh", {"number": int(number)}),))
        case [weight]:
            call = ToolCall("price", {"kilograms": int(weight.split()[0]), "country": country})
            return Message("assistant", "", "Now the price.", (call,))
        case [_, crowns]:
            return Message("assistant", crowns, "That is the answer.")


if __name__ == "__main__":
    preview(recipe(), say)
