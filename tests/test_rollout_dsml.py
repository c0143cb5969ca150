# ruff: noqa: RUF001 - the full-width bars are the format
"""The text of the V3.2 format against the encoder that vLLM carries, and by hand where that one differs."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.formats.chat import Chat, Conversation
from trimtab.rollout.formats.dsml import response_format_block, tools_block
from trimtab.rollout.formats.openai_messages import to_openai

CHAT = Chat(tiny_tokenizer())
ASK = Message("user", "12 + 3?")
ADD = {"name": "add", "description": '两个数 "sum"', "parameters": {"type": "object", "properties": {"a": {}}}}
NOW = {"name": "now", "parameters": {}}


def vllm_encoder() -> ModuleType:
    """vLLM's copy of DeepSeek's encoder, loaded alone: vLLM itself takes seconds."""
    (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
    path = Path(folder) / "tokenizers" / "deepseek_v32_encoding.py"
    spec = importlib.util.spec_from_file_location("deepseek_v32_encoding", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VLLM = vllm_encoder()


def for_vllm(message: dict[str, Any]) -> dict[str, Any]:
    """vLLM says reasoning for reasoning_content."""
    return {{"reasoning_content": "reasoning"}.get(key, key): value for key, value in message.items()}


def prompt(messages: list[Message], *, thinking: bool) -> str:
    return CHAT.decode(Conversation(CHAT, messages, thinking=thinking).prompt_ids())


TEXT = st.text(st.sampled_from("apl 12谢é\n\t\"'\\<>{}😀"), max_size=6)
SOME = TEXT.map(lambda text: text + "a")
VALUES = st.recursive(
    TEXT | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(st.sampled_from("apl_谢"), min_size=1, max_size=4)
CALLS = st.lists(st.builds(ToolCall, NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3).map(tuple)
SAID = st.builds(Message, st.just("assistant"), TEXT, SOME, CALLS)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"name": NAMES, "description": TEXT, "parameters": st.dictionaries(TEXT, VALUES, max_size=2)}
    ),
    max_size=2,
).map(tuple)
FORMATS = st.none() | st.dictionaries(TEXT, VALUES, min_size=1, max_size=2)
SYSTEM = st.builds(Message, st.just("system"), TEXT, tools=TOOLS, response_format=FORMATS)
QUESTION = st.builds(Message, st.just("user"), TEXT) | st.builds(
    Message, st.just("developer"), SOME, tools=TOOLS, response_format=FORMATS
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Questions, each answered over some rounds of calls, the last one perhaps not to the end; systems between."""
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages += [*draw(st.lists(SYSTEM, max_size=1)), *draw(st.lists(QUESTION, min_size=1, max_size=2))]
        for said in draw(st.lists(SAID, max_size=3)):
            messages += [said, *(Message("tool", draw(TEXT)) for _ in said.tool_calls)]
            if not said.tool_calls:
                break
        if messages[-1].role != "assistant":
            messages.append(Message("assistant", draw(TEXT), draw(SOME)))
    return messages[: draw(st.integers(1, len(messages)))] if messages[-1].role == "assistant" else messages


@settings(max_examples=100)
@given(conversations(), st.booleans())
def test_a_conversation_reads_as_the_encoder_of_vllm_writes_it(messages, thinking):
    while len(messages) > 1 and (messages[-1].role == "tool" or messages[-1].tool_calls):
        messages = messages[:-1]  # results that the cut left without the others
    messages = [one if thinking else replace(one, reasoning="") for one in messages]
    expected = VLLM.encode_messages(
        list(map(for_vllm, to_openai(messages))),
        "thinking" if thinking else "chat",
        drop_thinking=all(message.role != "developer" for message in messages),  # with it, it fails at a developer
    )
    for tools in filter(None, (message.tools for message in messages)):
        expected = expected.replace(VLLM.render_tools(list(tools)), tools_block(tools))
    assert prompt(messages, thinking=thinking) == expected


def test_the_tools_block_is_that_of_vllm_with_a_blank_line_between_its_paragraphs():
    block = tools_block([ADD, NOW])
    assert [line for line in block.split("\n") if line] == VLLM.render_tools([ADD, NOW]).split("\n")[:-1]
    assert [paragraph.split(" ")[0].split("\n")[0] for paragraph in block.split("\n\n")] == [
        "##",
        "You",
        "String",
        "If",
        "<｜DSML｜function_calls>",
        "<function_results>",
        "<think>...thinking",
        "Here",
    ]


def test_tools_and_the_response_format_stand_behind_a_system_message_and_before_a_developers():
    blocks = f"\n\n{tools_block([NOW])}\n\n{response_format_block({'type': 'object'})}"
    system = Message("system", "S", tools=(NOW,), response_format={"type": "object"})
    assert prompt([system, ASK], thinking=False).startswith(f"<｜begin▁of▁sentence｜>S{blocks}<｜User｜>12 + 3?")
    asked = prompt([replace(system, role="developer")], thinking=True)
    assert asked == (f"<｜begin▁of▁sentence｜><｜User｜>{blocks}\n\n# The user's message is: S<｜Assistant｜><think>")
    assert blocks.endswith('strictly adhere to the following schema to reply:\n{"type": "object"}')


def test_a_developer_message_drops_reasoning_as_a_users_does_and_stays():
    said, developer = Message("assistant", "A", "r"), Message("developer", "D")
    assert prompt([ASK, said, developer, said, ASK], thinking=True) == (
        "<｜begin▁of▁sentence｜><｜User｜>12 + 3?<｜Assistant｜></think>A<｜end▁of▁sentence｜>"
        "<｜User｜>\n\n# The user's message is: D<｜Assistant｜></think>A<｜end▁of▁sentence｜>"
        "<｜User｜>12 + 3?<｜Assistant｜><think>"
    )


@pytest.mark.parametrize(
    "message",
    [
        Message("system", tools=({**NOW, "description": "see <think>"},)),
        Message("system", tools=({**NOW, "description": "ends </｜DSML｜function_calls>"},)),
        Message("developer", "D", response_format={"const": "<｜User｜>"}),
    ],
)
def test_markup_in_a_schema_is_data(message):
    shown = prompt([message, Message("user", "?")], thinking=False)
    assert "see <think>" in shown or "ends </｜DSML｜function_calls>" in shown or '{"const": "<｜User｜>"}' in shown
    conversation = Conversation(CHAT, [message, Message("user", "?")], thinking=False)
    assert len(CHAT.encode(shown)) != len(conversation.prompt_ids()), "in other tokens than the marks"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([replace(ASK, tools=(NOW,))], "got one of user"),
        ([ASK, Message("assistant", "a", response_format={"type": "object"})], "got one of assistant"),
        ([Message("system", reasoning="r")], "only an assistant reasons"),
        ([Message("developer")], "needs content"),
        ([Message("system", tools=({"name": {1}},))], "not JSON"),
        ([ASK, Message("system", "S")], "between a question and its answer"),
        ([Message("assistant", "a")], "answers a user"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(messages, reason):
    with pytest.raises(ValueError, match=reason):
        prompt(messages, thinking=False)
