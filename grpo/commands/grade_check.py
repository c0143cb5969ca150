"""Whether a task's reward gives full marks to the task's own answers, and to nothing else."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trimtab.environments.adapters.rows import ROW_REWARDS, MathsTask, RowsTask, row_reward
from trimtab.environments.base import Task
from trimtab.grpo.config import Config, Domain, load
from trimtab.grpo.recipes import RECIPES, find_recipe
from trimtab.grpo.setup.grading import grade
from trimtab.grpo.setup.rehearsal import STAND_INS


@dataclass(frozen=True, slots=True)
class GradeCheck:
    """Run a task's own answers through its reward: each must earn full marks. Run what is no answer through it
    (nothing, "nan", a stray word, the question, the answer among guesses): none must. Truths that cannot be read are
    listed."""

    task: Annotated[str, tyro.conf.Positional]
    """A recipe, as name[:domain] or path.py:function[:domain]; a Task, as module:Name or path.py:Name; or a .jsonl or
    .parquet file with a prompt and an answer in every row."""
    rows: int = 200
    """Prompts whose own answers are tried."""
    canary_rows: int = 50
    """... and prompts of these on which canaries are tried."""
    part: str = ""
    """The part of the reward that is 1 for a right answer ("": the domain's score, else outcome)."""
    prompt: str = "prompt"
    """Of a file: the field with the prompt ..."""
    answer: str = "answer"
    """... and the field with the answer."""
    reward: str = "maths"
    """Of a file: maths, exact, choice, number, or the import path of a reward for rows."""

    def __post_init__(self) -> None:
        if min(self.rows, self.canary_rows) < 1:
            raise ValueError(f"rows and canary_rows must be at least 1, got {self.rows} and {self.canary_rows}")


def grade_check(options: GradeCheck) -> int:
    """Print what came of it. Returns 0 if every own answer earns full marks and no canary does, else 1.

    Raises:
        ValueError: the task leads nowhere.
    """
    code = 0
    for name, task, part in _tasks(options):
        print(name)
        if task is None:
            print("  a model judges it: see trimtab judge-eval")
            continue
        left_out = getattr(task, "left_out", {})
        for where, reason in left_out.items():
            print(f"  cannot be graded: {where}: {reason}")
        grades = asyncio.run(grade(task, options.part or part, rows=options.rows, canary_rows=options.canary_rows))
        print("\n".join(f"  {line}" for line in grades.lines()))
        code |= int(not grades.fine or bool(left_out))
    return code


def _tasks(options: GradeCheck) -> Iterator[tuple[str, Task | None, str]]:
    """Name, task (None: a model judges it) and part of the reward."""
    if Path(options.task).suffix in (".jsonl", ".parquet"):
        yield options.task, _over_file(options), "outcome"
        return
    path, _, only = options.task.rpartition(":")
    recipe, only = (path, only) if path in RECIPES or ".py:" in path else (options.task, "")
    config = _config(recipe)
    domains = config.domains if config else {options.task: Domain(task=options.task)}
    if only and only not in domains:
        raise ValueError(f"{recipe} has no domain {only!r}; there are {', '.join(domains)}")
    for name, domain in domains.items():
        if only in ("", name):
            judged = domain.services & STAND_INS.keys()
            yield name, None if judged else domain.load_task(), domain.score


def _config(path: str) -> Config | None:
    """What a recipe makes; None for the path of a task."""
    if path in RECIPES:
        return RECIPES[path]()
    if isinstance(load(path), type):
        return None
    made = find_recipe(path)() if ".py:" in path else load(path)()
    return made if isinstance(made, Config) else None


def _over_file(options: GradeCheck) -> Task:
    if options.reward == "maths":
        return MathsTask(options.task, max_unfit=1.0, prompt=options.prompt, answer=options.answer)
    known = options.reward in ROW_REWARDS
    reward = row_reward(options.reward, options.answer) if known else load(options.reward)
    return RowsTask(options.task, reward, prompt=options.prompt, answer=options.answer)
