"""The system prompts of the cold start, and how one takes another's place."""

import pytest

from trimtab.environments.base import Message
from trimtab.rollout.formats.chat import Conversation
from trimtab.rollout.formats.prompts import AGENT, PROMPTS, REASONING, REASONING_WITH_TOOLS, with_prompt
from trimtab.rollout.scripted import byte_chat

ASK = Message("user", "12 + 3?")
TOOL = {"name": "add", "description": "Add.", "parameters": {"type": "object"}}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_can_be_said_and_is_none_of_the_others(prompt):
    chat = byte_chat()
    conversation = Conversation(chat, (Message("system", prompt, tools=(TOOL,)), ASK), thinking=True)
    assert chat.decode(conversation.prompt_ids()).startswith(f"{chat.decode([chat.bos_id])}{prompt}\n\n## Tools\n\n")
    assert not any(prompt.startswith(other) for other in PROMPTS if other != prompt)


def test_the_prompt_for_reasoning_with_tools_allows_twenty_executions_and_none_in_the_answer():
    assert "at most 20 executions" in REASONING_WITH_TOOLS
    assert "final answer presents the solution and calls no tool" in REASONING_WITH_TOOLS


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((ASK,), (Message("system", REASONING), ASK)),
        ((Message("system", AGENT), ASK), (Message("system", REASONING), ASK)),
        (
            (Message("system", f"{AGENT}\n\nBe brief.", tools=(TOOL,)),),
            (Message("system", f"{REASONING}\n\nBe brief.", tools=(TOOL,)),),
        ),
        ((Message("system", "Be brief."), ASK), (Message("system", f"{REASONING}\n\nBe brief."), ASK)),
        ((Message("system", tools=(TOOL,)), ASK), (Message("system", REASONING, tools=(TOOL,)), ASK)),
    ],
    ids=["no system message", "another prompt", "another prompt and more", "other text", "tools alone"],
)
def test_a_prompt_takes_the_place_of_another_and_leaves_the_rest(before, after):
    assert with_prompt(before, REASONING) == after
    assert with_prompt(after, REASONING) == after
