"""A search agent: questions of two hops over a small generated corpus, with BM25 search and pages to open.

python examples/search_agent.py                                    shows two episodes with a scripted policy
trimtab train examples/search_agent.py:recipe --model CHECKPOINT   trains on it

For a corpus of one's own: search_tools(open_index("corpus.jsonl")) and a ToolEnv (environments/tools/search.py).
"""

import re

from trimtab.environments.base import Message, ToolCall
from trimtab.environments.tools.corpus import RELATIONS
from trimtab.environments.tools.search import SearchTask
from trimtab.grpo.commands.preview import preview
from trimtab.grpo.config import Config, Domain, Rollout
from trimtab.rollout.context import ContextPolicy
from trimtab.rollout.types import Sampling

FORMS = {relation.name: relation.sentence for relations in RELATIONS.values() for relation in relations}


class LongSearchTask(SearchTask):
    """Pages of some length, so that a few of them fill a small window."""

    def __init__(self) -> None:
        super().__init__(filler=400, page=600, max_messages=24)


def recipe() -> Config:
    """When the window is four fifths full, the older results go; what is dropped can be searched again."""
    search = Domain(
        task=f"{__file__}:LongSearchTask",
        weights={"outcome": 1.0, "length": 0.1},
        length_soft=512,
        length_hard=1024,
        context=ContextPolicy(method="keep-recent", keep=3),
        max_turns=24,
    )
    return Config(domains={"search": search}, rollout=Rollout(max_len=2048), sampling=Sampling(max_tokens=512))


def say(prompt: str, seed: int) -> Message:
    """A policy that searches each name and reads on until it finds the fact."""
    relations, name = re.findall(r"What is the (.+) of (.+)\?", prompt)[-1]
    for relation in reversed(relations.split(" of the ")):
        form = re.escape(FORMS[relation]).replace(r"\{0\}", re.escape(name)).replace(r"\{1\}", "(.+?)")
        found = re.search(rf"On {re.escape(name)}\. .*?{form}", prompt)
        if not found:
            return look(name, prompt)
        name = found[1]
    return Message("assistant", name, "That is the answer.")


def look(name: str, prompt: str) -> Message:
    listed = re.search(rf"\[([\w-]+)\] {re.escape(name)}: ", prompt)
    if not listed:
        return Message("assistant", "", f"I look for {name}.", (ToolCall("search", {"query": name, "k": 2}),))
    page = prompt.count(f">{listed[1]}</") + 1
    return Message("assistant", "", f"Page {page} of {name}.", (ToolCall("open", {"id": listed[1], "page": page}),))


if __name__ == "__main__":
    preview(recipe(), say)
