"""One text, one row, one tool or one reward that fails costs its episode or its group, and is told."""

import asyncio
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rollout_play import ANSWER, CHAT, DONE, Scene, Script, play, play_scenes, weigh
from test_rollout_template_forms import TEMPLATES, chat_of
from tiny import save_tiny_deepseek

from trimtab.environments.base import Message, Step, VoidEpisode
from trimtab.environments.tools.functions import ToolEnv, tool
from trimtab.grpo.commands.cli import main
from trimtab.grpo.config import Config, Domain, Rollout
from trimtab.grpo.sampling.lost import LostGroups, TooManyLost, without_advantage
from trimtab.grpo.sampling.mixture import Draw, Gate, PlayedBatch, draw_step, load_tasks, play_draws
from trimtab.grpo.setup.rehearsal import STAND_INS, rehearse
from trimtab.grpo.setup.resolve import with_lengths
from trimtab.rollout.context import Context, ContextPolicy
from trimtab.rollout.play import PlayedGroup
from trimtab.rollout.scripted import Scripted, byte_chat
from trimtab.rollout.types import Episode, Group, Lost

MARKS = ("<result>", "</result>\n<result>", "<think>", "</think>", "<｜User｜>", "<|im_end|>", "<|im_start|>user\n", "</s>", "[/INST]", "<｜end▁of▁sentence｜>")  # fmt: skip # noqa: E501, RUF001


def kinds(played: PlayedGroup) -> list[str]:
    return [one.kind for one in played.lost]


# ---- text of the world


@pytest.mark.parametrize("name", sorted(TEMPLATES)[:6])
@settings(max_examples=15, deadline=None)
@given(text=st.lists(st.sampled_from((*MARKS, "a", " ", "\ud800", "1")), max_size=5).map("".join))
def test_whatever_the_world_says_is_played_and_no_token_of_a_format_comes_of_it(name, text):
    for chat in (CHAT, chat_of(name)):
        plain, said = (
            Context(chat, (Message("user", f"a {one} b"),), ContextPolicy(), thinking=False, max_len=10**4)
            if not _opens(chat)
            else Context(chat, (Message("user", f"a {one} b"),), ContextPolicy(), thinking=True, max_len=10**4)
            for one in ("x", text)
        )
        added = chat._added if chat is CHAT else frozenset(chat.added.values())
        found = [[i for i in context.prompt_ids() if i in added] for context in (said, plain)]
        assert found[0] == found[1]
        said.messages[0].content.encode()  # as a file takes it


def _opens(chat: Any) -> bool:
    try:
        chat.verify(thinking=False, tools=False)
        return False
    except ValueError:
        return True


# ---- environments, tools and rewards


class Leaks(Scene):
    """As clients of MCP and anyio do: a CancelledError that nobody asked for."""

    async def step(self, message: Message) -> Step:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future
        return DONE


class Exits(Scene):
    async def step(self, message: Message) -> Step:
        raise SystemExit(3)


class Stubborn(Scene):
    """Swallows every cancellation, for longer than anyone waits."""

    async def step(self, message: Message) -> Step:
        until = time.monotonic() + 60
        while time.monotonic() < until and not STOP.is_set():
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        return DONE


STOP = threading.Event()


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (lambda: Scene([KeyError("row")]), "KeyError: 'row'"),
        (lambda: Scene([Step(rewards={"outcome": float("nan")}, done=True)]), "finite number"),
        (lambda: Scene([Step(rewards={"outcome": "1"}, done=True)]), "finite number"),
        (lambda: Scene([Step(rewards={"outcome": None}, done=True)]), "finite number"),
        (lambda: Leaks([]), "cancelled from within"),
        (lambda: Exits([]), r"ended with SystemExit\(3\)"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: Scene([DONE], opening=None), "TypeError"),
        (lambda: Scene([DONE], opening=()), "nothing to answer|must|message|opening|user"),
    ],
)
def test_what_fails_in_one_environment_costs_its_episode(env, told):
    makers = iter([env, lambda: Scene([DONE]), lambda: Scene([DONE]), env])
    played = play_scenes(Script(ANSWER), lambda: next(makers)())
    assert len(played.lost) >= 1 and re.search(told, played.lost[0].reason), played.lost[0].reason


def test_values_of_numpy_and_torch_are_numbers():
    np = pytest.importorskip("numpy")
    played = play(Script(ANSWER), Step(rewards={"outcome": np.float32(0.5)}, done=True))
    assert played.group is not None and played.group.episodes[0].rewards == {"outcome": 0.5}


