"""Cold-start data from episodes: which are taken, under which prompt, and that they come back from the file."""

import asyncio
import json
import random
from dataclasses import replace
from functools import partial

import pytest

from trimtab.environments.base import Message, Step, ToolCall
from trimtab.grpo.commands.demonstrations import (
    Demonstrated,
    SavedEpisode,
    load_episodes,
    read_demonstrations,
    successes,
    write_demonstrations,
)
from trimtab.grpo.runs.folder import RunFolder
from trimtab.rollout.attempt import Rules
from trimtab.rollout.formats.chat import render
from trimtab.rollout.formats.prompts import AGENT, REASONING_WITH_TOOLS
from trimtab.rollout.play import play_group
from trimtab.rollout.scripted import Scripted, byte_chat
from trimtab.rollout.types import Group, Sampling

TOOL = {"name": "add", "description": "Add.", "parameters": {"type": "object"}}
SYSTEM, ASK = Message("system", AGENT, tools=(TOOL,)), Message("user", "12 + 3?")
CALL = Message("assistant", reasoning="I add.", tool_calls=(ToolCall("add", {"a": 12, "b": [3]}),))
RESULT, ANSWER = Message("tool", "15"), Message("assistant", "15", reasoning="Done.")
GOOD = SavedEpisode("agent", (SYSTEM, ASK, CALL, RESULT, ANSWER), {"outcome": 1.0}, "done", ())


class Sum:
    """One call, one result, and an outcome for the right answer."""

    async def start(self) -> tuple[Message, ...]:
        return SYSTEM, ASK

    async def step(self, message: Message) -> Step:
        if message.tool_calls:
            return Step((RESULT,))
        return Step(rewards={"outcome": float(message.content == "15")}, done=True)


def played(chat) -> Group:
    """Two episodes, the first right and the second wrong."""

    def say(prompt: str, seed: int) -> Message:
        return CALL if "<result>" not in prompt else ANSWER

    rules = Rules(sampling=Sampling(max_tokens=10**4), max_len=10**5, weigh=lambda parts: parts["outcome"])
    play = partial(play_group, Sum, name="g", domain="agent", group_size=2, chat=chat, rules=rules, seed=0)
    group = asyncio.run(play(generate=Scripted(chat, say))).group
    assert group is not None
    first, second = group.episodes
    wrong = replace(ANSWER, content="16")
    return replace(
        group, episodes=(first, replace(second, rewards={"outcome": 0.0}, messages=(*second.messages[:-1], wrong)))
    )


def test_the_successes_of_a_run_become_demonstrations_under_another_prompt(tmp_path):
    chat = byte_chat()
    group = played(chat)
    run = RunFolder(tmp_path)
    (tmp_path / "episodes").mkdir()
    run.save_episodes(0, [group])
    expected = (replace(SYSTEM, content=REASONING_WITH_TOOLS), ASK, CALL, RESULT, ANSWER)
    for episodes in (group.episodes, load_episodes(tmp_path)):
        found = list(successes(episodes, prompt=REASONING_WITH_TOOLS))
        assert found == [expected]
    file = tmp_path / "demonstrations.jsonl"
    assert write_demonstrations(file, found) == 1 and read_demonstrations(file) == [expected]
    task = Demonstrated(None, file)
    ((ids, sampled),) = render(chat, task.demonstrate(random.Random(0)), thinking=True)
    assert chat.decode(ids[sampled]).startswith("I add.</think>") and sampled.sum() < len(ids)


def test_what_a_run_saved_whole_reads_as_what_it_saved_short(tmp_path):
    (tmp_path / "episodes").mkdir()
    whole = {
        "role": "user",
        "content": "12 + 3?",
        "reasoning": "",
        "tool_calls": [],
        "tools": [],
        "response_format": None,
    }
    line = {"domain": "agent", "messages": [whole], "rewards": {}, "ended": "done"}
    (tmp_path / "episodes" / "step-00000.jsonl").write_text(json.dumps(line) + "\n")
    assert [episode.messages for episode in load_episodes(tmp_path)] == [(ASK,)]


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": {"outcome": 0.5}},
        {"rewards": {"rubric": 1.0}},
        {"ended": "length"},
        {"resets": (3,)},
        {"messages": (SYSTEM, ASK, CALL, RESULT)},
        {"messages": (SYSTEM, ASK, *(CALL, RESULT) * 21, ANSWER)},
        {"messages": (SYSTEM, ASK)},
    ],
    ids=["too little", "another part", "cut off", "reset", "no answer", "too many calls", "nothing said"],
)
def test_what_is_no_success_is_left_out(changes):
    assert list(successes([replace(GOOD, **changes)])) == []


def test_a_part_a_threshold_and_a_prompt_are_free_to_choose():
    half = replace(GOOD, rewards={"rubric": 0.5}, messages=(*GOOD.messages, Message("user", "Thanks.")))
    assert list(successes([half], part="rubric", at_least=0.5)) == [GOOD.messages]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no demonstrations"),
        ("{}", "line 1"),
        ('{"messages": [{"role": "user"}]}', "line 1"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n[]', "line 2"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, reason):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_demonstrations(tmp_path / "d.jsonl")


def test_a_folder_without_episodes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name the folder of a run"):
        list(load_episodes(tmp_path))
