import asyncio
import json
import threading
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from trimtab.environments.base import Message, ToolCall, VoidEpisode
from trimtab.environments.tools.functions import FunctionTool, ToolEnv, as_text, tool
from trimtab.environments.tools.tool import CALCULATE, call, offered


class Colour(Enum):
    RED = "red"


class Point(BaseModel):
    x: int
    y: float = 0.5


@dataclass
class Pair:
    left: int
    right: str


def draw(
    at: Point, colour: Colour = Colour.RED, copy: Annotated[int, Field(ge=1)] = 1, kind: Literal["a"] = "a"
) -> str:
    """Draw a point.

    Nothing is shown.

    Args:
        at: Where.
        copy: How often.
    """
    return f"{at.x} {at.y} {colour.name} {copy} {kind}"


def add(a: int, b: int = 1) -> int:
    """Add."""
    return a + b


def result(function, **arguments) -> str:
    return asyncio.run(call([tool(function)], ToolCall(function.__name__, arguments)))


def test_hints_docstring_and_annotations_become_the_schema():
    drawing = tool(draw)
    properties = drawing.parameters["properties"]
    assert drawing.name == "draw" and drawing.description == "Draw a point.\nNothing is shown."
    assert drawing.parameters["required"] == ["at"]
    assert properties["copy"] == {"default": 1, "minimum": 1, "type": "integer", "description": "How often."}
    assert properties["at"]["description"] == "Where." and properties["kind"]["const"] == "a"
    assert drawing.parameters["additionalProperties"] is False
    json.dumps(drawing.parameters)


def test_arguments_arrive_as_the_types_of_the_hints_and_defaults_are_filled_in():
    assert result(draw, at={"x": 2}, colour="red") == "2 0.5 RED 1 a"
    assert result(add, a=2) == "3"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "a: Field required"),
        ({"a": "3"}, "a: Input should be a valid integer"),
        ({"a": True}, "a: Input should be a valid integer"),
        ({"a": 1, "c": 2}, "c: Extra inputs are not permitted"),
        ({"a": float("nan")}, "not JSON compliant"),
        ({"a": {1}}, "not JSON serializable"),
    ],
)
def test_wrong_arguments_come_back_as_an_error_that_names_them(arguments, told):
    answer = result(add, **arguments)
    assert answer.startswith("error: ") and told in answer


def test_an_unknown_tool_comes_back_as_an_error_that_lists_the_tools():
    assert asyncio.run(call([tool(add)], ToolCall("sub"))) == "error: no tool sub; there are add"
    assert asyncio.run(call([], ToolCall("sub"))) == "error: no tool sub; there are none"


@pytest.mark.parametrize("error", [KeyError("k"), StopIteration(), SystemExit(2), ZeroDivisionError("by zero")])
@pytest.mark.parametrize("is_async", [False, True])
def test_whatever_a_tool_raises_comes_back_as_an_error(error, is_async):
    def fails() -> str:
        """Fail."""
        raise error

    async def fails_later() -> str:
        """Fail."""
        raise error

    answer = result(fails_later if is_async else fails)
    assert answer.startswith("error: ") and type(error).__name__ in answer


def test_a_tool_can_void_the_episode():
    def broken() -> str:
        """Break."""
        raise VoidEpisode("the server is down")

    with pytest.raises(VoidEpisode, match="server is down"):
        result(broken)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"), ({"a": [1, None]}, '{"a":[1,null]}'), (Pair(1, "é"), '{"left":1,"right":"é"}'),
        (Point(x=1), '{"x":1,"y":0.5}'), ((1, True), "[1,true]"), (None, "null"), (7, "7"), (float("inf"), "Infinity"),
    ],
)  # fmt: skip
def test_results_are_texts_or_json(value, text):
    assert as_text(value) == text


def test_tools_of_the_plain_kind_are_called_alike():
    assert asyncio.run(call([CALCULATE], ToolCall("calculate", {"expression": "2*3"}))) == "6"


def no_docstring(a: int) -> int:
    return a


def no_hint(a) -> int:
    """Do."""
    return a


def starred(*a: int) -> int:
    """Do."""
    return sum(a)


def strange(lock: threading.Lock) -> str:
    """Do."""
    return str(lock)


