"""Domains as configured: how their episodes are played and scored."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from trimtab.environments.base import Env, Message, Step, ToolCall
from trimtab.grpo.config import Config, Domain, Rollout
from trimtab.grpo.sampling.mixture import (
    draw_held_out,
    draw_step,
    load_tasks,
    part_means,
    play_draws,
    prompt_scores,
    scores,
)
from trimtab.rewards.types import Answer
from trimtab.rollout.context import ContextPolicy
from trimtab.rollout.scripted import Scripted, byte_chat
from trimtab.rollout.types import Group, Sampling

CHAT = byte_chat()


class Echo:
    """Answers calls with a long text; the answer "right" is right, and "unread" earns no outcome at all."""

    async def start(self) -> tuple[Message, ...]:
        return (Message("user", "Say it."),)

    async def step(self, message: Message) -> Step:
        if message.tool_calls:
            return Step(replies=(Message("tool", "long " * 40),))
        if message.content == "unread":
            return Step(done=True)
        return Step(rewards={"outcome": float(message.content.startswith("right"))}, done=True)


class EchoTask:
    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], Env]:
        return Echo

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        return ()


def rank(answers: Sequence[Answer]) -> list[float]:
    """The share of other answers that are longer."""
    return [sum(len(one.text) < len(other.text) for other in answers) / len(answers) for one in answers]


def calls(answers: Sequence[Answer]) -> list[float]:
    return [float(one.text.count('"arguments"')) for one in answers]


def config(**changes) -> Config:
    domain = replace(Domain(task=f"{__file__}:EchoTask", prompts=1, length_soft=20, length_hard=40), **changes)
    return Config(
        domains={"echo": domain}, rollout=Rollout(max_len=1500), sampling=Sampling(max_tokens=500), held_out=1
    )


def play(config: Config, answers: Sequence[str], *, held_out: bool = False, looks: int = 0) -> Group:
    """A group whose episodes give the answers in their order, after some calls."""

    def say(prompt: str, seed: int) -> Message:
        if prompt.count("I look.") < looks:
            return Message("assistant", "", "I look.", (ToolCall("get", {}),))
        return Message("assistant", given.pop(0))

    given = list(answers)
    tasks = load_tasks(config)
    draws = draw_held_out(config, tasks) if held_out else draw_step(config, tasks, 0)
    played = asyncio.run(play_draws(draws, config, Scripted(CHAT, say), CHAT, len(answers)))
    (group,) = played.groups
    return group


def sampled(text: str) -> int:
    return len(CHAT.encode_assistant(Message("assistant", text), thinking=True))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ("overlong", [0.0, -0.6, 0.0, 0.0]),
        ("relative", [0.0, -1.0, 0.0, 0.0]),
        ("kimi", [0.5, -0.5, 0.0, 0.0]),
    ],
)
def test_the_length_penalty_has_the_form_of_its_domain(length, expected):
    """The last two are wrong, and short.

    Overlong: (32 - 20) / (40 - 20). Relative: between the right ones. Kimi: 1/2 at 7 tokens, -1/2 at 32, the wrong ones
    at most 0.
    """
    answers = ["right", "right" + "!" * 25, "wrong", "unread"]
    assert [sampled(one) for one in answers] == [7, 32, 7, 8]
    group = play(config(length=length, weights={"outcome": 1.0, "length": 0.1}), answers)
    assert [episode.rewards["length"] for episode in group.episodes] == pytest.approx(expected)
    right = [1.0, 1.0, 0.0, 0.0]
    assert [one.reward for one in group.episodes] == pytest.approx(
        [outcome + 0.1 * penalty for outcome, penalty in zip(right, expected, strict=True)]
    )


def test_rewards_by_import_path_become_named_parts_that_weigh():
    made = config(
        group_rewards={"rank": f"{__file__}:rank"},
        process_rewards={"calls": f"{__file__}:calls"},
        weights={"outcome": 1.0, "rank": 0.5, "calls": -0.1},
    )
    short, long = play(made, ["right", "right!"], looks=2).episodes
    assert (short.rewards["rank"], long.rewards["rank"]) == (0.5, 0.0)
    assert short.rewards["calls"] == 2.0 and short.process == {"calls": (2.0,)}
    assert short.reward == pytest.approx(1 + 0.25 - 0.2) and long.reward == pytest.approx(0.8)
    assert part_means([play(made, ["right", "right!"], looks=2)])["echo/rank"] == 0.25


def test_a_reward_that_does_not_exist_is_told_before_anything_is_played():
    with pytest.raises(ValueError, match="got 'nowhere:rank'"):
        load_tasks(config(group_rewards={"rank": "nowhere:rank"}))


@pytest.mark.parametrize("held_out", [False, True])
def test_the_context_policy_of_a_domain_acts_in_training_and_on_held_out_prompts(held_out):
    policy = ContextPolicy(method="discard-75")
    group = play(config(context=policy, max_turns=12), ["right", "right"], held_out=held_out, looks=99)
    for episode in group.episodes:
        assert episode.ended == "turns" and len(episode.resets) > 1 and len(episode.segments) == 1 + len(episode.resets)
        assert sum(message.role == "assistant" for message in episode.messages) == 12
    assert scores([group], config()) == {"echo": 0.0}


def test_a_domain_with_a_context_policy_survives_being_saved_and_loaded(tmp_path):
    made = config(context=ContextPolicy(method="keep-recent", discard_all_at=0.9), group_rewards={"a": "b:c"})
    made.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == made
    assert json.loads((tmp_path / "config.json").read_text())["domains"]["echo"]["context"]["method"] == "keep-recent"


class Few:
    """A task with five held-out prompts, which compare equal."""

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], Env]:
        return rng.choice([bool, int, float, str, list])


def test_held_out_prompts_are_distinct_where_the_task_can_tell_and_as_many_as_there_are():
    asked = replace(config(), held_out=4)
    drawn = draw_held_out(asked, {"echo": Few()})
    assert len({draw.make_env for draw in drawn}) == len({draw.name for draw in drawn}) == 4
    assert len(draw_held_out(replace(asked, held_out=9), {"echo": Few()})) == 5
    assert [draw.name for draw in draw_held_out(replace(asked, seed=7), {"echo": Few()})] == [d.name for d in drawn]


def test_the_scores_of_prompts_are_means_over_their_episodes():
    group = play(config(), ["right", "wrong"])
    assert prompt_scores([group], config()) == {"echo": {group.name: 0.5}}