def test_a_reward_that_never_returns_costs_its_episode_and_stops_no_other():
    def hangs(message: Message) -> Mapping[str, float]:
        STOP.wait(60)
        return {"outcome": 1.0}

    def reward(message: Message) -> Mapping[str, float]:
        return {"outcome": 1.0}

    rewards = iter([hangs, reward, reward])
    try:
        played = asyncio.run(_three(lambda: ToolEnv("12 + 3?", (), next(rewards)), episode_seconds=0.5))
        assert kinds(played) == ["time"] and "episode_seconds = 0.5" in played.lost[0].reason
        assert played.group is not None and len(played.group.episodes) == 2
    finally:
        STOP.set()
        time.sleep(0.1)
        STOP.clear()


async def _three(make_env: Any, **changes: Any) -> PlayedGroup:
    from trimtab.rollout.attempt import Rules
    from trimtab.rollout.play import play_group
    from trimtab.rollout.types import Sampling

    rules = replace(Rules(sampling=Sampling(max_tokens=100), weigh=weigh, max_len=400), **changes)
    return await play_group(
        make_env, name="g", domain="d", group_size=3, generate=Script(ANSWER), chat=CHAT, rules=rules, seed=0
    )


def test_an_environment_that_will_not_be_cancelled_is_left_to_itself(monkeypatch):
    monkeypatch.setattr("trimtab.environments.guard.GRACE_SECONDS", 0.2)

    async def run() -> PlayedGroup:
        scenes = iter([Stubborn([]), Scene([DONE]), Scene([DONE])])
        played = await asyncio.wait_for(_three(lambda: next(scenes), episode_seconds=0.3), 20)
        STOP.set()
        await asyncio.sleep(0.2)
        return played

    played = asyncio.run(run())
    STOP.clear()
    assert kinds(played) == ["time"] and played.group is not None and len(played.group.episodes) == 2


def test_a_group_over_its_time_is_lost_and_its_environments_are_closed():
    closed = []

    class Slow(Scene):
        async def step(self, message: Message) -> Step:
            await asyncio.sleep(60)
            return DONE

        async def close(self) -> None:
            closed.append(self)

    played = play_scenes(Script(ANSWER), lambda: Slow([]), group_seconds=0.3)
    assert played.group is None and kinds(played) == ["time"] * 2 and "group_seconds = 0.3" in played.lost[0].reason
    assert len({id(env) for env in closed}) == 2


def test_six_tools_that_hang_stop_neither_others_nor_rewards():
    stop = threading.Event()

    def hang() -> str:
        "Never returns."
        stop.wait(60)
        return "late"

    def quick() -> str:
        "Returns."
        return "quick"

    async def run() -> tuple[list[str], str, float]:
        hanging = [asyncio.create_task(tool(hang, seconds=0.5).call({})) for _ in range(40)]
        await asyncio.sleep(0.05)
        started = time.monotonic()
        answer = await tool(quick, seconds=5).call({})
        step = await ToolEnv("?", (), lambda message: {"outcome": 1.0}).step(Message("assistant", "a"))
        assert step.rewards == {"outcome": 1.0}
        return await asyncio.gather(*hanging), answer, time.monotonic() - started

    late, answer, _ = asyncio.run(run())
    stop.set()
    assert answer == "quick" and set(late) == {"error: no result within 0.5 s"}


def test_healthy_calls_that_wait_for_a_thread_are_not_late():
    def work() -> str:
        "Takes its time."
        time.sleep(0.5)
        return "done"

    async def run() -> list[str]:
        return await asyncio.gather(*(tool(work, seconds=2).call({}) for _ in range(200)))

    assert asyncio.run(run()) == ["done"] * 200


# ---- the floor


@pytest.mark.parametrize(
    ("floor", "wrong", "cut"), [(None, -1.0, -1.0), (None, 1.0, 0.0), (-0.5, 1.0, -0.5), (-0.5, -1.0, -0.5)]
)
def test_an_answer_that_is_cut_off_earns_no_more_than_the_worst_answer(floor, wrong, cut):
    class Long(Script):
        async def __call__(self, request):
            done, other = await super().__call__(request)
            return [done, replace(other, finish="length")]

    group = play(Long(ANSWER), Step(rewards={"outcome": wrong}, done=True), floor=floor).group
    assert group is not None
    assert [(one.ended, one.reward) for one in group.episodes] == [("done", wrong), ("length", cut)]


# ---- bounds on what is lost


def batch(lost: int, of: int, domain: str = "d") -> tuple[list[Draw], PlayedBatch]:
    draws = [Draw(f"{domain}{i}", domain, lambda: None, i) for i in range(of)]
    episode = Episode(name="e", domain=domain, messages=(), segments=(), rewards={}, reward=0.0, ended="done")
    groups = tuple(Group(name=draw.name, domain=domain, episodes=(episode,) * 2) for draw in draws[lost:])
    reasons = (Lost(name="g", domain=domain, kind="environment", reason="no judge", cause=OSError("gone")),) * lost
    return draws, PlayedBatch(groups, reasons)


