import asyncio
import random
import re

import pytest

from trimtab.environments.base import Message, Step, ToolCall
from trimtab.environments.tasks.agent import MAX_MESSAGES, PREVIOUS, AgentEnv, AgentTask, Goal

STORE = {"fig": 20, "pea": 5, "plum": 3}
SUM = Goal("What is fig plus pea?", ("fig", "pea"), "+")
DOUBLE = Goal("Put the double of it in nut.", (PREVIOUS, 2), "*", put="nut")


def call(env: AgentEnv, name: str, **arguments) -> str:
    (reply,) = asyncio.run(env.step(Message("assistant", tool_calls=(ToolCall(name, arguments),)))).replies
    assert reply.role == "tool"
    return reply.content


def say(env: AgentEnv, content: str) -> Step:
    return asyncio.run(env.step(Message("assistant", content)))


def solve(env: AgentEnv) -> float:
    """Play from the text of the messages alone; return the sum of the outcomes."""
    text, previous, outcome = asyncio.run(env.start())[-1].content, "", 0.0
    while True:
        sign = {"plus": "+", "minus": "-"}.get((re.findall("plus|minus", text) or [""])[0], "")
        keys = [] if text.startswith("Put") else re.findall(r"\w+", re.sub("What is|And|plus|minus", "", text))
        numbers = [call(env, "get", key=key) for key in keys]
        if "double" in text:
            numbers, sign = ["2"], "*"
        if not text.startswith("What"):
            numbers = [previous, *numbers]
        previous = call(env, "calculate", expression=sign.join(numbers)) if sign else numbers[0]
        if text.startswith("Put"):
            assert call(env, "put", key=text.split()[-1].rstrip("."), value=int(previous)) == "ok"
        step = say(env, "done" if text.startswith("Put") else previous)
        outcome += step.rewards["outcome"]
        if step.done:
            return outcome
        text = step.replies[-1].content


@pytest.mark.parametrize("held_out", [False, True])
def test_a_perfect_solver_gets_full_reward(held_out):
    rng = random.Random(1)
    assert all(solve(AgentTask().sample(rng, held_out=held_out)()) == pytest.approx(1.0) for _ in range(200))


def test_each_user_message_earns_its_share():
    env = AgentEnv(STORE, (SUM, DOUBLE))
    first = say(env, "25")
    assert (first.rewards["outcome"], first.done, first.replies[0].role) == (0.5, False, "user")
    last = say(env, "done")  # nothing was stored
    assert (last.rewards["outcome"], last.done) == (0.0, True)


def test_a_put_is_checked_in_the_store_against_the_right_value_not_against_what_was_said():
    env = AgentEnv(STORE, (SUM, DOUBLE))
    assert say(env, "24").rewards["outcome"] == 0.0
    assert call(env, "put", key="nut", value=50) == "ok"
    assert say(env, "whatever").rewards["outcome"] == 0.5


@pytest.mark.parametrize("answer", ["", "24", "25.", "25 or 26", "twenty-five", "25 25"])
def test_an_answer_other_than_the_number_earns_nothing(answer):
    assert say(AgentEnv(STORE, (SUM,)), answer).rewards["outcome"] == 0.0


def test_attempts_do_not_share_a_store():
    make = AgentTask().sample(random.Random(2))
    one, two = make(), make()
    call(one, "put", key="new", value=1)
    assert call(two, "get", key="new").startswith("error: ")


def test_calls_of_one_message_are_answered_in_order_and_at_most_four_are_run():
    env = AgentEnv(STORE, (SUM,))
    calls = tuple(ToolCall("get", {"key": key}) for key in ("fig", "pea", "nope", "plum", "fig"))
    replies = [reply.content for reply in asyncio.run(env.step(Message("assistant", tool_calls=calls))).replies]
    assert [*replies[:2], replies[3]] == ["20", "5", "3"]
    assert replies[2].startswith("error: ") and replies[4].startswith("error: at most 4")


def test_a_conversation_ends_after_eight_assistant_messages():
    env = AgentEnv(STORE, (SUM, DOUBLE))
    look = Message("assistant", tool_calls=(ToolCall("get", {"key": "fig"}),))
    steps = [asyncio.run(env.step(look)) for _ in range(MAX_MESSAGES)]
    assert [step.done for step in steps] == [False] * (MAX_MESSAGES - 1) + [True]
    assert sum(step.rewards["outcome"] for step in steps) == 0.0


def test_tools_describe_themselves_with_a_schema():
    env = AgentEnv(STORE, (SUM,))
    assert [tool.name for tool in env.tools] == ["calculate", "get", "put"]
    assert all(set(tool.parameters["properties"]) == set(tool.parameters["required"]) for tool in env.tools)


def replay(messages: tuple[Message, ...], env: AgentEnv) -> float:
    """Put a demonstration's assistant messages to a fresh environment; it must answer as in the demonstration."""
    assert asyncio.run(env.start()) == messages[:2]
    outcome, i = 0.0, 2
    while i < len(messages):
        step = asyncio.run(env.step(messages[i]))
        outcome += step.rewards["outcome"]
        assert messages[i + 1 : i + 1 + len(step.replies)] == step.replies
        i += 1 + len(step.replies)
    assert step.done
    return outcome


def test_demonstrations_replay_with_the_same_tool_results_and_are_imperfect_on_purpose():
    outcomes = []
    for seed in range(500):
        messages = AgentTask().demonstrate(random.Random(seed))
        outcomes.append(replay(messages, AgentTask().sample(random.Random(seed))()))
    assert 0.45 < sum(outcomes) / len(outcomes) < 0.75
    assert {0.0, 0.5, 1.0} <= set(outcomes)


def test_about_half_of_the_demonstrations_have_a_second_user_message():
    users = [sum(m.role == "user" for m in AgentTask().demonstrate(random.Random(seed))) for seed in range(500)]
    assert set(users) == {1, 2} and 200 < users.count(2) < 300


def test_held_out_prompts_are_never_trained_on():
    rng = random.Random(3)

    def prompt(held_out: bool) -> str:
        return asyncio.run(AgentTask().sample(rng, held_out=held_out)().start())[-1].content

    trained = {prompt(False) for _ in range(2000)} | {AgentTask().demonstrate(rng)[1].content for _ in range(2000)}
    held_out = {prompt(True) for _ in range(500)}
    assert held_out and not held_out & trained
