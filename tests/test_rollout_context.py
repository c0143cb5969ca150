"""Context policies: what the policy sees after each reset, and what of it trains."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene import ASK, Engine, Scene
from test_rollout_template import CHAT as TEMPLATE_CHAT

from trimtab.environments.base import Message, Step, ToolCall
from trimtab.rollout.attempt import Rules
from trimtab.rollout.context import OMITTED, SUMMARISE, SUMMARY, Context, ContextPolicy, Format, fewest_steps, steps
from trimtab.rollout.play import PlayedGroup, play_group
from trimtab.rollout.scripted import byte_chat
from trimtab.rollout.types import Completion, Episode, Request, Sampling

CHAT = byte_chat()
CHATS = pytest.mark.parametrize("chat", [CHAT, TEMPLATE_CHAT], ids=["V3.2", "template"])
SYSTEM, AGAIN = Message("system", "S"), Message("user", "And then?")
ANSWER = Message("assistant", "15", reasoning="add")
NOTES = Message("assistant", "Known: 3.", reasoning="sum up")


def look(i: int) -> Message:
    return Message("assistant", "", f"think {i}", (ToolCall("get", {"key": f"k{i}"}),))


def round_of(i: int) -> tuple[Message, Message]:
    return look(i), Message("tool", f"result {i}")


def omitted(one: tuple[Message, Message]) -> tuple[Message, Message]:
    return one[0], Message("tool", OMITTED)


R1, R2, R3, R4 = map(round_of, (1, 2, 3, 4))
DEMONSTRATION = (ASK, *round_of(0), ANSWER)


def spelt(chat: Format, message: Message, *, thinking: bool = True) -> tuple[int, ...]:
    """message, in other tokens than the tokenizer's: letter by letter where the letters are one token each."""
    ids = chat.encode_assistant(message, thinking=thinking)
    return tuple(i for one in ids for i in letters(chat, one))


def letters(chat: Format, one: int) -> Sequence[int]:
    text = chat.decode([one])
    return [i for letter in text for i in chat.encode(letter)] if text.isascii() and text.isalpha() else [one]


def talk(
    chat: Format, opening: Sequence[Message], said: Sequence[Message], policy: ContextPolicy, window: float = 1.02
) -> Context:
    """A context in which all was said; window is how many times as long its window is."""
    length = len(say(chat, Context(chat, opening, ContextPolicy(), thinking=True, max_len=1), said).prompt_ids())
    return say(chat, Context(chat, opening, policy, thinking=True, max_len=int(window * length)), said)


def say(chat: Format, context: Context, said: Sequence[Message]) -> Context:
    for message in said:
        if message.role == "assistant":
            context.add_sampled(np.array(spelt(chat, message)))
        else:
            context.add([message])
    return context


def fresh(chat: Format, messages: Sequence[Message]) -> str:
    """The text of a conversation that consists of messages."""
    return chat.decode(chat.conversation(messages, thinking=True).prompt_ids())


ROUNDS = (*R1, *R2, *R3, *R4)
SUMMARISING = ContextPolicy(method="summary", trigger=0.3)


@CHATS
@pytest.mark.parametrize(
    ("opening", "said", "policy", "kept"),
    [
        ((SYSTEM, ASK), ROUNDS, ContextPolicy(method="discard-all"), (SYSTEM, ASK)),
        ((SYSTEM, ASK), ROUNDS, ContextPolicy(method="discard-75"), (SYSTEM, ASK, *R4)),
        ((SYSTEM, ASK), (*R1, *R2, *R3), ContextPolicy(method="discard-75"), (SYSTEM, ASK, *R3)),
        (
            (SYSTEM, ASK),
            ROUNDS,
            ContextPolicy(method="keep-recent", keep=3),
            (SYSTEM, ASK, *omitted(R1), *R2, *R3, *R4),
        ),
        (
            (SYSTEM, ASK),
            ROUNDS,
            ContextPolicy(method="keep-recent", keep=1, discard_all_at=0.1),
            (SYSTEM, ASK),
        ),
        ((ASK,), (*R1, ANSWER, AGAIN, *R2, *R3), ContextPolicy(method="discard-all"), (ASK, ANSWER, AGAIN)),
        (
            (ASK,),
            (*R1, *R2, ANSWER, AGAIN, *R3),
            ContextPolicy(method="keep-recent", keep=2),
            (ASK, *omitted(R1), *R2, ANSWER, AGAIN, *R3),
        ),
        ((ASK,), (*R1, *R2, ANSWER, AGAIN), ContextPolicy(method="discard-all"), (ASK, ANSWER, AGAIN)),
        ((*DEMONSTRATION, AGAIN), (*R1, *R2), ContextPolicy(method="discard-all"), (*DEMONSTRATION, AGAIN)),
    ],
    ids=["all", "75 % of 4", "75 % of 3", "recent", "recent and all", "users", "old round", "user last", "opening"],
)
def test_after_a_reset_the_policy_sees_a_conversation_in_which_the_rest_was_never_said(
    chat, opening, said, policy, kept
):
    context = talk(chat, opening, said, policy)
    assert chat.decode(context.next_prompt()) == fresh(chat, kept)
    assert context.messages == (*opening, *said) and context.resets == (len(context.messages),)