def domains(**settings: Any) -> Config:
    return Config(domains={"d": Domain(task="x:Y", **settings)})


def test_a_domain_that_loses_too_many_groups_stops_the_run_with_the_reason():
    counted = LostGroups(domains(max_lost=0.5))
    assert counted.add(*batch(4, 8)) == {"lost/d": 0.5}
    with pytest.raises(TooManyLost, match=r"domain d: 5 of its latest 8 groups were lost .*: no judge") as stopped:
        counted.add(*batch(5, 8))
    assert isinstance(stopped.value.__cause__, OSError)


def test_one_lost_group_of_a_small_domain_stops_nothing():
    counted = LostGroups(domains(max_lost=0.5))
    for _ in range(3):
        assert counted.add(*batch(1, 1)) == {"lost/d": 1.0}
        for _ in range(5):
            counted.add(*batch(0, 1))


def test_a_domain_of_one_prompt_a_step_that_loses_all_stops_in_the_end():
    counted = LostGroups(domains(max_lost=0.5))
    for _ in range(7):
        counted.add(*batch(1, 1))
    with pytest.raises(TooManyLost, match="8 of its latest 8"):
        counted.add(*batch(1, 1))


def test_a_step_in_which_nothing_trains_says_why():
    told = "2 of 3 groups have equal rewards, 1 were lost (no judge)"
    assert without_advantage(*batch(1, 3), kl=False) == f"nothing trains: {told}"
    assert without_advantage(*batch(1, 3), kl=True) == f"only the KL trains: {told}"


@pytest.mark.parametrize(("most", "at_once"), [(4, 4), (5, 4), (2, 2), (100, 8)])
def test_no_more_environments_are_open_than_the_domain_says(most, at_once):
    inside, seen = 0, []

    async def group(gate: Gate) -> None:
        nonlocal inside
        async with gate.room_for(2, "d"):
            inside += 2
            seen.append(inside)
            await asyncio.sleep(0.01)
            inside -= 2

    async def run() -> None:
        gate = Gate(most)
        await asyncio.gather(*(group(gate) for _ in range(4)))

    asyncio.run(run())
    assert max(seen) == at_once and len(seen) == 4


def test_environments_that_hold_nothing_do_not_wait(capsys):
    class Task:
        def sample(self, rng, *, held_out=False):
            return lambda: ToolEnv("12 + 3?", (), lambda message: {"outcome": 1.0})

    config = Config(domains={"d": Domain(task="x:Y", prompts=6, open_environments=2)}, rollout=Rollout(max_len=400))
    config = with_lengths(config)
    together, most = 0, 0
    script = Script(ANSWER)

    async def generate(request):
        nonlocal together, most
        together += 1
        most = max(most, together)
        await asyncio.sleep(0.02)
        together -= 1
        return await script(request)

    played = asyncio.run(play_draws(draw_step(config, {"d": Task()}, 0), config, generate, CHAT, 2))
    assert len(played.groups) == 6 and most == 6


# ---- rows and rehearsal


def _rows(tmp_path, texts):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": {text!r}, "answer": "1"}}\n'.replace("'", '"') for text in texts))
    return file


def recipe(tmp_path, body: str, **settings: Any) -> Config:
    file = tmp_path / "mine.py"
    file.write_text(
        "from trimtab.environments.adapters.datasets import RowsTask\n"
        f"{body}\n"
        "class Mine(RowsTask):\n"
        f"    def __init__(self):\n        super().__init__({str(tmp_path / 'rows.jsonl')!r}, reward)\n"
    )
    return with_lengths(
        Config(domains={"d": Domain(task=f"{file}:Mine", **settings)}, rollout=Rollout(max_len=200), held_out=4)
    )


GOOD = "def reward(message, row):\n    return {'outcome': float(message.content == row['answer'])}"


def rehearsed(config: Config) -> None:
    rehearse(config, load_tasks(config, **STAND_INS), byte_chat())


def test_a_reward_that_fails_is_told_before_an_engine_starts_with_its_cause(tmp_path):
    _rows(tmp_path, [f"q{i}" for i in range(40)])
    rehearsed(recipe(tmp_path, GOOD))
    for body, told in (
        ("def reward(message, row):\n    return {'outcome': 1 / 0}", "ZeroDivisionError"),
        ("def reward(message, row):\n    return 1.0", "named parts"),
        ("def reward(message, row):\n    return {'outcome': row['nope']}", "KeyError: 'nope'"),
    ):
        folder = tmp_path / str(len(body))
        folder.mkdir()
        _rows(folder, [f"q{i}" for i in range(40)])
        with pytest.raises(ValueError, match=told) as error:
            rehearsed(recipe(folder, body))
        assert "made-up answers" in str(error.value) and error.value.__cause__ is not None


