"""What a tool is, and the tools of the agent tasks: a calculator and a key-value store.

What the policy gets wrong comes back as text, never as an exception; only VoidEpisode, with which a tool says that
nothing can be said about the episode, passes through.
"""

import ast
import asyncio
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from trimtab.environments.base import Message, ToolCall
from trimtab.rewards import bounds

MAX_EXPRESSION = 64
"""Characters of an expression, at most; bounds the depth of its tree."""
MAX_VALUE = 10**12
"""Magnitude of every number in a calculation, at most."""

_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_JSON_TYPES = {"string": str, "integer": int}


class Tool(Protocol):
    """What an environment lends to the policy. A tool that holds a resource also has an async close()."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The JSON schema of the arguments, an object."""

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """The result as text, or "error: ..." for what the policy got wrong.

        Raises:
            VoidEpisode: the tool is broken.
        """


async def call(tools: Sequence[Tool], called: ToolCall) -> str:
    """What the called tool answers; "error: ..." when there is none of that name. Code points that are no text are "?".

    Raises:
        VoidEpisode: the tool raised it.
    """
    found = next((tool for tool in tools if tool.name == called.name), None)
    if found is None:
        return f"error: no tool {called.name}; there are {', '.join(tool.name for tool in tools) or 'none'}"
    return (await found.call(called.arguments)).encode(errors="replace").decode()


def shorten(text: str, most: int) -> str:
    """A result of at most so many characters, and a notice in the place of what is left out: two thirds are its
    beginning, a third its end, where errors are."""
    left_out = len(text) - most
    if left_out <= 0:
        return text
    bounds.bit("tool_output", f"a tool's result of {len(text)} characters is shortened to {most}")
    end = most // 3
    return (
        f"{text[: most - end]}\n... (output truncated: {left_out} characters left out) ...\n{text[len(text) - end :]}"
    )


async def answer_calls(tools: Sequence[Tool], calls: Sequence[ToolCall], *, most: int) -> tuple[Message, ...]:
    """The tool messages for the calls of one message, in their order; the calls run at the same time, at most so many.

    Raises:
        VoidEpisode: a tool raised it; the other calls are cancelled.
    """
    tasks = [asyncio.create_task(call(tools, called)) for called in calls[:most]]
    try:
        texts = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    left_out = [f"error: at most {most} calls at a time"] * len(calls[most:])
    return tuple(Message("tool", text) for text in (*texts, *left_out))


async def close_tools(tools: Sequence[Tool]) -> None:
    """Close the tools that have a close(), all of them even if one fails."""
    async with AsyncExitStack() as stack:
        for tool in tools:
            if close := getattr(tool, "close", None):
                stack.push_async_callback(close)


def distinct(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """The tools, each with a name of its own.

    Raises:
        ValueError: two have the same name.
    """
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise ValueError(f"every tool needs a name of its own, got {', '.join(names)}")
    return tuple(tools)


def opening(prompt: str, tools: Sequence[Tool], system: str = "") -> tuple[Message, ...]:
    """How an episode opens: a system message with its text and the tools, unless it would be empty, and the prompt."""
    first = (Message("system", system, tools=offered(tools)),) if system or tools else ()
    return (*first, Message("user", prompt))


def offered(tools: Sequence[Any]) -> tuple[Mapping[str, Any], ...]:
    """Anything with name, description and parameters as a message offers it."""
    return tuple({"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in tools)


@dataclass(frozen=True, slots=True)
class PlainTool:
    """A function of texts and integers that answers at once.

    parameters is a JSON schema of an object; its properties, all required, are of type string or integer. function
    takes them by name, returns a text, and raises ValueError for arguments it cannot use.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., str]

    async def call(self, arguments: Mapping[str, Any]) -> str:
        return self.run(arguments)

    def run(self, arguments: Mapping[str, Any]) -> str:
        """The result, or "error: ..." for arguments that are wrong."""
        try:
            _check_arguments(self, arguments)
            return self.function(**arguments)
        except ValueError as error:  # a call is model output: the policy reads what was wrong with it
            return f"error: {error}"


def run_tool(tools: Sequence[PlainTool], call: ToolCall) -> str:
    """The result of a call, or "error: ..." when the name or the arguments are wrong."""
    found = next((tool for tool in tools if tool.name == call.name), None)
    return f"error: no tool {call.name}" if found is None else found.run(call.arguments)


def calculate(expression: str) -> str:
    """The value of an expression of integers, + - * / and parentheses, as "37" or, where it is not whole, "7/2".

    Raises:
        ValueError: anything else, a division by zero, a number or an expression beyond the bounds.

    >>> calculate("(24 + 13) * 2")
    '74'
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression has at most {MAX_EXPRESSION} characters")
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, RecursionError, MemoryError, ZeroDivisionError) as error:
        reason = "division by zero" if isinstance(error, ZeroDivisionError) else "not arithmetic"
        raise ValueError(reason) from error


CALCULATE = PlainTool(
    name="calculate",
    description="Compute an expression of integers, + - * / and parentheses.",
    parameters={"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    function=calculate,
)


def store_tools(store: dict[str, int]) -> tuple[PlainTool, PlainTool]:
    """Tools get(key) and put(key, value) that read and change store."""

    def get(key: str) -> str:
        if key not in store:
            raise ValueError(f"no key {key}")
        return str(store[key])

    def put(key: str, value: int) -> str:
        if abs(value) > MAX_VALUE:
            raise ValueError("value too large")
        store[key] = value
        return "ok"

    key, value = {"type": "string"}, {"type": "integer"}
    return (
        PlainTool(
            name="get",
            description="Read the value of a key.",
            parameters={"type": "object", "properties": {"key": key}, "required": ["key"]},
            function=get,
        ),
        PlainTool(
            name="put",
            description="Set the value of a key.",
            parameters={"type": "object", "properties": {"key": key, "value": value}, "required": ["key", "value"]},
            function=put,
        ),
    )


def _check_arguments(tool: PlainTool, arguments: Mapping[str, Any]) -> None:
    properties = tool.parameters["properties"]
    if set(arguments) != set(properties):
        raise ValueError(f"{tool.name} takes {', '.join(properties)}")
    for name, value in arguments.items():
        wanted = properties[name]["type"]
        if type(value) is not _JSON_TYPES[wanted]:  # isinstance would take true for an integer
            raise ValueError(f"{name} must be of type {wanted}")


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            value = Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            value = _OPERATORS[type(sign)](_value(left), _value(right))
        case _:
            raise ValueError("not arithmetic")
    if max(abs(value.numerator), value.denominator) > MAX_VALUE:
        raise ValueError("number too large")
    return value
