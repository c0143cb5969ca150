"""Three domains in one run, each with its own KL, clip, drift bound, length penalty and rewards.

python examples/mixed_recipe.py                                    shows two episodes of each with a scripted policy
trimtab train examples/mixed_recipe.py:recipe                      trains on it, after the cold start
"""

import re
from collections.abc import Sequence

from trimtab.environments.base import Message, ToolCall
from trimtab.grpo.commands.preview import preview
from trimtab.grpo.config import Config, Domain, LossSettings
from trimtab.rewards.types import Answer
from trimtab.rollout.context import ContextPolicy


def fewest_tokens(answers: Sequence[Answer]) -> list[float]:
    """A group reward: 1.0 for the right answers with the fewest tokens, else 0.0."""
    right = [one.length for one in answers if one.rewards.get("outcome", 0.0) >= 1]
    return [float(one.rewards.get("outcome", 0.0) >= 1 and one.length == min(right)) for one in answers]


def no_repeats(segments: Sequence[Answer]) -> list[float]:
    """A process reward: minus one for every call that a segment makes again."""
    calls = [[line for line in one.text.split("\n\n") if line.startswith('{"name"')] for one in segments]
    return [float(len(set(made)) - len(made)) for made in calls]


def recipe() -> Config:
    return Config(
        domains={
            "reasoning": Domain(  # verified answers: no KL, a wide clip; right answers compete in length
                task="trimtab.environments.tasks.reasoning:ReasoningTask",
                prompts=12,
                weights={"outcome": 1.0, "language": 0.3, "length": 0.1},
                loss=LossSettings(beta=0.0, clip_high=0.4, delta=0.2),
                length="relative",
            ),
            "agent": Domain(
                task="trimtab.environments.tasks.agent:AgentTask",
                weights={"outcome": 1.0, "shortest": 0.1, "no_repeats": 0.05, "length": 0.1},
                group_rewards={"shortest": f"{__file__}:fewest_tokens"},
                process_rewards={"no_repeats": f"{__file__}:no_repeats"},
                loss=LossSettings(beta=0.01, clip_low=0.2, clip_high=0.28),
                length="overlong",
                length_soft=96,
                length_hard=192,
                context=ContextPolicy(method="discard-75"),
            ),
            "alignment": Domain(  # a judge can be fooled: a strong KL, a narrow clip
                task="trimtab.environments.tasks.alignment:AlignmentTask",
                score="rubric_truth",
                weights={"rubric": 1.0, "language": 0.3, "length": 0.1},
                loss=LossSettings(beta=0.03, clip_low=0.1, clip_high=0.1, delta=0.05),
                length="kimi",
                thinking=False,
            ),
        },
    )


def say(prompt: str, seed: int) -> Message:
    """Looks up one key where there is a store; answers something everywhere else."""
    thinks = prompt.endswith("<think>")
    found = re.findall("<result>(.*?)</result>", prompt)
    key = re.search(r"What is (\w+) (?:plus|minus)? ?\w*\?", prompt)
    if key and not found:
        return Message("assistant", "", "I look it up.", (ToolCall("get", {"key": key[1]}),))
    return Message("assistant", found[-1] if found else "Dear Anna, thank you.", "So be it." if thinks else "")


async def judge(prompt: str) -> str:
    """Stands in for a judge: says yes to every criterion."""
    return "yes"


if __name__ == "__main__":
    preview(recipe(), say, judge=judge)
