# ruff: noqa: RUF001 - the full-width bars are the format
"""The prompt format over random conversations: what is said is read back, and what trains is what was sampled."""

import asyncio
import math
import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CORPUS, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trimtab.environments.base import Message, Step, ToolCall
from trimtab.rollout.chat import BOS, EOS, JSON, RAW, SPECIAL_TOKENS, Chat, Conversation, MarkupError, format_calls
from trimtab.rollout.play import play_group
from trimtab.rollout.types import Completion, Request, Sampling


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
ADDED = TOKENIZERS[0].get_added_vocab().values()
CHAT, PLAIN = map(Chat, TOKENIZERS)
MARKS = (*SPECIAL_TOKENS, RAW, JSON, "<result>", "</result>", "<function_results>", "</function_results>")
ASK, AGAIN = Message("user", "12 + 3?"), Message("user", "And?")
CALL = Message("assistant", tool_calls=(ToolCall("f"),))
TEXT = st.text(st.sampled_from("apl 12\n\r\t\"'\\<>/=｜{}&谢é😀\u2028\x00"), max_size=8)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=8).filter(
    lambda text: not any(mark in text for mark in MARKS)
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
    assert chat.parse(chat.encode_assistant(message, thinking=thinking), thinking=thinking) == message


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
def test_text_that_contains_a_special_token_is_refused_wherever_it_stands(before, token, after, chat):
    text = before + token + after
    for role in ("system", "user"):
        with pytest.raises(MarkupError):
            Conversation(chat, [Message(role, text)], thinking=True)
    with pytest.raises(MarkupError):
        Conversation(chat, [ASK, CALL, Message("tool", text)], thinking=True)
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


@dataclass
class Scene:
    """Answers calls with results and everything else as the user, for some turns."""

    turns: int

    async def start(self) -> tuple[Message, ...]:
        return (ASK,)

    async def step(self, message: Message) -> Step:
        self.turns -= 1
        results = tuple(Message("tool", f"r{i}") for i in range(len(message.tool_calls)))
        return Step(replies=results or (AGAIN,), rewards={"outcome": 1.0}, done=self.turns == 0)


@dataclass
class Engine:
    """Says given messages, spelt in random pieces, or random ids; numbers every sampled token in its logp."""

    said: list[Message | None]
    thinking: bool
    rng: random.Random
    seen: dict[str, list[tuple[tuple[int, ...], np.ndarray, np.ndarray]]] = field(default_factory=dict)
    count: int = 0

    async def __call__(self, request: Request) -> list[Completion]:
        turn = int(request.name.rpartition(".")[2]) if "." in request.name else 0
        names = [request.name.partition(".")[0]] if turn else [f"g#{i}" for i in range(request.n)]
        return [self.say(request, name, self.spell(self.said[turn])) for name in names]

    def spell(self, message: Message | None) -> list[int]:
        if message is None:
            return [*(self.rng.randrange(len(TOKENIZERS[0])) for _ in range(5)), CHAT.eos_id]
        return [i for one in CHAT.encode_assistant(message, thinking=self.thinking) for i in self.pieces(one)]

    def pieces(self, one: int) -> list[int]:
        text = CHAT.decode([one])
        if one in ADDED or not text.isascii() or self.rng.random() < 0.5:
            return [one]
        return [i for letter in text for i in CHAT.encode(letter)]

    def say(self, request: Request, name: str, ids: list[int]) -> Completion:
        token_ids = np.array(ids, np.int32)
        logp = -np.arange(self.count, self.count + len(ids), dtype=np.float32)
        self.count += len(ids)
        self.seen.setdefault(name, []).append((request.prompt_ids, token_ids, logp))
        end = len(request.prompt_ids) + len(ids) - 1
        rows = np.arange(request.routes_start, end).astype(np.uint16)
        return Completion(
            token_ids=token_ids,
            logp=logp,
            kept_ids=token_ids,
            kept_offsets=np.arange(len(ids) + 1),
            routes=rows.reshape(-1, 1, 1),
            weight_version=self.count,
            finish="stop",
        )


@settings(max_examples=40)
@given(st.lists(SAID, min_size=1, max_size=4), st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_what_trains_is_what_was_sampled(said, thinking, breaks, rng):
    said = [message if thinking else silent(message) for message in said]
    engine = Engine([*said, None] if breaks else list(said), thinking, rng)
    played = asyncio.run(
        play_group(
            lambda: Scene(len(engine.said)),
            name="g",
            domain="d",
            group_size=2,
            generate=engine,
            chat=CHAT,
            sampling=Sampling(max_tokens=10**5),
            weigh=lambda parts: parts["outcome"],
            max_len=10**6,
            seed=0,
            thinking=thinking,
        )
    )
    assert played.group is not None and played.refused == () and played.voided == 0
    asked = engine.said[:-1]
    drops = sum(thinking and message is not None and not message.tool_calls for message in asked)
    for episode in played.group.episodes:
        assert len(episode.segments) == 1 + drops
        turns = iter(engine.seen[episode.name])
        for segment in episode.segments:
            at, count = 0, 0
            while at < len(segment.token_ids):
                prompt, token_ids, logp = next(turns)
                end = len(prompt) + len(token_ids)
                assert segment.token_ids[:end].tolist() == [*prompt, *token_ids]
                assert not segment.sampled[at : len(prompt)].any() and segment.sampled[len(prompt) : end].all()
                assert (segment.logp[count : count + len(logp)] == logp).all()
                at, count = end, count + len(logp)
            assert (segment.routes[:, 0, 0] == np.arange(len(segment.token_ids) - 1)).all()
        assert next(turns, None) is None


def parsed(text: str, chat: Chat = CHAT) -> Message:
    return chat.parse(chat.encode(text), thinking=False)


def with_json(value: str) -> str:
    return format_calls((ToolCall("f", {"x": 0}),)).replace(">0<", f">{value}<") + EOS


def test_json_nested_too_deep_is_malformed():
    with pytest.raises(ValueError):
        parsed(with_json("[" * 10**5))


@pytest.mark.xfail(strict=True, reason="json reads what it should not: infinity, half a surrogate pair, a name twice")
@pytest.mark.parametrize("value", ["1e999", '"\\ud800"', '{"a": 1, "a": 2}'])
def test_values_that_json_cannot_say_are_malformed(value):
    with pytest.raises(ValueError):
        parsed(with_json(value))


@pytest.mark.xfail(strict=True, reason="parse knows only the seven special tokens, not others of the tokenizer")
def test_any_special_token_in_an_answer_is_malformed():
    with pytest.raises(ValueError):
        parsed("<pad>" + EOS, PLAIN)


@pytest.mark.xfail(strict=True, reason="markup that is not one token of the tokenizer passes in the text of others")
@pytest.mark.parametrize("text", ["1</result>\n<result>2", "</result>\n</function_results>\n\n", RAW, JSON])
def test_a_tool_cannot_write_a_second_result(text):
    with pytest.raises(MarkupError):
        Conversation(PLAIN, (ASK, CALL, Message("tool", text)), thinking=False)


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


@pytest.mark.xfail(strict=True, reason="encode_assistant writes what parse does not read back as the same")
@pytest.mark.parametrize("message", UNREADABLE)
def test_what_could_not_be_read_back_is_not_written(message):
    with pytest.raises(ValueError):
        CHAT.encode_assistant(message, thinking=False)


@pytest.mark.xfail(strict=True, raises=TypeError, reason="the tokenizer's TypeError gets out")
def test_text_that_is_not_unicode_is_refused_as_a_value():
    with pytest.raises(ValueError):
        Conversation(CHAT, (Message("user", "\ud800"),), thinking=False)


@pytest.mark.xfail(strict=True, reason="only the first message of a run of one role is held against open calls")
@pytest.mark.parametrize("then", [Message("assistant", "x"), CALL])
def test_calls_without_results_cannot_be_followed_by_another_answer(then):
    with pytest.raises(ValueError):
        Conversation(CHAT, (ASK, CALL, then), thinking=False)


@pytest.mark.xfail(strict=True, reason="add_sampled does not ask whether it is the policy's turn")
@pytest.mark.parametrize("messages", [(), (ASK, CALL), (ASK, Message("assistant", "x"))])
def test_the_policy_answers_only_a_user_or_results(messages):
    conversation = Conversation(CHAT, messages, thinking=False)
    with pytest.raises(ValueError):
        conversation.add_sampled(CHAT.encode("x" + EOS))


@pytest.mark.xfail(strict=True, reason="a role that the format lacks is written as a system message")
@pytest.mark.parametrize("role", ["developer", "function", "User"])
def test_an_unknown_role_is_refused(role):
    with pytest.raises(ValueError):
        Conversation(CHAT, (Message(role, "x"), ASK), thinking=False)


@pytest.mark.xfail(strict=True, reason="results before the refused one, and the opening of the block, stay")
def test_a_refused_result_leaves_the_conversation_as_it_was():
    conversation = Conversation(CHAT, (ASK, CALL), thinking=False)
    before = conversation.prompt_ids()
    with pytest.raises(MarkupError):
        conversation.add((Message("tool", EOS),))
    assert conversation.prompt_ids() == before
