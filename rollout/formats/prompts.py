"""System prompts of the cold start: reasoning data and agent data are joined by prompting alone.

A model that reasons under the first and calls tools under the second now and then does both at once when the third asks
for it; those of its trajectories that succeed are what it learns from next (grpo/commands/demonstrations.py). What the
prompts say is the report's, the words are ours [DeepSeek-V3.2 report, section 3.2 and its appendix on cold-start
prompts].
"""

from collections.abc import Sequence
from dataclasses import replace

from trimtab.environments.base import Message

MAX_EXECUTIONS = 20
"""Tool calls that the third prompt allows."""

REASONING = (
    "Work the problem out in your thinking before you answer: try ways to solve it, check each step, and go back where "
    "one fails. When you are sure, end your thinking and write the answer, with what a reader needs to follow it. The "
    "answer stands outside the thinking and repeats none of its detours."
)
AGENT = (
    "You have tools, described below. Call them for whatever you do not know or cannot compute reliably, and wait for "
    "their results before you rely on them. A message either calls tools, with arguments that follow their schemas, or "
    "it is the final answer. The user sees neither calls nor results: say in the answer what they need to know of them."
)
REASONING_WITH_TOOLS = (
    "Work the problem out in your thinking, and use your tools, described below, as part of it.\n"
    f"- You may call tools again and again while you think, for at most {MAX_EXECUTIONS} executions in all.\n"
    "- Call them early: let them compute and look up instead of doing it in words, and keep your thinking short.\n"
    "- After each result go on thinking, until you have the answer.\n"
    "- The final answer presents the solution and calls no tool."
)
PROMPTS = (REASONING, AGENT, REASONING_WITH_TOOLS)


def with_prompt(messages: Sequence[Message], prompt: str) -> tuple[Message, ...]:
    """messages under a system prompt, which takes the place of one of PROMPTS; other text and tools stay behind it."""
    named = bool(messages) and messages[0].role == "system"
    first, rest = (messages[0], messages[1:]) if named else (Message("system"), messages)
    text = first.content
    for known in PROMPTS:
        text = text.removeprefix(known).removeprefix("\n\n") if text.startswith(known) else text
    return replace(first, content="\n\n".join(filter(None, (prompt, text)))), *rest