def test_what_discard_75_leaves_reads_so():
    context = talk(CHAT, (SYSTEM, ASK), ROUNDS, ContextPolicy(method="discard-75"))
    assert CHAT.decode(context.next_prompt()) == (
        "<｜begin▁of▁sentence｜>S<｜User｜>12 + 3?<｜Assistant｜><think>think 4</think>\n\n<｜DSML｜function_calls>\n"  # noqa: RUF001
        '<｜DSML｜invoke name="get">\n<｜DSML｜parameter name="key" string="true">k4</｜DSML｜parameter>\n'  # noqa: RUF001
        "</｜DSML｜invoke>\n</｜DSML｜function_calls><｜end▁of▁sentence｜>\n\n<function_results>\n"  # noqa: RUF001
        "<result>result 4</result>\n</function_results>\n\n<think>"
    )


@CHATS
def test_what_stays_is_carried_as_it_was_sampled(chat):
    context = talk(chat, (ASK,), ROUNDS, ContextPolicy(method="keep-recent", keep=2))
    prompt = context.next_prompt()
    for message in (R1[0], R2[0], R3[0], R4[0]):
        said = spelt(chat, message)
        assert any(prompt[at : at + len(said)] == said for at in range(len(prompt)))


@CHATS
@pytest.mark.parametrize(
    ("said", "policy", "window"),
    [
        (ROUNDS, ContextPolicy(method="discard-all"), 1.3),
        (ROUNDS, ContextPolicy(), 1),
        (R1, ContextPolicy(method="discard-75"), 1),
        (ROUNDS, ContextPolicy(method="keep-recent", keep=4), 1),
        ((ANSWER, AGAIN), ContextPolicy(method="discard-all"), 1),
        ((ANSWER, AGAIN), ContextPolicy(method="summary"), 1),
        (ROUNDS, ContextPolicy(method="summary"), 0.3),
    ],
    ids=["below the trigger", "none", "one round", "few rounds", "no round", "nothing to sum up", "no room to sum up"],
)
def test_where_nothing_is_to_be_done_or_gained_the_conversation_goes_on(chat, said, policy, window):
    context = talk(chat, (ASK,), said, policy, window)
    before = context.prompt_ids()
    assert context.next_prompt() == before and context.resets == () and not context.summarising
    assert context.messages == (ASK, *said)


@CHATS
def test_a_summary_takes_the_place_of_all_rounds_and_of_the_summary_before(chat):
    context = talk(chat, (SYSTEM, ASK), (*R1, *R2), SUMMARISING, window=3)
    request = Message("user", SUMMARISE)
    assert chat.decode(context.next_prompt()) == fresh(chat, (SYSTEM, ASK, *R1, *R2, request))
    assert context.summarising and context.resets == ()
    assert context.add_sampled(np.array(spelt(chat, NOTES))) == NOTES
    noted = Message("user", ASK.content + SUMMARY + "Known: 3.")
    assert chat.decode(context.next_prompt()) == fresh(chat, (SYSTEM, noted))
    assert not context.summarising and context.resets == (8,)
    context.add_sampled(np.array(spelt(chat, ANSWER)))
    context.add([AGAIN])
    say(chat, context, (*R3, *R4))
    assert chat.decode(context.next_prompt()) == fresh(chat, (SYSTEM, noted, ANSWER, AGAIN, *R3, *R4, request))
    context.add_sampled(np.array(spelt(chat, replace(NOTES, content="Known: 7."))))
    noted = Message("user", AGAIN.content + SUMMARY + "Known: 7.")
    assert chat.decode(context.next_prompt()) == fresh(chat, (SYSTEM, ASK, ANSWER, noted))
    said = (*R1, *R2, request, NOTES, ANSWER, AGAIN, *R3, *R4, request, replace(NOTES, content="Known: 7."))
    assert context.messages == (SYSTEM, ASK, *said) and context.resets == (8, len(said) + 2)


