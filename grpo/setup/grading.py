"""Whether a task's reward gives full marks to the task's own answers, and none to what is no answer.

Own answers come from tasks that know them (Task.known), else from demonstrations that open as an episode does. A
reward may want an answer in a form, such as a box: those of FORMS are tried, and what earns is used for canaries too.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from trimtab.environments.adapters.rows import RowsTask
from trimtab.environments.base import Env, Known, Message, Task
from trimtab.environments.guard import guarded
from trimtab.grpo.config import Config
from trimtab.grpo.sampling.mixture import stable_seed
from trimtab.rewards.reading.plain import alternatives, normalised
from trimtab.rewards.reading.quantities import quantity

FORMS = ("{}", r"\boxed{{{}}}", "Answer: {}", "<answer>{}</answer>", "```python\n{}\n```")
"""How an answer may have to be said."""
RUBBISH = ("", "nan", "0", "banana")
ROWS, CANARY_ROWS, SECONDS = 200, 20, 20.0
"""At the start of a run: own answers, rows on which canaries are tried, and the time for both."""
LISTED = 5
_AT_ONCE = 8
_CALL_SECONDS = 30.0
_TURNS = 16


@dataclass(slots=True)
class Grades:
    """What a reward gave. Lists hold where, what was said and, for what broke, the error."""

    own: int = 0
    """Own answers tried."""
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Own answers without full marks."""
    broken: list[tuple[str, str]] = field(default_factory=list)
    """Rewards that broke on an own answer, such as at a truth that cannot be read."""
    canaries: int = 0
    paid: list[tuple[str, str]] = field(default_factory=list)
    """Canaries with full marks."""
    forms: dict[str, int] = field(default_factory=dict)
    """How often each form of an own answer earned full marks."""

    certain: bool = True
    """Whether own answers are known to be right; a demonstration may be wrong on purpose."""

    @property
    def fine(self) -> bool:
        """Whether nothing failed; of demonstrations, whether any earns full marks."""
        wrong = bool(self.refused or self.broken) if self.certain else self.own > 0 and not self.forms
        return not (wrong or self.paid)

    def lines(self) -> Iterator[str]:
        """What to tell."""
        said = ", ".join(repr(form.format("...")) for form in self.forms)
        earn = self.own - len(self.refused) - len(self.broken)
        if self.own:
            what = "own answers" if self.certain else "demonstrations, which may be wrong"
            yield f"{what}: {earn} of {self.own} earn full marks" + (f", said as {said}" if said else "")
        else:
            yield "no answers are known: neither known() nor demonstrate() answers a prompt of sample()"
        yield from _listed("without full marks", self.refused)
        yield from _listed("the reward breaks", self.broken)
        yield f"canaries: {len(self.paid)} of {self.canaries} earn full marks"
        yield from _listed("paid", self.paid)


def check_grading(config: Config, tasks: Mapping[str, Task]) -> None:
    """Grade the own answers of every task over a file, as much as SECONDS allow; what fails is said.

    Raises:
        ValueError: a larger share than the domain's max_lost of its own answers earns no full marks, or of the canaries
            does.
    """
    for name, domain in config.domains.items():
        task = tasks[name]
        if not domain.grade_check or not isinstance(task, RowsTask):
            continue
        grades = asyncio.run(grade(task, domain.score, rows=ROWS, canary_rows=CANARY_ROWS, seconds=SECONDS))
        if grades.fine:
            continue
        told = "\n  ".join(grades.lines())
        wrong = len(grades.refused) + len(grades.broken)
        if wrong > domain.max_lost * grades.own or len(grades.paid) > domain.max_lost * grades.canaries:
            raise ValueError(
                f"domain {name}: its reward does not grade its own file (trimtab grade-check shows more; "
                f"grade_check=False where answers of the file are not meant to earn full marks):\n  {told}"
            )
        print(f"trimtab: domain {name}: {told}", file=sys.stderr)


