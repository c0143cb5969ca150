"""Agent tasks: questions about a key-value store, answered with tools, over one or two user messages.

A second user message follows in half of the tasks. It makes the policy's earlier thinking disappear from its context,
while tool calls, tool results and answers stay.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trimtab.environments.base import Message, Step, ToolCall
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.tool import CALCULATE, calculate, run_tool, store_tools

KEYS = ("apple", "corn", "fig", "kiwi", "lime", "nut", "pear", "plum")
MAX_VALUE = 99
MAX_MESSAGES = 8
"""Assistant messages of one episode; with the last one the episode is over."""
MAX_CALLS = 4
"""Calls of one assistant message that are carried out."""
SYSTEM = "Tools: get(key), put(key, value), calculate(expression)."
PREVIOUS = "it"
"""The operand that stands for the value of the previous goal."""

_SIGNS = {"plus": "+", "minus": "-"}


@dataclass(frozen=True, slots=True)
class Goal:
    """What one user message asks for.

    operands are keys, numbers or PREVIOUS; sign joins two of them. Where put names a key, the value has to be
    stored there; otherwise it has to be the answer.
    """

    text: str
    operands: tuple[str | int, ...]
    sign: str = ""
    put: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(operand for operand in self.operands if isinstance(operand, str) and operand != PREVIOUS)

    def expression(self, numbers: Mapping[str, int]) -> str:
        """The calculation, with the numbers that stand for keys and for PREVIOUS."""
        return self.sign.join(
            str(numbers[operand] if isinstance(operand, str) else operand) for operand in self.operands
        )


@dataclass(frozen=True, slots=True)
class Habits:
    """What the demonstrator does not forget on one goal. Reinforcement has to find out that each habit pays."""

    looks_up: bool = True
    calculates: bool = True
    stores: bool = True


class AgentEnv:
    """One conversation over one store. Reward part "outcome": the share of user messages dealt with correctly."""

    def __init__(self, values: Mapping[str, int], goals: Sequence[Goal]) -> None:
        self.store = dict(values)
        self.tools = (CALCULATE, *store_tools(self.store))
        self._goals = tuple(goals)
        self._values = _right_values(values, goals)
        self._reached = 0
        self._messages = 0

    async def start(self) -> tuple[Message, ...]:
        return self.open()

    async def step(self, message: Message) -> Step:
        return self.reply(message)

    def open(self) -> tuple[Message, ...]:
        return Message("system", SYSTEM), Message("user", self._goals[0].text)

    def reply(self, message: Message) -> Step:
        """Carry out the message's calls; without calls, take it as the answer to the current user message."""
        self._messages += 1
        exhausted = self._messages >= MAX_MESSAGES
        if message.tool_calls:
            results = tuple(Message("tool", self._run(i, call)) for i, call in enumerate(message.tool_calls))
            return Step(replies=results, rewards={"outcome": 0.0}, done=exhausted)
        outcome = float(self._achieved(message.content)) / len(self._goals)
        self._reached += 1
        if exhausted or self._reached == len(self._goals):
            return Step(rewards={"outcome": outcome}, done=True)
        return Step(replies=(Message("user", self._goals[self._reached].text),), rewards={"outcome": outcome})

    def _run(self, position: int, call: ToolCall) -> str:
        if position >= MAX_CALLS:
            return f"error: at most {MAX_CALLS} calls at a time"
        return run_tool(self.tools, call)

    def _achieved(self, answer: str) -> bool:
        goal, value = self._goals[self._reached], self._values[self._reached]
        return self.store.get(goal.put) == value if goal.put else answer.strip() == str(value)


class AgentTask:
    """Draws conversations; two tasks share a prompt only if both are held out or neither is."""

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], AgentEnv]:
        values, goals = _draw(rng, held_out=held_out)
        return lambda: AgentEnv(values, goals)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        """A conversation in which about four of ten answers come from a bad habit: guessing, or not storing."""
        values, goals = _draw(rng, held_out=False)
        habits = [Habits(rng.random() < 0.8, rng.random() < 0.8, rng.random() < 0.7) for _ in goals]
        return demonstrate(AgentEnv(values, goals), goals, habits, rng)


def demonstrate(
    env: AgentEnv, goals: Sequence[Goal], habits: Sequence[Habits], rng: random.Random
) -> tuple[Message, ...]:
    """Act out the goals in env, with real tool results; the last message is the assistant's."""
    messages = list(env.open())

    def say(reasoning: str, *calls: ToolCall, content: str = "") -> list[str]:
        message = Message("assistant", content, reasoning, calls)
        replies = env.reply(message).replies
        messages.extend([message, *replies])
        return [reply.content for reply in replies]

    value = 0
    for goal, habit in zip(goals, habits, strict=True):
        value = _work_out(goal, habit, value, say, rng)
        if not goal.put:
            say(f"It is {value}.", content=str(value))
            continue
        if habit.stores:
            say("Now put.", ToolCall("put", {"key": goal.put, "value": value}))
        say("Done.", content="done")
    return tuple(messages)


def _work_out(goal: Goal, habit: Habits, previous: int, say: Callable[..., list[str]], rng: random.Random) -> int:
    """The value the demonstrator believes in: right when it looks up and calculates, else a guess."""
    if goal.keys and not habit.looks_up:
        return rng.randint(1, MAX_VALUE)
    numbers = {PREVIOUS: previous}
    if goal.keys:
        found = say(f"I need {' and '.join(goal.keys)}.", *(ToolCall("get", {"key": key}) for key in goal.keys))
        numbers |= zip(goal.keys, map(int, found), strict=True)
    expression = goal.expression(numbers)
    if not goal.sign:
        return int(expression)
    if not habit.calculates:
        return int(calculate(expression)) + rng.choice((-10, -2, -1, 1, 2, 10))
    (result,) = say("Now calculate.", ToolCall("calculate", {"expression": expression}))
    return int(result)


def _draw(rng: random.Random, *, held_out: bool) -> tuple[dict[str, int], tuple[Goal, ...]]:
    values = {key: rng.randint(1, MAX_VALUE) for key in KEYS}
    while True:
        first = _first_goal(rng)
        if is_held_out(first.text) == held_out:
            break
    goals = (first, _next_goal(rng, first)) if rng.random() < 0.5 else (first,)
    return values, goals


def _first_goal(rng: random.Random) -> Goal:
    one, two = rng.sample(KEYS, 2)
    if rng.random() < 0.2:
        return Goal(f"What is {one}?", (one,))
    word = rng.choice(tuple(_SIGNS))
    return Goal(f"What is {one} {word} {two}?", (one, two), _SIGNS[word])


def _next_goal(rng: random.Random, first: Goal) -> Goal:
    key = rng.choice([key for key in KEYS if key not in first.operands])
    word = rng.choice(tuple(_SIGNS))
    return rng.choice(
        [
            Goal(f"Put it in {key}.", (PREVIOUS,), put=key),
            Goal(f"Put the double of it in {key}.", (PREVIOUS, 2), "*", put=key),
            Goal(f"And {word} {key}?", (PREVIOUS, key), _SIGNS[word]),
        ]
    )


def _right_values(values: Mapping[str, int], goals: Sequence[Goal]) -> tuple[int, ...]:
    right: list[int] = []
    for goal in goals:
        numbers = {**values, PREVIOUS: right[-1]} if right else values
        right.append(int(calculate(goal.expression(numbers))))
    return tuple(right)
