"""Tools that an environment lends to the policy. What the policy gets wrong comes back as text, not as an exception."""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from trimtab.environments.base import ToolCall

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


@dataclass(frozen=True, slots=True)
class Tool:
    """A function with a description for the policy.

    parameters is a JSON schema of an object; its properties, all required, are of type string or integer. function
    takes them by name, returns a text, and raises ValueError for arguments it cannot use.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., str]


def run_tool(tools: Sequence[Tool], call: ToolCall) -> str:
    """The result of a call, or "error: ..." when the name or the arguments are wrong."""
    try:
        tool = next((tool for tool in tools if tool.name == call.name), None)
        if tool is None:
            raise ValueError(f"no tool {call.name}")
        _check_arguments(tool, call.arguments)
        return tool.function(**call.arguments)
    except ValueError as error:  # a call is model output: the policy reads what was wrong with it
        return f"error: {error}"


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


CALCULATE = Tool(
    name="calculate",
    description="Compute an expression of integers, + - * / and parentheses.",
    parameters={"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    function=calculate,
)


def store_tools(store: dict[str, int]) -> tuple[Tool, Tool]:
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
        Tool(
            name="get",
            description="Read the value of a key.",
            parameters={"type": "object", "properties": {"key": key}, "required": ["key"]},
            function=get,
        ),
        Tool(
            name="put",
            description="Set the value of a key.",
            parameters={"type": "object", "properties": {"key": key, "value": value}, "required": ["key", "value"]},
            function=put,
        ),
    )


def _check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> None:
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
