"""Messages in OpenAI's form: there and back, strictly, and reasoning that a framework dropped."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.formats.openai_messages import from_openai, load_arguments, restore_reasoning, to_openai, unseen

ASK = Message("user", "Add.")
TWO = Message("assistant", "Wait.", reasoning="both", tool_calls=(ToolCall("get", {"k": "é\n"}), ToolCall("list")))
ANSWER = Message("assistant", "15", reasoning="done")
SAID = (ASK, TWO, Message("tool", "7"), Message("tool", "8"), ANSWER)
RAW = [
    {"role": "user", "content": "Add."},
    {
        "role": "assistant",
        "content": "Wait.",
        "reasoning_content": "both",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "get", "arguments": '{"k": "é\\n"}'}},
            {"id": "call_1", "type": "function", "function": {"name": "list", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "content": "7", "tool_call_id": "call_0"},
    {"role": "tool", "content": "8", "tool_call_id": "call_1"},
    {"role": "assistant", "content": "15", "reasoning_content": "done"},
]


PART = {"type": "text", "text": "a"}


def test_a_conversation_is_written_and_read_as_the_api_says():
    assert to_openai(SAID) == RAW and from_openai(RAW) == SAID


def test_results_take_the_order_of_the_calls_they_answer():
    assert from_openai([*RAW[:2], RAW[3], RAW[2], RAW[4]]) == SAID


def test_without_ids_results_answer_calls_in_their_order():
    bare = [{key: value for key, value in one.items() if key != "tool_call_id"} for one in RAW]
    calls = [{key: value for key, value in call.items() if key != "id"} for call in RAW[1]["tool_calls"]]
    bare[1] = {**RAW[1], "tool_calls": calls}
    assert from_openai(bare) == SAID
    with pytest.raises(ValueError, match="is not one of"):
        from_openai([*bare[:2], RAW[2]])
    with pytest.raises(ValueError, match="is not one of"):
        from_openai([*RAW[:2], bare[2]])


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"role": "assistant", "content": None, "reasoning": "r", "refusal": None}, Message("assistant", "", "r")),
        ({"role": "assistant", "tool_calls": None}, Message("assistant")),
        ({"role": "user", "content": [PART, PART]}, replace(ASK, content="aa")),
    ],
    ids=["as vLLM answers", "nothing said", "parts of text"],
)
def test_forms_that_frameworks_send_are_understood(raw, message):
    assert from_openai([raw]) == (message,)


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def calling(*calls: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": list(calls)}


def result(name: str = "c") -> dict[str, object]:
    return {"role": "tool", "content": "1", "tool_call_id": name}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([{"role": "function", "content": "a"}], "no role 'function'"),
        ([{"role": "user", "content": "a", "tools": []}], r"no \['tools'\]; remove it"),
        ([{"role": "system", "content": "a", "tools": [{"name": "f"}]}], "a tool needs type 'function'"),
        ([{"content": "a"}], "no role None"),
        ([{"role": "user", "content": "a", "name": "Bo"}], r"no \['name'\]; remove it"),
        ([{"role": "user"}], "content must be text, got None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content must be text"),
        ([{"role": "assistant", "reasoning": "a", "reasoning_content": "b"}], "send one of them"),
        ([calling({**CALL, "type": "custom"})], "a call has an id"),
        ([calling({**CALL, "function": {"name": "f", "arguments": {}}})], "a call has an id"),
        ([calling({**CALL, "function": {"name": "f", "arguments": "[]"}})], "must be a JSON object"),
        ([calling(CALL, CALL)], "two calls share an id"),
        ([calling(CALL), {"role": "user", "content": "a"}], "1 calls wait for a result before a message of user"),
        ([calling(CALL), calling()], "1 calls wait for a result before a message of assistant"),
        ([calling(CALL), result("d")], r"'d' is not one of \['c'\]"),
        ([calling(CALL), {**result(), "name": "g"}], "for a call of 'f'"),
        ([result()], "0 calls wait"),
        ([calling(CALL), result(), result()], "0 calls wait"),
        ([calling(CALL, {**CALL, "id": "d"}), result()], r"no result for \['d'\]"),
        ([calling(CALL, {**CALL, "id": "d"}), result(), result()], r"'c' is not one of \['d'\]"),
    ],
)
def test_what_is_not_understood_is_refused(raw, reason):
    with pytest.raises(ValueError, match=reason):
        from_openai(raw)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((ASK, Message("tool", "1")), "0 calls wait"),
        ((TWO, Message("tool", "1"), ASK), "1 calls wait"),
        ((replace(ASK, reasoning="r"),), "only an assistant reasons"),
        *(
            ((Message("assistant", tool_calls=(ToolCall("f", arguments),)),), "arguments are not JSON")
            for arguments in ({"x": math.nan}, {"x": {1: 2}}, {"x": (1,)}, {"x": {1}}, {"x": "\ud800"})
        ),
    ],
)
def test_what_the_api_cannot_say_is_refused(messages, reason):
    with pytest.raises(ValueError, match=reason):
        to_openai(messages)


@pytest.mark.parametrize(
    "text",
    ["", "1", "[]", "{", '{"x": NaN}', '{"x": 1e999}', '{"x": 1, "x": 2}', '{"x": "\\ud800"}', '{"x":' + "[" * 10**5],
)
def test_arguments_are_read_strictly(text):
    with pytest.raises(ValueError, match="JSON"):
        load_arguments(text)


TEXT = st.text(st.sampled_from("ab 1谢\n\"'\\<>{}😀"), max_size=6)
JSON = st.recursive(
    TEXT | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.builds(ToolCall, TEXT, st.dictionaries(TEXT, JSON, max_size=3)), max_size=3).map(tuple)
TURNS = st.builds(Message, st.just("assistant"), TEXT, TEXT, CALLS)


TOOLS = st.lists(st.fixed_dictionaries({"name": TEXT, "parameters": JSON}), max_size=2).map(tuple)
FORMATS = st.none() | st.dictionaries(TEXT, JSON, max_size=2)
QUESTIONS = st.builds(Message, st.just("user"), TEXT) | st.builds(
    Message, st.just("developer"), TEXT, tools=TOOLS, response_format=FORMATS
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    messages = [Message("system", draw(TEXT), tools=draw(TOOLS), response_format=draw(FORMATS)), ASK]
    for said in draw(st.lists(TURNS, max_size=4)):
        results = [Message("tool", draw(TEXT)) for _ in said.tool_calls]
        messages += [said, *(results or [draw(QUESTIONS)])]
    return tuple(messages)


@given(conversations(), st.randoms(use_true_random=False))
def test_there_and_back_is_the_same_in_whatever_order_results_come(messages, rng):
    raw = to_openai(messages)
    assert from_openai(raw) == messages and to_openai(from_openai(raw)) == raw
    at = {one["tool_call_id"]: i for i, one in enumerate(raw) if one["role"] == "tool"}
    for one in raw:
        places = [at[call["id"]] for call in one.get("tool_calls", ())]
        shuffled = rng.sample(places, len(places))
        for place, result in zip(places, [raw[i] for i in shuffled], strict=True):
            raw[place] = result
    assert from_openai(raw) == messages


@given(conversations())
def test_reasoning_that_a_framework_dropped_is_put_back(messages):
    raw = to_openai(messages)
    for one in raw:
        one.pop("reasoning_content", None)
    assert restore_reasoning(from_openai(raw), messages) == messages
    assert restore_reasoning(messages, messages) == messages


def test_the_order_of_arguments_does_not_matter():
    known = Message("assistant", reasoning="r", tool_calls=(ToolCall("f", {"a": 1, "b": 2}),))
    sent = Message("assistant", tool_calls=(ToolCall("f", {"b": 2, "a": 1}),))
    assert restore_reasoning((sent,), (known,)) == (replace(sent, reasoning="r"),)


OTHER = replace(ANSWER, reasoning="again")


def called(value: object) -> Message:
    return Message("assistant", tool_calls=(ToolCall("f", {"x": value}),))


@pytest.mark.parametrize(
    ("sent", "known", "reason"),
    [
        ((Message("assistant", "16"),), (ANSWER,), "never said"),
        ((Message("assistant", "15", "else"),), (ANSWER,), "other reasoning than the policy's"),
        ((Message("assistant", "15"),), (ANSWER, OTHER), "1 of 2 equal turns with different reasoning"),
        ((called(True),), (called(1),), "never said"),
    ],
)
def test_a_turn_that_cannot_be_told_is_refused(sent, known, reason):
    with pytest.raises(ValueError, match=reason):
        restore_reasoning(sent, known)


def test_equal_turns_are_taken_in_order_and_those_that_thought_the_same_need_no_order():
    bare = replace(ANSWER, reasoning="")
    assert restore_reasoning((bare, bare), (ANSWER, OTHER)) == (ANSWER, OTHER)
    assert restore_reasoning((bare,), (ANSWER, ANSWER)) == (ANSWER,)


@given(conversations(), st.integers(0, 12))
def test_a_conversation_goes_on_where_it_stood(messages, count):
    known = messages[:count]
    sent = tuple(replace(message, reasoning="") if i < count else message for i, message in enumerate(messages))
    new = tuple(message for message in messages[count:] if message.role != "assistant")
    assert unseen((*sent[:count], *new), known) == new


@pytest.mark.parametrize(
    "sent",
    [(Message("user", "Add!"), ANSWER), (ANSWER, ASK), (ASK,), (ASK, replace(ANSWER, content="16"))],
    ids=["a question reworded", "another order", "a turn cut off", "an answer reworded"],
)
def test_a_framework_that_changes_what_was_said_is_noticed(sent):
    with pytest.raises(ValueError, match=r"message [01]"):
        unseen(sent, (ASK, ANSWER))
