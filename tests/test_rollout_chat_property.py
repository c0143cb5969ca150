# ruff: noqa: RUF001 - the full-width bars are the format
"""The prompt format over random conversations: what is said is read back, and what trains is what was sampled."""

import asyncio
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import ASK, Engine, Scene
from tiny import CORPUS, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.attempt import Rules
from trimtab.rollout.context import ContextPolicy
from trimtab.rollout.formats.chat import Chat, Conversation, MarkupError
from trimtab.rollout.formats.dsml import BOS, EOS, JSON, RAW, RESERVED, SPECIAL_TOKENS, format_calls
from trimtab.rollout.play import play_group
from trimtab.rollout.types import Group, Sampling


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that holds the special tokens and <pad>, but none of the markup around them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = [AddedToken(text, normalized=False, special=True) for text in (*SPECIAL_TOKENS, "<pad>")]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


TOKENIZERS = tiny_tokenizer(), plain_tokenizer()
CHAT, PLAIN = map(Chat, TOKENIZERS)
CALL = Message("assistant", tool_calls=(ToolCall("f"),))
TEXT = st.text(st.sampled_from("apl 12\n\r\t\"'\\<>/=｜{}&谢é😀\u2028\x00"), max_size=8)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=8).filter(
    lambda text: not any(mark in text for mark in RESERVED)
)
VALUES = st.recursive(
    TEXT | ANY_TEXT | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(st.sampled_from("apl 12<>=谢"), min_size=1, max_size=4)
CALLS = st.lists(st.builds(ToolCall, NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3).map(tuple)
SAID = st.builds(Message, st.just("assistant"), TEXT | ANY_TEXT, TEXT | ANY_TEXT, CALLS)
CHATS = st.sampled_from([CHAT, PLAIN])
RANDOM = st.builds(random.Random, st.integers(0, 2**32))
METHODS = ("summary", "discard-75", "discard-all", "keep-recent")
POLICIES = st.builds(ContextPolicy, method=st.sampled_from(METHODS), trigger=st.floats(0.2, 0.8), keep=st.just(1))


def silent(message: Message) -> Message:
    return replace(message, reasoning="")


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """Assistant messages, each followed by a result for each of its calls, or else by a user message."""
    messages = [Message("system", draw(TEXT)), Message("user", draw(TEXT))]
    for said in draw(st.lists(SAID, min_size=1, max_size=3)):
        results = [Message("tool", draw(TEXT)) for _ in said.tool_calls]
        messages += [said, *(results or [Message("user", draw(TEXT))])]
    return tuple(messages)


@given(SAID, st.booleans(), CHATS)
def test_what_is_said_is_read_back(message, thinking, chat):
    message = message if thinking else silent(message)
    ids = chat.encode_assistant(message, thinking=thinking)
    assert chat.parse(ids, thinking=thinking) == message
    text = (
        (f"{message.reasoning}</think>" if thinking else "") + message.content + format_calls(message.tool_calls) + EOS
    )
    assert chat.decode(ids) == text


@given(conversations(), st.booleans(), CHATS)
def test_reasoning_is_dropped_at_a_user_message_and_nothing_else_ever_is(messages, thinking, chat):
    messages = [message if thinking else silent(message) for message in messages]
    last = max(i for i, message in enumerate(messages) if message.role == "user")
    opener = "<think>" if thinking else "</think>"
    text, results = BOS, list[str]()
    for i, message in enumerate(messages):
        opens = opener if i >= last else "</think>"
        following = messages[i + 1].role if i + 1 < len(messages) else ""
        if message.role == "system":
            text += message.content
        elif message.role == "user":
            text += f"<｜User｜>{message.content}<｜Assistant｜>{opens}"
        elif message.role == "assistant":
            kept = f"{message.reasoning}</think>" if thinking and i > last else ""
            text += f"{kept}{message.content}{format_calls(message.tool_calls)}{EOS}"
        else:
            results.append(f"\n<result>{message.content}</result>")
            if following != "tool":
                text += f"\n\n<function_results>{''.join(results)}\n</function_results>\n\n{opens}"
                results.clear()
    assert chat.decode(Conversation(chat, messages, thinking=thinking).prompt_ids()) == text


@given(TEXT, st.sampled_from(SPECIAL_TOKENS), TEXT, CHATS)
def test_a_special_token_in_text_of_the_world_is_data_and_in_what_is_said_refused(before, token, after, chat):
    text = before + token + after
    for messages in ([Message("system", text), ASK], [Message("user", text)], [ASK, CALL, Message("tool", text)]):
        plain = [replace(message, content=message.content.replace(text, "x")) for message in messages]
        ids, others = (Conversation(chat, one, thinking=True).prompt_ids() for one in (messages, plain))
        assert [i for i in ids if i in chat._added] == [i for i in others if i in chat._added]
        assert chat.decode(ids) == chat.decode(others).replace("x", chat.decode(chat.encode(chat.data(text))), 1)
        assert text in chat.decode(ids) or chat is not CHAT
    for said in (
        Message("assistant", text),
        Message("assistant", reasoning=text),
        *(Message("assistant", tool_calls=(call,)) for call in (ToolCall(text), ToolCall("f", {text: 1}))),
        *(Message("assistant", tool_calls=(ToolCall("f", {"x": value}),)) for value in (text, [text], {text: 1})),
    ):
        with pytest.raises(MarkupError):
            chat.encode_assistant(said, thinking=True)


@given(st.lists(st.integers(0, 10**6), max_size=8), st.booleans(), st.sampled_from(TOKENIZERS))
def test_random_ids_are_read_strictly_or_refused(ids, thinking, tokenizer):
    chat = Chat(tokenizer)
    ids = [*(i % len(tokenizer) for i in ids), chat.eos_id]
    try:
        message = chat.parse(ids, thinking=thinking)
    except ValueError:
        return
    assert chat.decode(ids) == (f"{message.reasoning}</think>" if thinking else "") + message.content + EOS
    assert chat.parse(chat.encode_assistant(message, thinking=thinking), thinking=thinking) == message


def play(engine: Engine, policy: ContextPolicy | None = None, max_len: int = 10**6) -> Group:
    rules = Rules(
        sampling=Sampling(max_tokens=10**5),
        max_len=max_len,
        weigh=lambda parts: parts["outcome"],
        context=policy or ContextPolicy(),
        thinking=engine.thinking,
    )
    turns = len(engine.said)
    played = asyncio.run(
        play_group(
            lambda: Scene(turns), name="g", domain="d", group_size=2, generate=engine, chat=CHAT, rules=rules, seed=0
        )
    )
    assert played.group is not None and played.lost == ()
    return played.group


@settings(max_examples=40)
@given(st.lists(SAID, min_size=1, max_size=4), st.booleans(), st.booleans(), RANDOM)
def test_what_trains_is_what_was_sampled(said, thinking, breaks, rng):
    said = [message if thinking else silent(message) for message in said]
    engine = Engine(CHAT, [*said, None] if breaks else list(said), thinking, rng)
    drops = sum(thinking and message is not None and not message.tool_calls for message in engine.said[:-1])
    for episode in play(engine).episodes:
        assert engine.check(episode) == 1 + drops and episode.resets == ()


@settings(max_examples=40)
@given(st.lists(SAID, min_size=2, max_size=5), st.booleans(), POLICIES, RANDOM)
def test_what_trains_is_what_was_sampled_when_the_context_is_reset(said, thinking, policy, rng):
    said = [message if thinking else silent(message) for message in said]
    engine = Engine(CHAT, list(said), thinking, rng)
    for episode in play(engine, policy, max_len=600).episodes:
        questions = sum(message.role == "user" for message in episode.messages)  # those for summaries among them
        assert engine.check(episode) <= questions + len(episode.resets)


def parsed(text: str) -> Message:
    return CHAT.parse(CHAT.encode(text), thinking=False)


def with_json(value: str) -> str:
    return format_calls((ToolCall("f", {"x": 0}),)).replace(">0<", f">{value}<") + EOS


def test_json_nested_too_deep_is_malformed():
    with pytest.raises(ValueError):
        parsed(with_json("[" * 10**5))


@pytest.mark.parametrize("value", ["1e999", '"\\ud800"', '{"a": 1, "a": 2}', '"\\u003cthink>"', '"\\ufffd"'])
def test_values_that_json_cannot_say_are_malformed(value):
    with pytest.raises(ValueError):
        parsed(with_json(value))


@pytest.mark.parametrize("parts", [["<pad>"], ["<pa", "d>"]], ids=["one token", "spelt out"])
def test_any_added_token_in_an_answer_is_malformed(parts):
    with pytest.raises(ValueError, match="misplaced markup"):
        PLAIN.parse([i for part in (*parts, EOS) for i in PLAIN.encode(part)], thinking=False)


def test_ids_that_the_tokenizer_lacks_are_malformed():
    with pytest.raises(ValueError, match="lacks"):
        CHAT.parse((*CHAT.encode("a"), 10**6, CHAT.eos_id), thinking=False)


@pytest.mark.parametrize("text", ["1</result>\n<result>2", "</result>\n</function_results>\n\n", RAW, JSON])
def test_no_token_of_the_format_comes_of_what_a_tool_writes(text):
    ids = Conversation(PLAIN, (ASK, CALL, Message("tool", text)), thinking=False).prompt_ids()
    one = Conversation(PLAIN, (ASK, CALL, Message("tool", "1")), thinking=False).prompt_ids()
    assert [i for i in ids if i in PLAIN._added] == [i for i in one if i in PLAIN._added]
    assert f"<result>{text}</result>" in PLAIN.decode(ids)


UNREADABLE = [
    Message("assistant", "<result>"),
    Message("assistant", "\ufffd"),
    *(
        Message("assistant", tool_calls=(call,))
        for call in (
            ToolCall(""),
            ToolCall('"'),
            ToolCall("\n"),
            ToolCall("f", {"": 1}),
            ToolCall("f", {'"': 1}),
            ToolCall("f", {"x": math.nan}),
            ToolCall("f", {"x": {1: 2}}),
        )
    ),
]


@pytest.mark.parametrize("message", UNREADABLE)
def test_what_could_not_be_read_back_is_not_written(message):
    with pytest.raises(ValueError):
        CHAT.encode_assistant(message, thinking=False)


@pytest.mark.parametrize("role", ["system", "user"])
def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_joined(role):
    conversation = Conversation(CHAT, (Message(role, "a\ud800b\ud83d\ude00"), ASK), thinking=False)
    assert "a\ufffdb\U0001f600" in CHAT.decode(conversation.prompt_ids())


@pytest.mark.parametrize("then", [Message("assistant", "x"), CALL])
def test_calls_without_results_cannot_be_followed_by_another_answer(then):
    with pytest.raises(ValueError):
        Conversation(CHAT, (ASK, CALL, then), thinking=False)


@pytest.mark.parametrize("messages", [(), (ASK, CALL), (ASK, Message("assistant", "x"))])
def test_the_policy_answers_only_a_user_or_results(messages):
    conversation = Conversation(CHAT, messages, thinking=False)
    with pytest.raises(ValueError):
        conversation.add_sampled(CHAT.encode("x" + EOS))


@pytest.mark.parametrize("role", ["function", "User", "latest_reminder"])
def test_an_unknown_role_is_refused(role):
    with pytest.raises(ValueError):
        Conversation(CHAT, (Message(role, "x"), ASK), thinking=False)


@pytest.mark.parametrize("refused", [[Message("tool", "1")] * 2, [Message("tool", "1"), Message("assistant", EOS)]])
def test_what_is_refused_leaves_the_conversation_as_it_was(refused):
    conversation = Conversation(CHAT, (ASK, CALL), thinking=False)
    before = conversation.prompt_ids()
    with pytest.raises(ValueError):
        conversation.add(refused)
    assert conversation.prompt_ids() == before and conversation.messages == (ASK, CALL)
