"""Six small domains that a policy of two million parameters can learn: mathematics, logic, programming, an agent, an
agent that mends programs, and one that searches. Demonstrations have a bad habit each, which RL can take away.
"""

import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.environments.base import Message, ToolCall
from trimtab.environments.split import is_held_out
from trimtab.environments.tasks.reasoning import DATASETS, ReasoningTask
from trimtab.environments.tools.functions import ToolEnv, tool
from trimtab.environments.tools.search import SYSTEM, SearchTask, page_text, search_text, search_tools
from trimtab.environments.tools.tool import opening
from trimtab.grpo.config import Domain, LossSettings
from trimtab.rewards.code import CallTest, call_score
from trimtab.rewards.sandbox import Limits, run, scratch

LIMITS = Limits(wall_seconds=5.0)
HABIT = 1 / 3
"""Share of the demonstrations that guess."""


class MathematicsTask(ReasoningTask):
    """Greatest common divisors, and numbers of primes."""

    def __init__(self) -> None:
        super().__init__({name: DATASETS[name] for name in ("gcd", "count_primes")})


class LogicTask(ReasoningTask):
    """Numbers that a condition keeps, and turns of a square."""

    def __init__(self) -> None:
        super().__init__({name: DATASETS[name] for name in ("number_filtering", "rotate_matrix")})


@dataclass(frozen=True, slots=True)
class Program:
    """f(x) = factor * x + term, in two lines."""

    factor: int
    term: int

    @classmethod
    def draw(cls, rng: random.Random) -> "Program":
        return cls(rng.randint(2, 9), rng.randint(1, 9))

    @property
    def wish(self) -> str:
        return f"Write f(x): take x {self.factor} times, then add {self.term}."

    @property
    def code(self) -> str:
        return f"def f(x):\n    x = {self.factor} * x\n    return x + {self.term}"

    async def is_met(self, code: str, x: int) -> bool:
        """Whether the code does the same to x."""
        return (await call_score(code, "f", [CallTest((x,), self.factor * x + self.term)], limits=LIMITS)).all_passed


class ProgrammingTask:
    """A function to write. Reward part "outcome": 1.0 if it gives the right value for an x that nobody has seen."""

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        program, x = _program(rng, held_out=held_out), rng.randint(100, 999)

        async def reward(message: Message) -> Mapping[str, float]:
            return {"outcome": float(await program.is_met(message.content, x))}

        return lambda: ToolEnv(program.wish, (), reward)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        program = _program(rng, held_out=False)
        written = Program.draw(rng) if rng.random() < HABIT else program
        thought = f"{program.factor} times, and {program.term} more."
        return Message("user", program.wish), Message("assistant", written.code, thought)


class MendingTask:
    """A function that adds the wrong number, and a value that it should give; a tool runs it in the sandbox. Reward
    part "outcome" as of ProgrammingTask."""

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], ToolEnv]:
        right, wrong, x = _broken(rng, held_out=held_out)
        unseen = rng.randint(100, 999)

        async def reward(message: Message) -> Mapping[str, float]:
            return {"outcome": float(await right.is_met(message.content, unseen))}

        return lambda: ToolEnv(_complaint(right, wrong, x), [_runner(wrong)], reward, max_messages=4)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        right, wrong, x = _broken(rng, held_out=False)
        messages = list(opening(_complaint(right, wrong, x), [_runner(wrong)]))
        if rng.random() < HABIT:
            guess = Program(right.factor, rng.randint(1, 9))
            return (*messages, Message("assistant", guess.code, "I guess."))
        gave, wanted = (one.factor * x + one.term for one in (wrong, right))
        messages.append(Message("assistant", "", "I run it.", (ToolCall("run", {"x": x}),)))
        messages.append(Message("tool", str(gave)))
        found = f"{gave} by {wanted - gave:+d} is {wanted}. {wrong.term} by {wanted - gave:+d} is {right.term}."
        return (*messages, Message("assistant", right.code, found))


class LookingUpTask(SearchTask):
    """A fact on a page that has to be found first."""

    def __init__(self) -> None:
        super().__init__(ask=lambda world, rng: world.question(rng, hops=1), max_messages=6)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        question = self._draw(rng, held_out=False)
        (entity,), (relation,) = question.entities, question.relations
        messages = list(opening(question.text, search_tools(self.index), SYSTEM))
        if rng.random() < HABIT:
            guess = rng.choice([one for one in self.world.entities.values() if relation in one.facts])
            return (*messages, Message("assistant", guess.facts[relation], "I guess."))
        for thought, name, arguments, result in (
            ("I search.", "search", {"query": entity.name, "k": 1}, search_text(self.index, entity.name, 1)),
            ("I open it.", "open", {"id": entity.id}, page_text(self.index, entity.id)),
        ):
            messages += [Message("assistant", "", thought, (ToolCall(name, arguments),)), Message("tool", result)]
        return (*messages, Message("assistant", question.answer, f"Its {relation}."))


def _program(rng: random.Random, *, held_out: bool) -> Program:
    while True:
        program = Program.draw(rng)
        if is_held_out(program.wish) == held_out:
            return program


def _broken(rng: random.Random, *, held_out: bool) -> tuple[Program, Program, int]:
    """What a function should be, what it is, and an argument that tells them apart."""
    while True:
        right, wrong, x = Program.draw(rng), Program.draw(rng), rng.randint(1, 5)
        wrong = Program(right.factor, wrong.term)
        if wrong != right and is_held_out(_complaint(right, wrong, x)) == held_out:
            return right, wrong, x


def _complaint(right: Program, wrong: Program, x: int) -> str:
    return f"{wrong.code}\nf({x}) should be {right.factor * x + right.term}. Mend it."


def _runner(program: Program) -> Any:
    async def run_program(x: int) -> str:
        """Run f.

        Args:
            x: Its argument.
        """
        async with scratch() as folder:
            code = f"{program.code}\nprint(f({x}))"
            result = await run([sys.executable, "-I", "-c", code], folder=folder, limits=LIMITS)
        return (result.stdout or result.stderr).strip()

    run_program.__name__ = "run"
    return tool(run_program)


def domains() -> dict[str, Domain]:
    """Eight: mathematics and logic are answered with thinking and without."""

    def domain(task: str, *, thinking: bool = True, demonstrations: float = 1.0, speaks: bool = False) -> Domain:
        return Domain(
            task=task if ":" in task else f"{__file__}:{task}",
            thinking=thinking,
            demonstrations=demonstrations,
            weights={"outcome": 1.0, "length": 0.2} | ({"language": 0.3} if speaks else {}),
            loss=LossSettings(beta=0.01),
            length_soft=96,
            length_hard=192,
            max_turns=6,
        )

    return {
        "mathematics": domain("MathematicsTask", speaks=True),
        "logic": domain("LogicTask", speaks=True),
        "programming": domain("ProgrammingTask"),
        "agent": domain("trimtab.environments.tasks.agent:AgentTask"),
        "mending": domain("MendingTask"),
        "searching": domain("LookingUpTask"),
        "mathematics_direct": domain("MathematicsTask", thinking=False, demonstrations=0.5),
        "logic_direct": domain("LogicTask", thinking=False, demonstrations=0.5),
    }
