"""Context policies on long searches: score against steps, as a table and a plot.

    python benchmarks/context.py                        a scripted searcher over a generated corpus, in bytes
    python benchmarks/context.py --model CHECKPOINT     a checkpoint on conversations over a key-value store

The searcher knows nothing but the text of its prompt: what a policy drops, it has to look up again. Its reasoning says
which step it is at; its summaries say what it found and read. It opens the pages of a document in random order, so that
a lucky run is short. The quickstart's checkpoint knows conversations of two user messages, so the window is
smaller than those; a summary does not fit it. Steps are tool calls; Parallel-fewest-step counts those of all attempts.
"""

import argparse
import asyncio
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from trimtab.environments.base import Env, Message, Step, ToolCall
from trimtab.environments.tasks.agent import KEYS, MAX_VALUE, PREVIOUS, AgentEnv, Goal
from trimtab.environments.tools.corpus import RELATIONS, World
from trimtab.environments.tools.search import SearchTask
from trimtab.rollout.attempt import Generate, Rules
from trimtab.rollout.context import SUMMARISE, SUMMARY, ContextPolicy, Format, fewest_steps, steps
from trimtab.rollout.formats.dsml import ASSISTANT, INVOKE_CLOSE, INVOKE_OPEN, PARAMETER_CLOSE, PARAMETER_OPEN, USER
from trimtab.rollout.play import gather, play_group
from trimtab.rollout.scripted import Scripted, byte_chat
from trimtab.rollout.types import Group, Sampling

