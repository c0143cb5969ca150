import asyncio
import random
import re

import pytest

from trimtab.environments.base import Message
from trimtab.environments.tasks.arithmetic import DigitSumTask, ProductTask, SumTask


def outcome(question, answer: str) -> float:
    step = asyncio.run(question().step(Message("assistant", answer)))
    assert step.done
    return step.rewards["outcome"]


def solve(prompt: str) -> int:
    left, sign, right = re.search(r"(\d+) ([-+*]) (\d+)", prompt).groups()
    return {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[sign]


@pytest.mark.parametrize("task", [SumTask, DigitSumTask, ProductTask])
@pytest.mark.parametrize("held_out", [False, True])
def test_the_right_number_in_a_sentence_earns_the_outcome_and_nothing_else_does(task, held_out):
    rng, task = random.Random(1), task()
    for _ in range(50):
        question = task.sample(rng, held_out=held_out)
        right = solve(question.prompt)
        other = right + 1000  # a number that the question does not name
        for said in (f"{right}", f"The answer is **{right}**.", f"= {right}"):
            assert outcome(question, said) == 1.0
        everything = ", ".join(map(str, range(-99, 199)))
        for said in ("", "no idea", f"{right} or {other}", f"{other}, {right}", f"{right}1", everything):
            assert outcome(question, said) == 0.0


def test_every_environment_of_a_question_opens_with_it():
    question = SumTask().sample(random.Random(2))
    (opening,) = asyncio.run(question().start())
    assert opening == Message("user", question.prompt)


def test_held_out_numbers_are_never_trained_on_in_either_order():
    task, rng = SumTask(), random.Random(3)
    trained = {tuple(sorted(task.sample(rng).given)) for _ in range(3000)}
    held_out = {tuple(sorted(task.sample(rng, held_out=True).given)) for _ in range(1000)}
    assert held_out and not held_out & trained


def test_a_demonstration_is_right():
    asked, said = SumTask().demonstrate(random.Random(4))
    assert said.content == f"The answer is {solve(asked.content)}."
