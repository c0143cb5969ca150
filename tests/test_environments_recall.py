"""Recall: every answer stands in its world, at the distance that is said, and held-out worlds are others."""

import asyncio
import random

import pytest

from trimtab.environments.base import Message
from trimtab.environments.tasks.recall import COPIED, WORDS, RecallTask, conversation


@pytest.mark.parametrize("seed", range(20))
def test_answers_stand_in_the_world_at_their_distance(seed):
    world = RecallTask().world(random.Random(seed), held_out=False, questions=30)
    known, keys = dict(world.facts), [key for key, _ in world.facts]
    assert len(known) == len(world.facts) and 2 <= len(keys) <= 96
    for one in world.asked:
        kind, key = one.text.rstrip("?").split()
        (is_, *answer) = one.answer.split()
        assert is_ == "is"
        place = len(keys) - one.distance
        if kind == "twice":
            assert answer == [known[known[key]]]
            assert place == min(keys.index(key), keys.index(known[key]))
        elif kind == "from":
            start = keys.index(key)
            assert answer == [value for _, value in world.facts[start : start + COPIED]]
            assert place == start
        else:
            assert answer == [known[key]] and place == keys.index(key)


def test_an_environment_pays_for_the_answer_alone():
    world = RecallTask().sample(random.Random(1))
    env = world()
    (opening,) = asyncio.run(env.start())
    assert opening.content.endswith(world.asked[0].text) and world.facts[0][0] in opening.content
    for text, reward in ((f" {world.asked[0].answer}\n", 1.0), (f"{world.asked[0].answer} or not", 0.0), ("", 0.0)):
        assert asyncio.run(env.step(Message("assistant", text))).rewards == {"outcome": reward}


def test_a_demonstration_asks_and_answers_and_held_out_worlds_are_never_shown():
    task = RecallTask(questions=5)
    shown = task.demonstrate(random.Random(3))
    assert [message.role for message in shown] == ["user", "assistant"] * 5
    world = task.world(random.Random(3), held_out=False, questions=5)
    assert conversation(world) == shown
    trained = {task.world(random.Random(i), held_out=False, questions=1).facts[0] for i in range(300)}
    held_out = {task.world(random.Random(i), held_out=True, questions=1).facts[0] for i in range(300)}
    assert not trained & held_out and len(WORDS) == len(set(WORDS)) > 300