POLICIES = {
    "none": ContextPolicy(),
    "Summary": ContextPolicy(method="summary"),
    "Discard-75%": ContextPolicy(method="discard-75"),
    "Discard-all": ContextPolicy(method="discard-all"),
    "keep-recent-5": ContextPolicy(method="keep-recent"),
    "keep-recent-5, Discard-all": ContextPolicy(method="keep-recent", trigger=0.5, discard_all_at=0.8),
}
HOPS, ADDENDS = 4, 4
CALL = re.compile(
    re.escape(INVOKE_OPEN) + r'(\w+)">\n(.*?)' + re.escape(INVOKE_CLOSE) + r".*?<result>(.*?)</result>", re.DOTALL
)
PARAMETER = re.compile(re.escape(PARAMETER_OPEN) + r'(\w+)" string="\w+">(.*?)' + re.escape(PARAMETER_CLOSE), re.DOTALL)
FORMS = {relation.name: relation.sentence for relations in RELATIONS.values() for relation in relations}


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one policy on one task."""

    policy: str
    score: float
    steps: float
    resets: float


class View:
    """What a searcher can make out in the text of a prompt."""

    def __init__(self, prompt: str) -> None:
        self.text = prompt.partition(USER)[2]
        self.question = self.text.partition(ASSISTANT)[0].partition(SUMMARY)[0]
        self.calls = [(name, dict(PARAMETER.findall(given)), result) for name, given, result in CALL.findall(self.text)]

    def fact(self, name: str, relation: str) -> str | None:
        """What a page or a summary in sight says."""
        form = re.escape(FORMS[relation]).replace(r"\{0\}", re.escape(name)).replace(r"\{1\}", "(.+?)")
        noted = rf"Found: the {relation} of {re.escape(name)} is (.+?)\."
        found = re.search(rf"On {re.escape(name)}\. [^\n]*?{form}", self.text) or re.search(noted, self.text)
        return found[1] if found else None

    def needs(self) -> tuple[list[tuple[str, str]], str | None]:
        """The facts on the way that are in sight and the first that is not, as (entity, relation); and the answer."""
        if self.question.startswith("What is the sum of the "):
            relation, _, names = self.question.removeprefix("What is the sum of the ").rstrip("?").partition(" of ")
            wanted = [(name, relation) for name in names.split(" and ")]
            known = [self.fact(*one) for one in wanted]
            numbers = [int(value) for value in known if value]
            return wanted, str(sum(numbers)) if len(numbers) == len(wanted) else None
        *relations, last = self.question.removeprefix("What is the ").rstrip("?").split(" of the ")
        last, _, name = last.partition(" of ")
        relations = [last, *reversed(relations)]
        done = 0
        if said := re.findall(r"Step (\d+): the .+? of (.+?)\.", self.text):
            done, name = int(said[-1][0]), said[-1][1]
        wanted = []
        for relation in relations[done:]:
            wanted.append((name, relation))
            value = self.fact(name, relation)
            if value is None:
                return wanted, None
            name = value
        return wanted, name

    def step(self, wanted: Sequence[tuple[str, str]]) -> tuple[int, str, str]:
        """The number, entity and relation of the first fact that is not in sight."""
        name, relation = next(one for one in wanted if self.fact(*one) is None)
        said = re.findall(r"Step (\d+): the (.+?) of (.+?)\.", self.text)
        return (int(said[-1][0]) if said else 0) + wanted.index((name, relation)), name, relation

    def document(self, name: str) -> str | None:
        found = re.search(rf"\[([\w-]+)\] {re.escape(name)}: ", self.text)
        return found[1] if found else None

    def pages(self, id: str) -> tuple[list[int], int]:
        """The pages of a document that are in sight or noted as read, and how many it has (2 while nobody knows)."""
        noted = re.search(rf"\[{id}\] .*?: read ([\d ]+) of (\d+)\.", self.text)
        read = [int(page) for page in noted[1].split()] if noted else []
        count = int(noted[2]) if noted else 2
        for called, given, result in self.calls:
            if called == "open" and given["id"] == id and (told := re.search(r"\[page (\d+) of (\d+)\]$", result)):
                read.append(int(told[1]))
                count = int(told[2])
        return sorted(set(read)), count


def search(prompt: str, seed: int) -> Message:
    """The next turn of the searcher."""
    view = View(prompt)
    wanted, answer = view.needs()
    if SUMMARISE in prompt:
        return Message("assistant", summary(view, wanted, answer), "I sum up.")
    if answer is not None:
        return Message("assistant", answer, "All is known.")
    number, name, relation = view.step(wanted)
    thought = f"Step {number}: the {relation} of {name}."
    id = view.document(name)
    if id is None:
        return Message("assistant", "", thought, (ToolCall("search", {"query": name, "k": 1}),))
    read, count = view.pages(id)
    page = random.Random(seed).choice([page for page in range(1, count + 1) if page not in read] or [1])
    return Message("assistant", "", thought, (ToolCall("open", {"id": id, "page": page}),))


def summary(view: View, wanted: Sequence[tuple[str, str]], answer: str | None) -> str:
    lines = [f"Found: the {relation} of {name} is {view.fact(name, relation)}." for name, relation in wanted]
    lines = [line for line in lines if not line.endswith(" is None.")]
    if answer is None:
        number, name, relation = view.step(wanted)
        lines.append(f"Step {number}: the {relation} of {name}.")
        if id := view.document(name):
            read, count = view.pages(id)
            lines.append(f"[{id}] {name}: read {' '.join(map(str, read))} of {count}.")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Trial:
    """What is played: tasks by their kind, who plays them, and how."""

    tasks: dict[str, list[Callable[[], Env]]]
    generate: Generate
    chat: Format
    window: int
    max_tokens: int
    max_turns: int
    attempts: int

    async def play(self, kind: str, policy: ContextPolicy) -> list[Group]:
        rules = Rules(
            sampling=Sampling(max_tokens=self.max_tokens),
            max_len=self.window,
            weigh=outcome,
            context=policy,
            max_turns=self.max_turns,
        )
        played = await gather(
            play_group(
                make_env,
                name=f"{kind} {i}",
                domain=kind,
                group_size=self.attempts,
                generate=self.generate,
                chat=self.chat,
                rules=rules,
                seed=0,
            )
            for i, make_env in enumerate(self.tasks[kind])
        )
        groups = [one.group for one in played if one.group]
        assert sum(len(group.episodes) for group in groups) == len(played) * self.attempts
        return groups

    async def rows(self, kind: str, name: str) -> list[Row]:
        """The policy's row; behind that of no policy, what the best of several attempts makes of it."""
        groups = await self.play(kind, POLICIES[name])
        episodes = [episode for group in groups for episode in group.episodes]
        score = mean(outcome(episode.rewards) for episode in episodes)
        resets = mean(len(episode.resets) for episode in episodes)
        row = Row(name, score, mean(map(steps, episodes)), resets)
        if POLICIES[name].method != "none":
            return [row]
        chosen = [fewest_steps(group.episodes) for group in groups]
        score = mean(outcome(one.rewards) if one else 0.0 for one in chosen)
        total = mean(sum(map(steps, group.episodes)) for group in groups)
        return [row, Row(f"Parallel-fewest-step, N = {self.attempts}", score, total, 0.0)]


def outcome(parts: Mapping[str, float]) -> float:
    return parts["outcome"]