def test_a_reward_that_fails_on_some_answers_is_told_and_runs(tmp_path, capsys):
    _rows(tmp_path, [f"q{i}" for i in range(40)])
    rehearsed(recipe(tmp_path, "def reward(message, row):\n    return {'outcome': float(message.content)}"))
    assert re.search(r"domain d: .* fails on 4 of 6 made-up answers: could not convert", capsys.readouterr().err)


def test_rows_longer_than_the_window_are_left_out_and_too_many_are_refused(tmp_path, capsys):
    _rows(tmp_path, [("x" * 300 if i % 5 == 0 else "x") + str(i) for i in range(60)])
    config = recipe(tmp_path, GOOD)
    rehearsed(config)
    assert re.search(r"\d+ of 12 prompts cannot be played and will be left out", capsys.readouterr().err)
    with pytest.raises(
        ValueError, match=r"prompts cannot be played: an opening of 3\d\d tokens .* rollout.max_len = 200"
    ):
        rehearsed(replace(config, domains={"d": replace(config.domains["d"], max_lost=0.0)}))
    tasks = load_tasks(config, **STAND_INS)
    draws = [draw for step in range(6) for draw in draw_step(config, tasks, step)]
    chat = byte_chat()
    played = asyncio.run(
        play_draws(draws, config, Scripted(chat, lambda messages, seed: Message("assistant", "1")), chat, 2)
    )
    assert played.groups and played.lost and {one.kind for one in played.lost} == {"opening"}
    assert len(played.groups) + len({one.name for one in played.lost}) == len(draws)


def test_a_prompt_that_cannot_be_drawn_is_lost_alone(tmp_path):
    class Task:
        def sample(self, rng, *, held_out=False):
            if rng.random() < 0.5:
                raise KeyError("torn row")
            return lambda: Scene([DONE])

    config = with_lengths(Config(domains={"d": Domain(task="x:Y", prompts=12)}, rollout=Rollout(max_len=400)))
    draws = draw_step(config, {"d": Task()}, 0)
    played = asyncio.run(play_draws(draws, config, Script(ANSWER), CHAT, 2))
    assert 0 < len(played.groups) < 12 and {one.reason for one in played.lost} == {"KeyError: 'torn row'"}


def test_a_group_reward_that_fails_and_a_tracker_that_is_missing_are_told(tmp_path):
    _rows(tmp_path, [f"q{i}" for i in range(40)])
    config = recipe(tmp_path, f"{GOOD}\ndef rank(answers):\n    return [answers[99].length]")
    domain = replace(config.domains["d"], group_rewards={"rank": config.domains["d"].task.replace(":Mine", ":rank")})
    with pytest.raises(ValueError, match="its reward rank fails on made-up answers: IndexError"):
        rehearsed(replace(config, domains={"d": domain}))
    with pytest.raises(ValueError, match="tracker trackio is not installed: pip install trackio"):
        rehearsed(replace(config, trackers=("trackio",)))


def test_the_command_shows_the_line_of_the_users_reward(tmp_path, capsys):
    save_tiny_deepseek(tmp_path / "model")
    _rows(tmp_path, [f"q{i}" for i in range(40)])
    config = recipe(tmp_path, "def reward(message, row):\n    return {'outcome': row['nope']}")
    file = tmp_path / "recipe.py"
    file.write_text(
        "from trimtab.grpo.config import Config, Domain\n"
        f"TASK = {config.domains['d'].task!r}\n"
        "def recipe():\n    return Config(domains={'d': Domain(task=TASK, thinking=False)})\n"
    )
    assert main(["train", f"{file}:recipe", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")]) == 2
    shown = capsys.readouterr().err
    assert "row['nope']" in shown and "mine.py" in shown
    assert shown.splitlines()[-1].startswith("trimtab: domain d: ") and not (tmp_path / "run").exists()


def test_void_is_no_fault_of_the_rehearsal(capsys):
    class Task:
        def sample(self, rng, *, held_out=False):
            return lambda: Scene([VoidEpisode("no server yet")])

    config = with_lengths(Config(domains={"d": Domain(task="x:Y")}, rollout=Rollout(max_len=400)))
    rehearse(config, {"d": Task()}, CHAT)
    assert capsys.readouterr().err == "", "nothing is refused, and nothing is said to be wrong"