@CHATS
def test_a_round_that_leaves_no_room_for_the_summary_is_not_summed_up(chat):
    long = Message("tool", "word " * 200)
    context = talk(chat, (ASK,), (*R1, R2[0], long), ContextPolicy(method="summary"))
    assert chat.decode(context.next_prompt()) == fresh(chat, (ASK, *R1, Message("user", SUMMARISE)))
    context.add_sampled(np.array(spelt(chat, NOTES)))
    assert chat.decode(context.next_prompt()) == fresh(chat, (Message("user", ASK.content + SUMMARY + "Known: 3."),))


@CHATS
@pytest.mark.parametrize("said", [R3[0], "no end of thinking"], ids=["calls", "unreadable"])
def test_a_summary_that_calls_or_cannot_be_read_is_malformed(chat, said):
    context = talk(chat, (ASK,), (*R1, *R2), SUMMARISING, window=3)
    context.next_prompt()
    before = context.messages
    with pytest.raises(ValueError):
        context.add_sampled(np.array(chat.encode(said) if isinstance(said, str) else spelt(chat, said)))
    assert context.messages == before and context.resets == ()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ContextPolicy(trigger=0), "trigger is a share"),
        (lambda: ContextPolicy(trigger=1.1), "trigger is a share"),
        (lambda: ContextPolicy(keep=0), "keep must be at least 1"),
        (lambda: ContextPolicy(method="summary", discard_all_at=0.9), "goes with keep-recent"),
        (lambda: ContextPolicy(method="keep-recent", discard_all_at=0), "discard_all_at is a share"),
    ],
)
def test_an_impossible_policy_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


@dataclass
class Talk(Scene):
    """A scene with a system message and results of some length."""

    opening: tuple[Message, ...] = (SYSTEM, ASK)
    length: int = 1

    async def step(self, message: Message) -> Step:
        step = await super().step(message)
        return replace(step, replies=tuple(replace(one, content=one.content * self.length) for one in step.replies))


@dataclass
class Noting(Engine):
    """Says what it is told to, and NOTES where a summary is asked for."""

    async def __call__(self, request: Request) -> list[Completion]:
        names = [request.name.partition(".")[0]] if "." in request.name else [f"g#{i}" for i in range(request.n)]
        return [self.say(request, name, self.spell(self.turn(request.prompt_ids, name))) for name in names]

    def turn(self, prompt: tuple[int, ...], name: str) -> Message | None:
        return silent(NOTES, self.thinking) if self.asks(prompt) else self.said[self.answered(name)]

    def asks(self, prompt: tuple[int, ...]) -> bool:
        return SUMMARISE in self.chat.decode(prompt)

    def answered(self, name: str) -> int:
        """Turns so far that were no summaries."""
        return sum(not self.asks(prompt) for prompt, *_ in self.seen.get(name, ()))


def play(engine: Engine, length: int, **changes) -> PlayedGroup:
    rules = Rules(sampling=Sampling(max_tokens=10**5), max_len=10**6, weigh=lambda parts: parts["outcome"])
    return asyncio.run(
        play_group(
            lambda: Talk(len(engine.said), length=length),
            name="g",
            domain="d",
            group_size=2,
            generate=engine,
            chat=engine.chat,
            rules=replace(rules, thinking=engine.thinking, **changes),
            seed=0,
        )
    )


def silent(message: Message, thinking: bool) -> Message:
    return message if thinking else replace(message, reasoning="")


POLICIES = (
    ContextPolicy(method="summary", trigger=0.4),
    ContextPolicy(method="discard-75"),
    ContextPolicy(method="discard-all"),
    ContextPolicy(method="keep-recent", keep=1, trigger=0.5, discard_all_at=0.7),
)
SAID = st.one_of(
    st.just(ANSWER), st.lists(st.sampled_from(["a", "bc"]), min_size=1, max_size=2).map(lambda names: calls(*names))
)


def calls(*names: str) -> Message:
    return Message("assistant", "Wait.", "look", tuple(ToolCall(name, {"x": 1}) for name in names))


