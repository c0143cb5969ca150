"""Mathematics with the code interpreter: each episode has a Jupyter kernel of its own, in a sandbox.

python examples/interpreter_maths.py                                   shows two episodes with a scripted policy
trimtab train examples/interpreter_maths.py:recipe --model CHECKPOINT  trains on it
"""

import random
import re
from collections.abc import Callable

from trimtab.environments.base import Message, ToolCall
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.functions import ToolEnv
from trimtab.environments.tools.interpreter import Interpreter
from trimtab.grpo.commands.preview import preview
from trimtab.grpo.config import Config, Domain, Rollout
from trimtab.rewards.answers import mathematics
from trimtab.rollout.types import Sampling

SYSTEM = r"Use the tool where it helps. End with the answer in \boxed{}."


class DivisorTask:
    """Sums of divisors. Reward part "outcome": 1.0 when the box holds the right number in any notation, else 0.0."""

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        while True:
            number = rng.randint(10_000, 99_999)
            question = f"What is the sum of all divisors of {number}?"
            if is_held_out(question) == held_out:
                break

        async def reward(message: Message) -> dict[str, float]:
            truth = sum(d for d in range(1, number + 1) if number % d == 0)
            return {"outcome": await mathematics(message.content, str(truth))}

        # an interpreter for each episode: it keeps variables from call to call, and is closed with its environment
        return lambda: ToolEnv(question, [Interpreter(executions=20)], reward, system=SYSTEM)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        raise ValueError("no demonstrations: start from a checkpoint, --model CHECKPOINT")


def recipe() -> Config:
    maths = Domain(task=f"{__file__}:DivisorTask", length_soft=512, length_hard=1024)
    return Config(domains={"maths": maths}, rollout=Rollout(max_len=2048), sampling=Sampling(max_tokens=512))


def say(prompt: str, seed: int) -> Message:
    """A policy that defines the divisors in one call and adds them in another; with an odd seed it forgets one."""
    number = re.findall(r"divisors of (\d+)", prompt)[-1]
    results = re.findall("<result>(.*?)</result>", prompt, re.DOTALL)
    if len(results) == 2:
        return Message("assistant", rf"The sum is \boxed{{{results[1]}}}.", "That is all of them.")
    first = 2 if seed % 2 else 1
    code = f"divisors = [d for d in range({first}, {number} + 1) if {number} % d == 0]"
    call = ToolCall("python", {"code": "sum(divisors)" if results else code})
    return Message("assistant", "", "The kernel remembers them." if results else "I list them.", (call,))


if __name__ == "__main__":
    preview(recipe(), say)
