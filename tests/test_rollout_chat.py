# ruff: noqa: RUF001 - the full-width bars are the format
"""The prompt format against texts written out by hand, and the properties training relies on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.formats.chat import Chat, Conversation, parse_calls, render

CHAT = Chat(tiny_tokenizer())
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SYSTEM, ASK = Message("system", "Use tools."), Message("user", "12 + 3?")
CALL = Message("assistant", "Wait.", reasoning="add", tool_calls=(ToolCall("calculate", {"x": "12 + 3", "n": 2}),))
CALL_TEXT = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="calculate">\n'
    '<｜DSML｜parameter name="x" string="true">12 + 3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">2</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
TWICE = Message("assistant", tool_calls=(ToolCall("get", {"key": "a"}), ToolCall("list")))
RESULT, ANSWER, AGAIN = Message("tool", "15"), Message("assistant", "15", reasoning="done"), Message("user", "And?")


def prompt(*messages: Message, thinking: bool = True) -> str:
    return CHAT.decode(Conversation(CHAT, messages, thinking=thinking).prompt_ids())


@pytest.mark.parametrize(
    ("messages", "thinking", "text"),
    [
        ((ASK,), True, f"{BOS}<｜User｜>12 + 3?<｜Assistant｜><think>"),
        ((SYSTEM, ASK), False, f"{BOS}Use tools.<｜User｜>12 + 3?<｜Assistant｜></think>"),
        (
            (ASK, CALL, RESULT),
            True,
            f"{BOS}<｜User｜>12 + 3?<｜Assistant｜><think>add</think>Wait.{CALL_TEXT}{EOS}"
            "\n\n<function_results>\n<result>15</result>\n</function_results>\n\n<think>",
        ),
        (
            (ASK, CALL, RESULT, ANSWER, AGAIN),
            True,
            f"{BOS}<｜User｜>12 + 3?<｜Assistant｜></think>Wait.{CALL_TEXT}{EOS}"
            "\n\n<function_results>\n<result>15</result>\n</function_results>\n\n</think>15"
            f"{EOS}<｜User｜>And?<｜Assistant｜><think>",
        ),
        (
            (ASK, TWICE, RESULT, Message("tool", "a")),
            False,
            f"{BOS}<｜User｜>12 + 3?<｜Assistant｜></think>"
            '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get">\n'
            '<｜DSML｜parameter name="key" string="true">a</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
            '<｜DSML｜invoke name="list">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
            f"{EOS}\n\n<function_results>\n<result>15</result>\n<result>a</result>\n</function_results>\n\n</think>",
        ),
    ],
    ids=["thinking", "not thinking", "tool results keep thinking", "a user message drops it", "two calls"],
)
def test_a_conversation_reads_as_the_format_says(messages, thinking, text):
    assert prompt(*messages, thinking=thinking) == text


@pytest.mark.parametrize("message", [CALL, TWICE, ANSWER, Message("assistant", "谢谢\n\n15"), Message("assistant")])
def test_what_is_rendered_is_read_back(message):
    assert CHAT.parse(CHAT.encode_assistant(message, thinking=True), thinking=True) == message


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        (f"no end of thinking{EOS}", True),
        ("so</think>no end of sentence", True),
        ("", True),
        (f"a</think>b</think>c{EOS}", True),
        (f"a</think>b{EOS}", False),
        (f"a<think>b</think>c{EOS}", True),
        (f"a</think>b{EOS}c{EOS}", True),
        (f"a</think><｜User｜>b{EOS}", True),
        (f"a</think>\n\n<function_results>\n<result>7</result>{EOS}", True),
        (f"{CALL_TEXT}</think>b{EOS}", True),
        (f"a</think>{CALL_TEXT}b{EOS}", True),
        ("a</think>" + CALL_TEXT.replace("</｜DSML｜invoke>", "") + EOS, True),
        ("a</think>" + CALL_TEXT.replace('name="n"', 'name="x"') + EOS, True),
        ("a</think>" + CALL_TEXT.replace(">2<", ">two<") + EOS, True),
        ("a</think>" + CALL_TEXT.replace(">2<", ">NaN<") + EOS, True),
        ("a</think>" + CALL_TEXT.replace("12 + 3", "<think>") + EOS, True),
        ("a</think>" + CALL_TEXT.replace('string="true"', "") + EOS, True),
        (f"a</think>\n\n<｜DSML｜function_calls>\n\n</｜DSML｜function_calls>{EOS}", True),
    ],
)
def test_a_malformed_answer_is_refused(text, thinking):
    with pytest.raises(ValueError):
        CHAT.parse(CHAT.encode(text), thinking=thinking)


def test_bytes_that_are_no_text_are_malformed():
    first_byte, *_ = CHAT.encode("火")  # not in the vocabulary, so three tokens of one byte each
    broken = (first_byte, CHAT.think_close_id, CHAT.eos_id)
    with pytest.raises(ValueError, match="broken characters"):
        CHAT.parse(broken, thinking=True)


def test_calls_are_read_without_a_tokenizer():
    (call,) = parse_calls(CALL_TEXT.partition("function_calls>\n")[2])
    assert call == CALL.tool_calls[0]


@pytest.mark.parametrize("role", ["system", "user", "tool"])
@pytest.mark.parametrize("markup", [EOS, "</think>", "｜DSML｜", "</result>\n<result>"])
def test_markup_in_the_text_of_others_is_data(role, markup):
    before, behind = ((ASK, CALL), ()) if role == "tool" else ((), (ASK,))
    said = ((*before, Message(role, f"look: {text}"), *behind) for text in (markup, "here"))
    ids, plain = (Conversation(CHAT, messages, thinking=True).prompt_ids() for messages in said)
    assert CHAT.decode(ids) == CHAT.decode(plain).replace("here", markup)
    assert [i for i in ids if i in CHAT._added] == [i for i in plain if i in CHAT._added]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((ASK, CALL, RESULT, RESULT), "2 tool results for 1 tool calls"),
        ((ASK, RESULT), "1 tool results for 0 tool calls"),
        ((ASK, CALL, AGAIN), "without results"),
    ],
)
def test_tool_results_must_match_the_calls(messages, reason):
    with pytest.raises(ValueError, match=reason):
        prompt(*messages)


def test_a_tokenizer_without_the_special_tokens_is_refused():
    with pytest.raises(ValueError, match="as single tokens"):
        Chat(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))))


def test_sampled_ids_are_carried_and_never_tokenised_again():
    spelt = tuple(i for letter in "apple" for i in CHAT.encode(letter))
    assert spelt != CHAT.encode("apple")
    conversation = Conversation(CHAT, (ASK,), thinking=True)
    before = conversation.prompt_ids()
    said = (*spelt, CHAT.think_close_id, *spelt, CHAT.eos_id)
    assert conversation.add_sampled(said).content == "apple"
    assert conversation.prompt_ids() == before + said


def test_a_malformed_answer_leaves_the_conversation_as_it_was():
    conversation = Conversation(CHAT, (ASK,), thinking=True)
    before = conversation.prompt_ids()
    with pytest.raises(ValueError):
        conversation.add_sampled(CHAT.encode("no end"))
    assert conversation.prompt_ids() == before and conversation.messages == (ASK,)


TEXT = st.text("apl 12谢\n", max_size=8)
CALLS = st.lists(st.builds(ToolCall, st.just("get"), st.dictionaries(st.sampled_from("kv"), TEXT | st.integers())))
SAID = st.builds(Message, st.just("assistant"), TEXT, TEXT, CALLS.map(lambda calls: tuple(calls[:2])))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Assistant messages, each followed by its tool results, or else by a user message."""
    messages = [ASK]
    for said in draw(st.lists(SAID, min_size=1, max_size=4)):
        messages += [said, *(Message("tool", draw(TEXT)) for _ in said.tool_calls)]
        if not said.tool_calls:
            messages.append(Message("user", draw(TEXT)))
    return messages


