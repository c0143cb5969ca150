"""Episodes over a scripted engine: what reaches the environment, and what training gets."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from tiny import tiny_tokenizer

from trimtab.environments.base import Message, Step, ToolCall, VoidEpisode
from trimtab.rewards.types import Answer
from trimtab.rollout.attempt import Rules
from trimtab.rollout.formats.chat import Chat
from trimtab.rollout.play import PlayedGroup, gather, play_group
from trimtab.rollout.types import Completion, Request, Sampling

CHAT = Chat(tiny_tokenizer())
ASK = Message("user", "12 + 3?")
CALL = Message("assistant", reasoning="look", tool_calls=(ToolCall("get", {"key": "a"}),))
ANSWER = Message("assistant", "15", reasoning="add")
LAYERS, TOP_K = 2, 2


def ids_of(said: Message | str) -> tuple[int, ...]:
    return CHAT.encode(said) if isinstance(said, str) else CHAT.encode_assistant(said, thinking=True)


class Script:
    """An engine that says what it was told to, turn by turn, and routes each position by its number."""

    def __init__(self, *turns: Message | str, spoil: Callable[[Completion], Completion] = lambda one: one):
        self.turns, self.spoil, self.requests = turns, spoil, list[Request]()

    async def __call__(self, request: Request) -> list[Completion]:
        self.requests.append(request)
        turn = int(request.name.rpartition(".")[2]) if "." in request.name else 0
        return [self.spoil(self.say(request, ids_of(self.turns[turn]))) for _ in range(request.n)]

    def say(self, request: Request, ids: tuple[int, ...]) -> Completion:
        token_ids = np.array(ids[: request.sampling.max_tokens], np.int32)
        end = len(request.prompt_ids) + len(token_ids) - 1
        rows = np.arange(request.routes_start, end)
        return Completion(
            token_ids=token_ids,
            logp=np.full(len(token_ids), -1.0, np.float32),
            kept_ids=token_ids,
            kept_offsets=np.arange(len(token_ids) + 1),
            routes=np.stack([rows % 8, rows % 8 + 8], -1)[:, None].repeat(LAYERS, 1).astype(np.uint8),
            weight_version=3,
            finish="stop" if token_ids[-1] == CHAT.eos_id else "length",
        )


@dataclass
class Scene:
    """An environment that answers with given steps, or raises what it is given."""

    steps: list[Step | Exception]
    opening: tuple[Message, ...] | Exception = (ASK,)

    async def start(self) -> tuple[Message, ...]:
        if isinstance(self.opening, Exception):
            raise self.opening
        return self.opening

    async def step(self, message: Message) -> Step:
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step


def weigh(parts: Mapping[str, float]) -> float:
    return parts.get("outcome", 0.0) + 0.5 * parts.get("length", 0.0)


def kinds(played: PlayedGroup) -> list[str]:
    return [one.kind for one in played.lost]


def play(script: Script, *steps: Step | Exception, **changes: Any) -> PlayedGroup:
    return play_scenes(script, lambda: Scene(list(steps)), **changes)


def play_scenes(script: Script, make_env: Callable[[], Any], **changes: Any) -> PlayedGroup:
    return asyncio.run(playing(script, make_env, **changes))


def playing(script: Script, make_env: Callable[[], Any], **changes: Any) -> Coroutine[Any, Any, PlayedGroup]:
    rules = replace(Rules(sampling=Sampling(max_tokens=100), weigh=weigh, max_len=400), **changes)
    return play_group(
        make_env, name="step0/agent", domain="agent", group_size=2, generate=script, chat=CHAT, rules=rules, seed=1
    )


DONE = Step(rewards={"outcome": 1.0}, done=True)
LOOKED_UP = Step(replies=(Message("tool", "15"),), rewards={"outcome": 0.25})


def test_an_episode_ends_with_its_rewards_and_its_messages():
    script = Script(ANSWER)
    group = play(script, DONE, group_rewards={"length": lambda answers: [-one.length for one in answers]}).group
    assert group is not None and group.name == "step0/agent" and len(group.episodes) == 2
    for i, episode in enumerate(group.episodes):
        sampled = len(ids_of(ANSWER))
        assert episode.ended == "done" and episode.messages == (ASK, ANSWER)
        assert episode.rewards == {"outcome": 1.0, "length": -sampled} and episode.reward == 1 - 0.5 * sampled
        assert episode.name == f"step0/agent#{i}" and episode.domain == "agent"
    assert [(request.name, request.n) for request in script.requests] == [("step0/agent#0", 2)]


def test_tool_results_extend_the_same_segment_and_only_new_routes_are_asked_for():
    script = Script(CALL, ANSWER)
    group = play(script, LOOKED_UP, DONE).group
    assert group is not None
    (segment,) = group.episodes[0].segments
    assert group.episodes[0].rewards == {"outcome": 1.25}
    assert CHAT.decode(segment.token_ids[segment.sampled]) == CHAT.decode(ids_of(CALL) + ids_of(ANSWER))
    rows = np.arange(len(segment.token_ids) - 1)
    assert (segment.routes[:, 0, 0] == rows % 8).all()
    assert segment.weight_version.tolist() == [3] * int(segment.sampled.sum())
    first, second, _ = script.requests
    assert second.routes_start == len(first.prompt_ids) + len(ids_of(CALL)) - 1
    assert first.seed != second.seed


def test_a_new_user_message_starts_a_segment_without_the_earlier_reasoning():
    script = Script(ANSWER, ANSWER)
    group = play(script, Step(replies=(Message("user", "And?"),)), DONE).group
    assert group is not None
    first, second = group.episodes[0].segments
    assert "add" in CHAT.decode(first.token_ids)
    assert CHAT.decode(second.token_ids[~second.sampled]).count("add") == 0
    assert second.sampled.sum() == len(ids_of(ANSWER)) and script.requests[1].routes_start == 0


@pytest.mark.parametrize(
    ("said", "steps", "changes", "ended", "earned"),
    [
        ((ANSWER,), (), {"sampling": Sampling(max_tokens=3)}, "length", 0.0),
        (("nothing</think>", CALL), (), {}, "length", 0.0),
        (("no end of thinking<｜end▁of▁sentence｜>",), (), {}, "malformed", 0.0),  # noqa: RUF001
        ((CALL, "</think></think><｜end▁of▁sentence｜>"), (LOOKED_UP,), {}, "malformed", 0.25),  # noqa: RUF001
        ((CALL, CALL), (LOOKED_UP, LOOKED_UP), {"max_turns": 2}, "turns", 0.5),
        ((CALL, CALL), (Step(replies=(Message("tool", "1" * 400),)),), {}, "length", 0.0),
    ],
    ids=["cut", "no end", "malformed", "malformed later", "too many turns", "context full"],
)
def test_an_episode_that_goes_wrong_keeps_what_it_earned_and_trains(said, steps, changes, ended, earned):
    group = play(Script(*said), *steps, **changes).group
    assert group is not None
    for episode in group.episodes:
        assert episode.ended == ended and episode.rewards == {"outcome": earned} and episode.reward == earned
        assert episode.segments and episode.messages[-1].role in ("assistant", "tool")


def test_a_turn_never_samples_beyond_the_context():
    script = Script(CALL, CALL)
    play(script, LOOKED_UP, LOOKED_UP, max_turns=2, max_len=120)
    assert all(len(request.prompt_ids) + request.sampling.max_tokens <= 120 for request in script.requests)


def test_a_voided_episode_is_counted_and_never_scored():
    played = play(Script(ANSWER), VoidEpisode("the judge is silent"))
    assert played.group is None and kinds(played) == ["environment"] * 2
    assert {one.reason for one in played.lost} == {"the judge is silent"}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda one: replace(one, routes=one.routes[:-1]), "routes of shape"),
        (lambda one: replace(one, routes=np.zeros_like(one.routes)), "repeats an expert"),
        (lambda one: replace(one, logp=one.logp * np.nan), "not finite"),
        (lambda one: replace(one, kept_ids=one.kept_ids + 1), "in its kept set"),
        (lambda one: replace(one, kept_ids=one.kept_ids[:0], kept_offsets=one.kept_offsets[:1]), "0 kept sets"),
    ],
)
def test_an_incomplete_recording_is_refused_with_its_reason(spoil, reason):
    played = play(Script(ANSWER, spoil=spoil), DONE)
    assert played.group is None and kinds(played) == ["recording"] * 2
    assert all(one.reason.startswith("step0/agent#") and reason in one.reason for one in played.lost)


def test_a_tool_that_answers_in_markup_is_shown_it_as_data():
    played = play(Script(CALL, ANSWER), Step(replies=(Message("tool", "</think>"),)), DONE)
    assert played.group is not None and played.lost == ()
    (segment,) = played.group.episodes[0].segments
    plain = play(Script(CALL, ANSWER), Step(replies=(Message("tool", "15"),)), DONE).group
    assert plain is not None
    close = CHAT.think_close_id
    assert (segment.token_ids == close).sum() == (plain.episodes[0].segments[0].token_ids == close).sum()
    assert "<result></think></result>" in CHAT.decode(segment.token_ids)


def test_an_engine_without_experts_needs_no_routes():
    script = Script(CALL, ANSWER, spoil=lambda one: replace(one, routes=np.zeros((0, 0, 0), np.uint8)))
    group = play(script, LOOKED_UP, DONE).group
    assert group is not None
    (segment,) = group.episodes[0].segments
    assert segment.routes.shape == (len(segment.token_ids) - 1, 0, 0)


def test_environments_of_a_group_must_open_alike_and_fit():
    openings = iter("ab")
    played = play_scenes(Script(ANSWER), lambda: Scene([DONE], (Message("user", next(openings)),)))
    assert kinds(played) == ["opening"] * 2 and "open with the same messages" in played.lost[0].reason
    played = play(Script(ANSWER), DONE, max_len=5)
    assert kinds(played) == ["opening"] * 2 and "does not fit max_len = 5" in played.lost[0].reason


def test_an_environment_that_cannot_start_voids_its_episode_alone():
    openings = iter([(ASK,), VoidEpisode("no kernel"), (ASK,)])
    script = Script(ANSWER)
    played = asyncio.run(
        play_group(
            lambda: Scene([DONE], next(openings)),
            name="g",
            domain="d",
            group_size=3,
            generate=script,
            chat=CHAT,
            rules=Rules(sampling=Sampling(max_tokens=100), weigh=weigh, max_len=400),
            seed=0,
        )
    )
    assert kinds(played) == ["environment"] and played.group is not None and len(played.group.episodes) == 2
    assert script.requests[0].n == 2
    assert kinds(play_scenes(script, lambda: Scene([], VoidEpisode("no kernel")))) == ["environment"] * 2


class Kernel(Scene):
    """A scene that holds something until it is closed, and waits where it has no step left."""

    running: ClassVar[set[int]] = set()

    async def start(self) -> tuple[Message, ...]:
        self.running.add(id(self))
        return await super().start()

    async def step(self, message: Message) -> Step:
        if not self.steps:
            await asyncio.sleep(60)
        return await super().step(message)

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.running.discard(id(self))


@pytest.mark.parametrize(
    ("steps", "opening", "error"),
    [
        ([DONE], (ASK,), None),
        ([VoidEpisode("broken")], (ASK,), None),
        ([], VoidEpisode("no kernel"), None),
        ([Step(replies=(Message("assistant", "?"),))], (ASK,), None),
        ([KeyError("a bug")], (ASK,), None),
        ([], KeyError("a bug"), None),
        ([DONE], (Message("user", "a" * 500),), None),
        ([], (ASK,), TimeoutError),
    ],
    ids=["done", "void", "no start", "unsayable", "bug", "bug at start", "does not fit", "cancelled"],
)
def test_every_environment_is_closed_however_its_episode_ends(steps, opening, error):
    async def run() -> None:
        made = iter([Kernel(list(steps), opening), Kernel([] if error else list(steps), (ASK,) if error else opening)])
        await asyncio.wait_for(playing(Script(ANSWER), made.__next__), 0.5)

    with nullcontext() if error is None else pytest.raises(error):
        asyncio.run(run())
    assert set() == Kernel.running


def test_what_is_gathered_has_ended_before_the_error_is_raised():
    ended = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        asyncio.run(gather([wait(), fail(), wait()]))
    assert ended == [True, True]


def test_group_rewards_compare_the_episodes_that_are_left_and_see_their_parts():
    seen: list[Sequence[Answer]] = []

    def rank(answers: Sequence[Answer]) -> list[float]:
        seen.append(answers)
        return [float(i) for i in range(len(answers))]

    steps = iter([Step(rewards={"outcome": 1.0}, done=True, notes={"rubric": "fine"}), VoidEpisode("silent"), DONE])
    rules = Rules(sampling=Sampling(max_tokens=100), weigh=lambda p: p["outcome"] + p["rank"], max_len=400)
    played = asyncio.run(
        play_group(
            lambda: Scene([next(steps)]),
            name="g",
            domain="d",
            group_size=3,
            generate=Script(ANSWER),
            chat=CHAT,
            rules=replace(rules, group_rewards={"rank": rank}),
            seed=0,
        )
    )
    assert played.group is not None and kinds(played) == ["environment"]
    answer = Answer("15", "add", len(ids_of(ANSWER)), {"outcome": 1.0})
    assert seen == [[answer, answer]]
    first, second = played.group.episodes
    assert first.rewards == {"outcome": 1.0, "rank": 0.0} and second.rewards == {"outcome": 1.0, "rank": 1.0}
    assert (first.reward, second.reward) == (1.0, 2.0) and first.notes == {"rubric": "fine"}


def test_an_episode_without_an_answer_is_compared_with_no_text():
    texts = []

    def look(answers: Sequence[Answer]) -> list[float]:
        texts.extend((one.text, one.length, dict(one.rewards)) for one in answers)
        return [0.0] * len(answers)

    play(Script(ANSWER), sampling=Sampling(max_tokens=3), group_rewards={"look": look})
    assert texts == [("", 3, {"outcome": 0.0})] * 2


def test_process_rewards_score_each_segment_and_their_sum_is_the_part():
    seen: list[Answer] = []

    def calls(answers: Sequence[Answer]) -> list[float]:
        seen.extend(answers)
        return [float(one.text.count("arguments")) for one in answers]

    steps = (LOOKED_UP, Step(replies=(Message("user", "And?"),), rewards={"outcome": 0.5}), DONE)
    group = play(Script(CALL, ANSWER, ANSWER), *steps, process_rewards={"calls": calls}).group
    assert group is not None
    for episode in group.episodes:
        assert episode.process == {"calls": (1.0, 0.0)} and episode.rewards == {"outcome": 1.75, "calls": 1.0}
    sampled = [len(ids_of(CALL)) + len(ids_of(ANSWER)), len(ids_of(ANSWER))]
    assert seen[:2] == [
        Answer('{"name": "get", "arguments": {"key": "a"}}\n\n15', "look\n\nadd", sampled[0], {"outcome": 0.75}),
        Answer("15", "add", sampled[1], {"outcome": 1.0}),
    ]


@pytest.mark.parametrize(("kind", "lost"), [("group_rewards", "reward"), ("process_rewards", "environment")])
@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ({"outcome": lambda answers: [0.0] * len(answers)}, "'outcome' comes from two places"),
        ({"none": lambda answers: []}, "one value for each"),
        ({"none": lambda answers: [float("nan")] * len(answers)}, "finite numbers"),
        ({"none": lambda answers: 1 / 0}, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_that_fails_costs_what_it_scores(kind, lost, reward, told):
    played = play(Script(ANSWER), DONE, **{kind: reward})
    assert played.group is None and kinds(played) == [lost] * 2 and told in played.lost[0].reason


def test_a_group_reward_that_cannot_judge_voids_the_group():
    def silent(answers: Sequence[Answer]) -> list[float]:
        raise VoidEpisode("the judge is silent")

    for kind in ("group_rewards", "process_rewards"):
        played = play(Script(ANSWER), DONE, **{kind: {"rank": silent}})
        assert played.group is None and [one.reason for one in played.lost] == ["the judge is silent"] * 2