@CHATS
@settings(max_examples=15)
@given(
    st.lists(SAID, min_size=3, max_size=8),
    st.booleans(),
    st.sampled_from(POLICIES),
    st.integers(40, 200),
    st.integers(0, 99),
)
def test_what_trains_is_what_was_sampled_across_resets(chat, said, thinking, policy, length, seed):
    said = [silent(message, thinking) for message in said]
    engine = Noting(chat, said, thinking, random.Random(seed))
    max_len = 2000 if chat is CHAT else 1200
    played = play(engine, length, context=policy, max_len=max_len, max_turns=30)
    assert played.group is not None and played.lost == ()
    for episode in played.group.episodes:
        assert engine.check(episode) >= 1 + len(episode.resets)
        sampled = chain.from_iterable(one.token_ids[one.sampled].tolist() for one in episode.segments)
        assert list(sampled) == [i for _, ids, _ in engine.seen[episode.name] for i in ids]
        assert all(len(prompt) < max_len for prompt, *_ in engine.seen[episode.name])
        spoken = [message for message in episode.messages if message.role == "assistant"]
        answered = engine.answered(episode.name)
        assert [message for message in spoken if message != silent(NOTES, thinking)] == said[:answered]
        assert len(spoken) == len(engine.seen[episode.name])
        assert episode.ended == ("done" if answered == len(said) else "length")


@CHATS
def test_a_summary_is_a_segment_of_its_own(chat):
    engine = Noting(chat, [calls("abcd"), calls("efgh"), ANSWER], True, random.Random(0))
    group = play(engine, 250, context=ContextPolicy(method="summary", trigger=0.6), max_len=1900).group
    assert group is not None
    for episode in group.episodes:
        assert episode.ended == "done" and len(episode.resets) == 1 and len(episode.segments) == 3
        looked, summary, answered = episode.segments
        assert chat.decode(summary.token_ids[summary.sampled]) == chat.decode(spelt(chat, NOTES))
        assert SUMMARISE in chat.decode(summary.token_ids) and "look" not in chat.decode(summary.token_ids)
        assert "abcd" not in chat.decode(answered.token_ids) and "Known: 3." in chat.decode(answered.token_ids)
        assert chat.decode(looked.token_ids[looked.sampled]) == "".join(
            chat.decode(spelt(chat, message)) for message in engine.said[:2] if message
        )


@pytest.mark.parametrize(
    ("policy", "ended", "turns"),
    [
        (ContextPolicy(), "length", 1),
        (ContextPolicy(method="summary"), "length", 1),
        (ContextPolicy(method="discard-75"), "length", 1),
        (ContextPolicy(method="keep-recent"), "length", 1),
        (ContextPolicy(method="discard-all"), "turns", 20),
        (ContextPolicy(method="keep-recent", discard_all_at=1), "turns", 20),
    ],
)
def test_results_that_never_fit_end_the_episode(policy, ended, turns):
    engine = Noting(CHAT, [calls("x")] * 50, True, random.Random(0))
    group = play(engine, 1000, context=policy, max_len=1500, max_turns=20).group
    assert group is not None
    for episode in group.episodes:
        assert episode.ended == ended and len(engine.seen[episode.name]) == turns
        assert len(episode.resets) == turns - 1


@pytest.mark.parametrize(
    ("attempts", "chosen"),
    [
        ([("done", 3), ("done", 2), ("done", 2)], 1),
        ([("length", 1), ("done", 5), ("turns", 0)], 1),
        ([("length", 1), ("malformed", 0)], None),
        ([], None),
    ],
)
def test_of_parallel_attempts_the_answer_with_the_fewest_steps_counts(attempts, chosen):
    episodes = [
        Episode(
            name=str(i),
            domain="d",
            messages=(ASK, *[one for _ in range(count) for one in R1], ANSWER),
            segments=(),
            rewards={},
            reward=0.0,
            ended=ended,
        )
        for i, (ended, count) in enumerate(attempts)
    ]
    assert [steps(episode) for episode in episodes] == [count for _, count in attempts]
    found = fewest_steps(episodes)
    assert (found and int(found.name)) == chosen


def test_an_attempt_that_ends_in_a_call_has_not_answered():
    played = play(Noting(CHAT, [calls("x")], True, random.Random(0)), 1)
    assert played.group is not None and fewest_steps(played.group.episodes) is None