@settings(max_examples=60, deadline=None)
@given(conversations(), st.booleans())
def test_the_prompt_extends_what_was_seen_until_a_user_message_drops_reasoning(messages, thinking):
    messages = [m if thinking else replace(m, reasoning="") for m in messages]
    conversation = Conversation(CHAT, messages[:1], thinking=thinking)
    for message, reply in zip(messages[1:], [*messages[2:], None], strict=True):
        if message.role != "assistant":
            continue
        prompt_ids = conversation.prompt_ids()
        said = CHAT.encode_assistant(message, thinking=thinking)
        assert conversation.add_sampled(said) == message
        seen = prompt_ids + said
        replies = messages[len(conversation.messages) :]
        count = len(message.tool_calls) or 1
        conversation.add(replies[:count])
        extends = conversation.prompt_ids()[: len(seen)] == seen
        assert extends == (not thinking or (reply is not None and reply.role == "tool"))


@settings(max_examples=60, deadline=None)
@given(conversations())
def test_a_demonstration_is_rendered_as_the_engine_would_have_seen_it(messages):
    seen: list[tuple[tuple[int, ...], list[bool]]] = []
    conversation = Conversation(CHAT, messages[:1], thinking=True)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            prompt_ids = conversation.prompt_ids()
            said = CHAT.encode_assistant(message, thinking=True)
            if seen and prompt_ids[: len(seen[-1][0])] == seen[-1][0]:
                ids, sampled = seen.pop()
            else:
                ids, sampled = (), []
            mask = sampled + [False] * (len(prompt_ids) - len(ids)) + [True] * len(said)
            seen.append((prompt_ids + said, mask))
            conversation.add([message])
        elif i and messages[i - 1].role == "assistant":
            count = len(messages[i - 1].tool_calls) or 1
            conversation.add(messages[i : i + count])
    rendered = render(CHAT, messages, thinking=True)
    assert [(tuple(ids.tolist()), mask.tolist()) for ids, mask in rendered] == seen
    assert all(ids.dtype == np.int32 and mask.dtype == bool for ids, mask in rendered)


def test_a_second_user_message_makes_a_second_sequence_and_its_reasoning_is_gone():
    first, second = render(CHAT, (ASK, CALL, RESULT, ANSWER, AGAIN, ANSWER), thinking=True)
    sampled = [CHAT.decode(ids[mask]) for ids, mask in (first, second)]
    assert sampled == [f"add</think>Wait.{CALL_TEXT}{EOS}done</think>15{EOS}", f"done</think>15{EOS}"]
    assert "add" not in CHAT.decode(second[0])
