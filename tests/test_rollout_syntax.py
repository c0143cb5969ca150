"""The presets of calls: what is written is read back, what is broken is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.environments.base import ToolCall
from trimtab.rollout.formats.syntax import PLAIN, PRESETS, find_syntax, parameter_schemas

CALLS = (ToolCall("get", {"k": "a", "n": 2}),)
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "get", "arguments": {"k": "a", "n": 2}}\n</tool_call>',
    "function": "<tool_call>\n<function=get>\n<parameter=k>\na\n</parameter>\n<parameter=n>\n2\n</parameter>\n"
    "</function>\n</tool_call>",
    "glm": "<tool_call>get\n<arg_key>k</arg_key>\n<arg_value>a</arg_value>\n<arg_key>n</arg_key>\n"
    "<arg_value>2</arg_value>\n</tool_call>",
    "mistral": '[TOOL_CALLS] [{"name": "get", "arguments": {"k": "a", "n": 2}}]',
    "mistral-args": '[TOOL_CALLS]get[ARGS]{"k": "a", "n": 2}',
    "python": "<|tool_call_start|>[get(k='a', n=2)]<|tool_call_end|>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n"  # noqa: RUF001
    '{"k": "a", "n": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',  # noqa: RUF001
    "llama": '{"name": "get", "parameters": {"k": "a", "n": 2}}',
}


@pytest.mark.parametrize(("name", "text"), WRITTEN.items())
def test_a_call_reads_as_its_family_writes_it(name, text):
    assert PRESETS[name].format_calls(CALLS) == text
    assert PRESETS[name].split(text, {}) == ("", CALLS)


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("mistral", '[TOOL_CALLS][{"name": "get", "arguments": {}, "id": "abcdefghi"}]', (ToolCall("get"),)),
        (
            "mistral-args",
            "[TOOL_CALLS]get[CALL_ID]x[ARGS]{}[TOOL_CALLS]put[ARGS]{}",
            (ToolCall("get"), ToolCall("put")),
        ),
        ("llama", '<|python_tag|>{"type": "function", "name": "get", "parameters": {}}', (ToolCall("get"),)),
        ("function", "<tool_call><function=get><parameter=x>a\nb</parameter></function></tool_call>", None),
        ("function", "<tool_call>\n<function=get>\n</function>\n</tool_call>", (ToolCall("get"),)),
        ("glm", "<tool_call>get</tool_call>", (ToolCall("get"),)),
        ("python", '<|tool_call_start|>[get(a=[1, {"b": None}]), put()]<|tool_call_end|>', None),
    ],
)
def test_what_models_vary_is_read(name, text, calls):
    expected = {
        "function": (ToolCall("get", {"x": "a\nb"}),),
        "python": (ToolCall("get", {"a": [1, {"b": None}]}), ToolCall("put")),
    }
    assert PRESETS[name].split(text, {})[1] == (calls or expected[name])


BROKEN = {
    "hermes": ['{"name": "get"}', '{"name": "get", "arguments": {}, "id": 1}', "[]", '{"a":' * 5000],
    "function": [
        "<function=get>",
        "<function=>\n</function>",
        "<function=get>x</function>",
        "get",
        "<function=get><parameter=x>1</parameter><parameter=x>2</parameter></function>",
    ],
    "glm": [
        "",
        "<arg_key>k</arg_key>",
        "get\n<arg_key>k</arg_key>",
        "get<arg_key>k</arg_key><arg_value>1</arg_value>x",
    ],
    "mistral": ["[]", "{}", '[{"name": "get"}]', "[1]", "[" * 100_000],
    "mistral-args": ["get", "[ARGS]{}", "get[ARGS]", "get[ARGS][]", "get[ARGS]{} x"],
    "python": [
        "[]",
        "get()",
        "[get(1)]",
        "[get(**a)]",
        "[a.get()]",
        "[get(a=b)]",
        "[get(a=(1,))]",
        "[get(a={1: 2})]",
        "[get(a=1, a=2)]",
        "[get(a=1e999)]",
        "[get(a=\x00)]",
        "[" * 100000,
        "[get(a=" + "-" * 100000 + "1)]",
    ],
    "deepseek": ["", "x", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n[]\n```<｜tool▁call▁end｜>"],  # noqa: RUF001
}


@pytest.mark.parametrize(("name", "body"), [(name, body) for name, bodies in BROKEN.items() for body in bodies])
def test_broken_calls_are_refused(name, body):
    with pytest.raises(ValueError):
        PRESETS[name].split(PRESETS[name].call_open + body + PRESETS[name].call_close, {})


@pytest.mark.parametrize("name", [name for name, one in PRESETS.items() if one.call_close])
def test_calls_that_are_not_closed_or_followed_by_text_are_refused(name):
    written = PRESETS[name].format_calls(CALLS)
    for text in (written.removesuffix(PRESETS[name].call_close), written + "x"):
        with pytest.raises(ValueError, match="not closed, or text follows"):
            PRESETS[name].split(text, {})


@pytest.mark.parametrize("text", ["15", "{}", '{"name": "get", "parameters": 1}', "{" * 100_000, 'x {"name": "g"}'])
def test_a_turn_that_is_no_call_is_an_answer_where_calls_have_no_marks(text):
    assert PRESETS["llama"].split(text, {}) == (text, ())


def test_plain_syntax_reads_no_calls_and_writes_none():
    assert PLAIN.split(WRITTEN["hermes"], {}) == (WRITTEN["hermes"], ())
    with pytest.raises(ValueError, match="has no calls"):
        PLAIN.format_calls(CALLS)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("2", "string", "2"),
        ("2", "integer", 2),
        ("2", None, 2),
        ("True", "boolean", True),
        ("true", "boolean", True),
        ("None", None, None),
        ("[1]", "array", [1]),
        ("two", "integer", "two"),
        ('{"a"', None, '{"a"'),
    ],
)
def test_values_without_quotes_are_read_by_their_schema(text, kind, value):
    schema = {"type": kind} if kind else {}
    tool = {"name": "get", "parameters": {"type": "object", "properties": {"x": schema}}}
    call = f"<tool_call>\n<function=get>\n<parameter=x>\n{text}\n</parameter>\n</function>\n</tool_call>"
    assert PRESETS["function"].split(call, parameter_schemas([tool]))[1] == (ToolCall("get", {"x": value}),)


def test_an_unknown_preset_is_named():
    assert find_syntax("glm") is PRESETS["glm"]
    with pytest.raises(ValueError, match="no syntax 'qwen'; there are hermes, function"):
        find_syntax("qwen")


NAMES = st.text(st.sampled_from("abc_"), min_size=1, max_size=4)
QUOTED = st.recursive(
    st.text(st.sampled_from("a 1é\"'{}[]<>\\\n"), max_size=6) | st.integers() | st.booleans() | st.none(),
    lambda one: st.lists(one, max_size=2) | st.dictionaries(NAMES, one, max_size=2),
    max_leaves=4,
)
UNQUOTED = st.text(st.sampled_from("axé\"' "), max_size=6).map(str.strip).filter(bool) | st.integers() | st.booleans()


@given(st.sampled_from([*WRITTEN]), st.data())
def test_what_is_written_is_read_back(name, data):
    values = UNQUOTED if name in ("function", "glm") else QUOTED
    call = st.builds(ToolCall, NAMES, st.dictionaries(NAMES, values, max_size=3))
    calls = tuple(data.draw(st.lists(call, min_size=1, max_size=1 if name == "llama" else 3)))
    schemas = {f"{one.name}.{key}": {"type": "string"} for one in calls for key in one.arguments}
    typed = {key: {} for key in schemas}
    written = PRESETS[name].format_calls(calls)
    texts = all(isinstance(value, str) for one in calls for value in one.arguments.values())
    assert PRESETS[name].split(written, schemas if texts else typed) == ("", calls)
    assert PRESETS[name].split(written if name == "llama" else f"Wait.\n{written}", typed)[1] == calls