async def grade(
    task: Task, part: str, *, rows: int, canary_rows: int, seconds: float = float("inf"), seed: int = 0
) -> Grades:
    """Grade own answers and canaries of a task by a part of its reward, until the time is over.

    Args:
        part: at least 1.0 of it is full marks.
    """
    end, grades = time.monotonic() + seconds, Grades()
    cases, grades.certain = await known(task, rows, seed)
    places = asyncio.Semaphore(_AT_ONCE)
    right: list[Known] = []

    async def own(case: Known) -> None:
        async with places:
            if time.monotonic() < end and await _own(case, part, grades):
                right.append(case)

    async def canary(case: Known, text: str) -> None:
        async with places:
            if time.monotonic() < end:
                grades.canaries += 1
                earned = await _earned(case, text, part)
                if isinstance(earned, float) and earned >= 1.0:
                    grades.paid.append((case.where, text))

    await asyncio.gather(*(own(case) for case in cases if case.answer))
    tried = right or [case for case in cases if not case.answer]
    answers, forms = [case.answer for case in right], list(grades.forms) or FORMS
    chosen = tried[:: max(len(tried) // canary_rows, 1)][:canary_rows]
    await asyncio.gather(*(canary(case, text) for case in chosen for text in canaries(case, answers, forms)))
    return grades


async def known(task: Task, most: int, seed: int) -> tuple[list[Known], bool]:
    """The own answers of a task and True; where it knows none, those prompts of its that demonstrations answer, and
    other prompts with an empty answer, and False: a demonstration may be wrong on purpose."""
    if callable(own := getattr(task, "known", None)):
        return list(islice(own(most), most)), True
    found = []
    for i in range(most):
        draw = stable_seed(seed, "grade", i)
        make_env = task.sample(random.Random(draw))
        env = make_env()
        asked = _asked(await guarded(env.start()))
        await _close(env)
        found.append(Known(f"draw {i}", asked, _shown(task, draw, asked), make_env))
    return found, False


def _shown(task: Task, draw: int, asked: str) -> str:
    """What the demonstration of a draw answers; empty where it shows another prompt, a call, or nothing."""
    try:
        *shown, said = task.demonstrate(random.Random(draw))
    except Exception:  # a task may have none to show
        return ""
    return said.content if asked and _asked(shown) == asked and not said.tool_calls else ""


def canaries(case: Known, answers: Sequence[str], forms: Sequence[str]) -> list[str]:
    """What must not earn full marks on a prompt: rubbish, the question, the truth among guesses; in every form."""
    truth = case.answer
    said = [text for text in (*RUBBISH, case.prompt) if not truth or not _same(text, truth)]
    if not truth or len(alternatives(truth)) > 1 or "\n" in truth:  # it hedges itself, or is a program
        return [form.format(text) for form in forms for text in said]
    one, two = _rivals(truth, answers)
    said += [f"{truth} or {one}", f"{one} or {truth}", f"{one}; {two}; {truth}"]
    if quantity(truth):
        said.append(f"{one}, {two}, {truth}")
    boxes = [f"{FORMS[1].format(one)} or {FORMS[1].format(truth)}"] if FORMS[1] in forms else []
    return [form.format(text) for form in forms for text in said] + boxes


def _rivals(truth: str, answers: Sequence[str]) -> tuple[str, str]:
    """Two answers to other prompts, or made up."""
    one, two, *_ = [
        rival for rival in dict.fromkeys([*answers, "7", "11", "13"]) if not _same(rival, truth) and "\n" not in rival
    ]
    return one, two


def _same(text: str, truth: str) -> bool:
    numbers = quantity(text), quantity(truth)
    return normalised(text) == normalised(truth) or (numbers[0] is not None and numbers[0] == numbers[1])


async def _own(case: Known, part: str, grades: Grades) -> bool:
    """Whether an own answer earns full marks in one of the forms."""
    grades.own += 1
    broke: Exception | None = None
    for form in sorted(FORMS, key=lambda form: -grades.forms.get(form, 0)):
        earned = await _earned(case, form.format(case.answer), part)
        if isinstance(earned, Exception):
            broke = earned
        elif earned >= 1.0:
            grades.forms[form] = grades.forms.get(form, 0) + 1
            return True
    if broke is None:
        grades.refused.append((case.where, case.answer))
    else:
        grades.broken.append((case.where, f"{case.answer}: {broke}"))
    return False


async def _earned(case: Known, text: str, part: str) -> float | Exception:
    """What a text earns, said at every turn; or how its scoring broke."""
    env = case.make_env()
    total = 0.0
    try:
        async with asyncio.timeout(_CALL_SECONDS):
            await guarded(env.start())
            for _ in range(_TURNS):
                step = await guarded(env.step(Message("assistant", text)))
                total += float(step.rewards.get(part, 0.0))
                if step.done:
                    break
        return total
    except Exception as error:  # of the user's reward
        return error
    finally:
        await _close(env)


async def _close(env: Env) -> None:
    if close := getattr(env, "close", None):
        await guarded(close())


def _asked(messages: Sequence[Message]) -> str:
    """What the user said, if only once."""
    said = [message.content for message in messages if message.role == "user"]
    return said[0] if len(said) == 1 else ""


def _listed(what: str, found: Sequence[tuple[str, str]]) -> Iterator[str]:
    for where, said in found[:LISTED]:
        yield f"  {what}: {where}: {json.dumps(said[:100], ensure_ascii=False)}"
    if len(found) > LISTED:
        yield f"  and {len(found) - LISTED} more"
