import asyncio
import math
import random
import re

import pytest

from trimtab.environments.base import Message
from trimtab.environments.tasks.reasoning import CHINESE, DATASETS, ReasoningTask, think

TASK = ReasoningTask()


def answered(env, content: str, reasoning: str = "") -> dict[str, float]:
    step = asyncio.run(env.step(Message("assistant", content, reasoning)))
    assert step.done
    return dict(step.rewards)


def question_of(env) -> str:
    return asyncio.run(env.start())[-1].content


def solve(question: str) -> str:
    """Answers from the question's text alone."""
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    if question.startswith("Given a square matrix"):
        degrees, a, b, c, d = numbers
        return f"{c} {a}\n{d} {b}" if degrees == 90 else f"{d} {c}\n{b} {a}"
    if question.startswith("Find"):
        return str(math.gcd(*numbers))
    if question.startswith("Count"):
        return str(sum(n > 1 and all(n % d for d in range(2, n)) for n in range(numbers[0], numbers[1] + 1)))
    limit, *rest = numbers
    matches = [n > limit if "larger" in question else n < limit for n in rest]
    return str([str(n) for n, match in zip(rest, matches, strict=True) if match == question.startswith("Keep")])


@pytest.mark.parametrize("held_out", [False, True])
def test_a_perfect_solver_gets_full_reward(held_out):
    rng = random.Random(1)
    for _ in range(200):
        env = TASK.sample(rng, held_out=held_out)()
        question = question_of(env)
        thought = "容易" if CHINESE in question else "easy"
        assert answered(env, solve(question.removesuffix(CHINESE)), thought) == {"outcome": 1.0, "language": 1.0}


def test_wrong_answers_and_lists_of_candidates_get_no_outcome():
    rng = random.Random(2)
    for _ in range(100):
        env = TASK.sample(rng)()
        right = solve(question_of(env).removesuffix(CHINESE))
        for wrong in ("", "no idea", f"{right} or 7", f"{right}1", "NaN"):
            assert answered(env, wrong)["outcome"] == 0.0


def test_thinking_in_the_other_language_costs_the_language_reward():
    rng = random.Random(3)
    for _ in range(50):
        env = TASK.sample(rng)()
        own, other = ("想", "think") if CHINESE in question_of(env) else ("think", "想")
        assert answered(env, "1", f"{own} {other} {other}")["language"] == pytest.approx(1 / 3)


def test_every_attempt_at_a_task_gets_the_same_question():
    make = TASK.sample(random.Random(4))
    assert question_of(make()) == question_of(make())


def test_all_datasets_are_drawn_and_each_has_its_own_thinking():
    rng = random.Random(5)
    seen = set()
    for _ in range(100):
        _, item = TASK._draw(rng, held_out=False)
        seen.add(item["metadata"]["source_dataset"])
        assert think(item)
    assert seen == set(DATASETS) and len(seen) >= 4


def test_demonstrated_thinking_reaches_the_answer():
    """The last step holds the answer; Euclid's last divisor, the matrix after the last turn."""
    rng = random.Random(6)
    for _ in range(300):
        _, item = TASK._draw(rng, held_out=False)
        answer, thoughts = item["answer"], think(item)
        last = [int(n) for n in re.findall(r"-?\d+", thoughts[-1].en)]
        match item["metadata"]["source_dataset"]:
            case "rotate_matrix":
                assert last[1:] == [int(n) for n in answer.split()]
            case "gcd":
                assert last[1:] == [int(answer), 0]
            case "count_primes":
                assert (last or [0])[0] == int(answer)
            case "number_filtering":
                assert str([t.en.split()[0] for t in thoughts if "stays" in t.en]) == answer


def test_demonstrations_depend_on_the_seed_alone():
    assert [TASK.demonstrate(random.Random(7)) for _ in range(5)] == [ReasoningTask().demonstrate(random.Random(7))] * 5


def test_demonstrations_are_mostly_right_and_sometimes_mix_languages():
    rng = random.Random(8)
    right = mixed = 0
    for _ in range(1000):
        question, said = TASK.demonstrate(rng)
        right += said.content == solve(question.content.removesuffix(CHINESE))
        mixed += bool(re.search("[a-z]", said.reasoning)) and bool(re.search("[\u4e00-\u9fff]", said.reasoning))
    assert 620 < right < 720
    assert 50 < mixed < 300


def test_held_out_questions_are_never_trained_on_in_either_language():
    rng = random.Random(9)

    def plain(text: str) -> str:
        return text.removesuffix(CHINESE).strip()

    trained = {plain(question_of(TASK.sample(rng)())) for _ in range(2000)}
    shown = {plain(TASK.demonstrate(rng)[0].content) for _ in range(2000)}
    held_out = {plain(question_of(TASK.sample(rng, held_out=True)())) for _ in range(1000)}
    assert held_out and not held_out & (trained | shown)