def scripted(questions: int, attempts: int, window: int) -> Trial:
    """The searcher on questions of some hops, and on sums."""
    asks: dict[str, Callable[[World, random.Random], object]] = {
        f"{HOPS} hops": lambda world, rng: world.question(rng, hops=HOPS),
        f"sum of {ADDENDS}": lambda world, rng: world.total(rng, count=ADDENDS),
    }
    tasks = {}
    for kind, ask in asks.items():
        task = SearchTask(ask=ask, filler=400, page=600, max_messages=10**6)
        tasks[kind] = [task.sample(random.Random(i)) for i in range(questions)]
    chat = byte_chat()
    return Trial(tasks, Scripted(chat, search), chat, window, 1024, 60, attempts)


class LongStore(AgentEnv):
    """An agent's conversation of any number of user messages."""

    def reply(self, message: Message) -> Step:
        self._messages = 0
        return super().reply(message)


@contextmanager
def checkpoint(model: str, questions: int, attempts: int, window: int, goals: int) -> Iterator[Trial]:
    """A checkpoint in an engine of its own, asked to add to a sum, or take from it, one value after the other."""
    from trimtab.rollout.engine.engine import EngineConfig
    from trimtab.rollout.engine.pool import Pool, gpu_share
    from trimtab.rollout.formats.chat import Chat

    def task(seed: int) -> Callable[[], Env]:
        rng = random.Random(seed)
        values = {key: rng.randint(1, MAX_VALUE) for key in KEYS}
        one, two, *more = (rng.choice(KEYS) for _ in range(goals + 1))
        asked = [Goal(f"What is {one} plus {two}?", (one, two), "+")]
        for i, key in enumerate(more):
            word, sign = ("plus", "+") if i % 2 else ("minus", "-")
            asked.append(Goal(f"And {word} {key}?", (PREVIOUS, key), sign))
        return lambda: LongStore(values, asked)

    tasks: dict[str, list[Callable[[], Env]]] = {f"{goals} questions": [task(seed) for seed in range(questions)]}
    pool = Pool(EngineConfig(model=model, max_model_len=window), 1, gpu_share(1))
    try:
        pool.wait_until_ready()
        yield Trial(tasks, pool.generate, Chat.load(model), window, 64, 8 * goals, attempts)
    finally:
        pool.close()


def report(trial: Trial, plot: Path) -> None:
    questions = len(next(iter(trial.tasks.values())))
    print(f"window {trial.window} tokens, trigger 0.8 (keep-recent-5, Discard-all: 0.5, 0.8)")
    print(f"{questions} tasks of each kind, {trial.attempts} attempts at each, at most {trial.max_turns} turns\n")
    print("| task | policy | score | steps | resets |\n| --- | --- | --- | --- | --- |")
    figure, panels = plt.subplots(1, len(trial.tasks), figsize=(5.5 * len(trial.tasks), 4.2), squeeze=False)
    for kind, panel in zip(trial.tasks, panels[0], strict=True):
        for row in chain.from_iterable(asyncio.run(trial.rows(kind, name)) for name in POLICIES):
            print(f"| {kind} | {row.policy} | {row.score:.3f} | {row.steps:.1f} | {row.resets:.1f} |", flush=True)
            panel.scatter(row.steps, row.score, s=90, alpha=0.7, label=row.policy)
        panel.set(title=kind, xlabel="tool calls", ylabel="score", ylim=(-0.05, 1.05))
    figure.tight_layout()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4)
    figure.savefig(plot, dpi=120, bbox_inches="tight")
    print(f"\nplot: {plot}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="checkpoint folder; without it the scripted searcher plays")
    parser.add_argument("--questions", type=int, help="tasks of each kind; default: 3, or 24 with --model")
    parser.add_argument("--attempts", type=int, default=4, help="at each task; N of Parallel-fewest-step")
    parser.add_argument("--window", type=int, help="tokens; default: 11264, or 112 with --model")
    parser.add_argument("--goals", type=int, default=2, help="user messages of a conversation, with --model")
    parser.add_argument("--plot", type=Path, default=Path("context.png"))
    given = parser.parse_args()
    started = time.perf_counter()
    if given.model:
        window = given.window or 112
        with checkpoint(given.model, given.questions or 24, given.attempts, window, given.goals) as trial:
            report(trial, given.plot)
    else:
        report(scripted(given.questions or 3, given.attempts, given.window or 11264), given.plot)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
