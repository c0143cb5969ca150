from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.environments.base import ToolCall
from trimtab.environments.tools.tool import CALCULATE, calculate, run_tool, store_tools


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("24+13", "37"),
        ("2 * (3 + 4)", "14"),
        ("-5*2", "-10"),
        ("7-30", "-23"),
        ("7/2", "7/2"),
        ("8/2", "4"),
        (" 1/3 + 2/3 ", "1"),
    ],
)
def test_the_calculator_computes_exactly(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "2+",
        "2**9",
        "7//2",
        "1.5+1",
        "True+1",
        "x+1",
        "__import__('os')",
        "(1).real",
        "[1]*2",
        "1 if 1 else 2",
        "'a'*9",
        "1/0",
        "999999999*999999999",
        "1" * 65,
        "(" * 60,
        "1\0",
    ],
)
def test_the_calculator_refuses_everything_but_bounded_arithmetic(expression):
    with pytest.raises(ValueError):
        calculate(expression)


@given(
    st.recursive(
        st.integers(0, 99).map(str),
        lambda e: st.tuples(e, st.sampled_from("+-*"), e).map("({0[0]}{0[1]}{0[2]})".format),
        max_leaves=6,
    )
)
def test_the_calculator_agrees_with_python(expression):
    assert Fraction(calculate(expression)) == eval(expression)


def test_the_store_gives_back_what_was_put():
    store = {"fig": 4}
    tools = store_tools(store)
    assert run_tool(tools, ToolCall("get", {"key": "fig"})) == "4"
    assert run_tool(tools, ToolCall("put", {"key": "pea", "value": -7})) == "ok"
    assert run_tool(tools, ToolCall("get", {"key": "pea"})) == "-7"
    assert store == {"fig": 4, "pea": -7}


@pytest.mark.parametrize(
    "call",
    [
        ToolCall("sing"),
        ToolCall("get"),
        ToolCall("get", {"key": "durian"}),
        ToolCall("get", {"key": 3}),
        ToolCall("get", {"name": "fig"}),
        ToolCall("get", {"key": "fig", "default": 0}),
        ToolCall("get", {"key": ["fig"]}),
        ToolCall("put", {"key": "fig", "value": "5"}),
        ToolCall("put", {"key": "fig", "value": True}),
        ToolCall("put", {"key": "fig", "value": 10**13}),
        ToolCall("put", {"key": "fig"}),
        ToolCall("calculate", {"expression": 5}),
        ToolCall("calculate", {"expression": "1/0"}),
        ToolCall("calculate", {"expression": "fig+1"}),
    ],
)
def test_a_wrong_call_returns_an_error_as_text_and_changes_nothing(call):
    store = {"fig": 4}
    assert run_tool((CALCULATE, *store_tools(store)), call).startswith("error: ")
    assert store == {"fig": 4}