def undefined(a: "NoSuchType") -> str:  # noqa: F821
    """Do."""
    return str(a)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (undefined, "NoSuchType"),
        (no_docstring, "docstring"),
        (no_hint, "type hint"),
        (starred, "by name"),
        (strange, "JSON"),
        (lambda: 1, "def"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused_with_the_reason(function, told):
    with pytest.raises(ValueError, match=told):
        tool(function)


def outcome(message: Message) -> dict[str, float]:
    return {"outcome": float(message.content == "3")}


def said(env, *calls: ToolCall, content: str = ""):
    return asyncio.run(env.step(Message("assistant", content, "", calls)))


def test_an_episode_ends_with_the_first_message_without_calls():
    env = ToolEnv("1 + 2?", [tool(add)], outcome)
    system, user = asyncio.run(env.start())
    assert system == Message("system", tools=offered([tool(add)])) and user == Message("user", "1 + 2?")
    assert system.tools[0]["name"] == "add" and system.tools[0]["parameters"]["required"] == ["a"]
    step = said(env, ToolCall("add", {"a": 1, "b": 2}), ToolCall("add", {}))
    assert [reply.content for reply in step.replies] == ["3", "error: a: Field required"] and not step.done
    step = said(env, content="3")
    assert step.done and step.rewards == {"outcome": 1.0}


def test_calls_of_one_message_run_at_the_same_time_and_answer_in_order():
    """Each call waits for the other: one after another they would never meet."""
    barrier = threading.Barrier(2)

    def meet(name: str) -> str:
        """Wait for the other."""
        barrier.wait(timeout=20)
        return name

    step = said(ToolEnv("?", [tool(meet)], outcome), *(ToolCall("meet", {"name": name}) for name in "ab"))
    assert [reply.content for reply in step.replies] == ["a", "b"]


def test_calls_beyond_the_limit_are_answered_but_not_carried_out():
    env = ToolEnv("?", [tool(add)], outcome, max_calls=1)
    first, second = said(env, ToolCall("add", {"a": 1}), ToolCall("add", {"a": 1})).replies
    assert first.content == "2" and second.content == "error: at most 1 calls at a time"


def test_at_the_limit_of_messages_the_empty_answer_is_scored():
    env = ToolEnv("?", [tool(add)], outcome, max_messages=2)
    assert not said(env, ToolCall("add", {"a": 1})).done
    step = said(env, ToolCall("add", {"a": 1}))
    assert step.done and step.rewards == {"outcome": 0.0} and step.replies[0].content == "2"


def test_a_reward_may_be_a_coroutine_function():
    async def later(message: Message) -> dict[str, float]:
        await asyncio.sleep(0)
        return outcome(message) | {"length": 1}

    assert said(ToolEnv("?", [], later), content="3").rewards == {"outcome": 1.0, "length": 1.0}


@pytest.mark.parametrize("parts", [1.0, {"outcome": float("nan")}, {"outcome": "1"}, {1: 1.0}])
def test_a_reward_that_is_no_mapping_to_finite_numbers_is_refused(parts):
    with pytest.raises(ValueError, match="reward"):
        said(ToolEnv("?", [], lambda message: parts), content="3")


def test_code_points_that_are_no_text_come_back_as_question_marks():
    def broken_text() -> str:
        """Say something."""
        return "a\ud800"

    assert result(broken_text) == "a?"


def test_coroutine_functions_that_await_nothing_run_one_after_the_other():
    total = [0]

    async def double_and_add(number: int) -> int:
        """Double the total and add a number."""
        total[0] = 2 * total[0] + number
        return total[0]

    env = ToolEnv("?", [tool(double_and_add)], outcome)
    step = said(env, *(ToolCall("double_and_add", {"number": number}) for number in (1, 2, 3)))
    assert [reply.content for reply in step.replies] == ["1", "4", "11"]


def test_a_tool_that_voids_the_episode_cancels_the_other_calls_of_its_message():
    ended = []

    async def wait() -> str:
        """Wait."""
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("wait")

    async def broken() -> str:
        """Break."""
        await asyncio.sleep(0)
        raise VoidEpisode("the server is down")

    with pytest.raises(VoidEpisode):
        said(ToolEnv("?", [tool(wait), tool(broken)], outcome), ToolCall("wait"), ToolCall("broken"))
    assert ended == ["wait"]


def test_closing_an_environment_closes_every_tool_that_can_be_closed():
    closed = []

    class Door:
        description, parameters = "A door.", {"type": "object", "properties": {}}

        def __init__(self, name: str):
            self.name = name

        async def call(self, arguments):
            return "open"

        async def close(self):
            closed.append(self.name)
            if self.name == "stuck":
                raise OSError("stuck")

    env = ToolEnv("?", [Door("front"), tool(add), Door("stuck")], outcome)
    with pytest.raises(OSError, match="stuck"):
        asyncio.run(env.close())
    assert set(closed) == {"front", "stuck"}


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ValueError, match="add, add"):
        ToolEnv("?", [tool(add), tool(add)], outcome)


def test_a_call_that_takes_too_long_ends_with_an_error_that_the_policy_reads():
    ended = threading.Event()

    async def wait() -> str:
        """Wait for ever."""
        await asyncio.sleep(3600)
        return "never"

    def block() -> str:
        """Block a thread."""
        ended.wait(60)
        return "late"

    for function in (wait, block):
        assert asyncio.run(asyncio.wait_for(release(ended, tool(function, seconds=0.1)), 30)) == (
            "error: no result within 0.1 s"
        )
        ended.clear()
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        tool(block, seconds=0)


async def release(ended: threading.Event, slow: FunctionTool) -> str:
    """The result of a call; then the thread that may still run is let go."""
    try:
        return await slow.call({})
    finally:
        ended.set()
