"""trimtab judge-eval: how far a judge agrees with labels, and what it costs."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from trimtab.environments.json_lines import json_line, read_json_lines
from trimtab.environments.tasks.alignment import labelled_notes
from trimtab.grpo.config import Judge
from trimtab.grpo.cost.shape import shape_of
from trimtab.grpo.policy.policy import check_checkpoint
from trimtab.grpo.sampling.services import check_format
from trimtab.rewards.judging.agreement import accuracy, cohen_kappa, length_bias, position_flips
from trimtab.rewards.judging.endpoint import Endpoint
from trimtab.rewards.judging.model import Complete, JudgeModel, Usage, VerdictCache, yes_no
from trimtab.rewards.judging.rubric import Criterion, Grader, JudgeError, Rubric, RubricScore, rubric_score
from trimtab.rewards.judging.verdicts import Preference, grade, prefer
from trimtab.rollout.checkpoint import read_config
from trimtab.rollout.engine.engine import EngineConfig
from trimtab.rollout.engine.pool import Pool
from trimtab.rollout.formats.chat import Chat
from trimtab.rollout.formats.template import TemplateChat, load_format
from trimtab.rollout.judge import EngineModel

ANSWERS_A_PROMPT = 2
LONGEST_CONTEXT = 8192
CACHED_CONTEXTS = 4
"""Of the longest kind, which an engine's cache holds; questions are much shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeEval:
    """Ask a judge about labelled answers and compare. Name an endpoint's --model, or a --checkpoint."""

    file: Annotated[Path, tyro.conf.Positional]
    """JSONL, one answer a line: prompt, answer, criteria; each criterion has text, label (true or false) and, if
    wanted, weight and name. Answers to one prompt are also compared in pairs."""
    model: str = ""
    """Name of the model at the endpoint."""
    base_url: str | None = None
    """An OpenAI-compatible endpoint, such as http://localhost:8000/v1."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds its key."""
    checkpoint: str = ""
    """A checkpoint folder to judge with an engine of our own."""
    thinking: bool = False
    """The checkpoint reasons before its verdict."""
    form: Literal["json", "yes-no"] = "json"
    """One question an answer with verdicts as JSON, or one question a criterion, as the quickstart's judge is asked."""
    cache: str = ""
    """File of verdicts to reuse; empty: none is kept."""
    temperature: float | None = 0.0
    """At the endpoint; None leaves it to the endpoint."""
    max_tokens: int = 2048
    """Of a reply, reasoning included."""
    attempts: int = 3
    """How often the judge is asked for a reply that can be read."""
    seconds: float = 60.0
    """Time limit of a request to the endpoint."""
    at_once: int = 32
    """Requests to the endpoint at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Write labelled answers of the alignment domain, whose truth programs know."""

    file: Annotated[Path, tyro.conf.Positional]
    prompts: int = 100
    """Each with two answers."""
    seed: int = 0


def _not_0(weight: float) -> float:
    if weight == 0:
        raise ValueError("a weight is above 0, or below for a fault, other than 0")
    return weight


class LabelledCriterion(BaseModel):
    """A criterion and whether the answer satisfies it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    text: str = Field(pattern=r"\S")
    label: bool
    weight: Annotated[float, Field(allow_inf_nan=False), AfterValidator(_not_0)] = 1.0
    name: str = ""


class LabelledAnswer(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str
    answer: str
    criteria: tuple[LabelledCriterion, ...] = Field(min_length=1, strict=False)

    @property
    def rubric(self) -> Rubric:
        """The criteria as the judge gets them."""
        return Rubric(tuple(Criterion(c.text, c.weight, name=c.name) for c in self.criteria))


@dataclass(frozen=True, slots=True)
class Ruling:
    """One verdict beside its label."""

    criterion: str
    verdict: bool
    label: bool
    length: int
    """Characters of the answer."""


@dataclass(frozen=True, slots=True)
class Report:
    """What came of the labelled answers. flips holds one entry a pair of answers asked about both ways round."""

    rulings: tuple[Ruling, ...]
    failures: tuple[str, ...]
    flips: tuple[bool, ...]


def read_labelled(path: Path) -> tuple[LabelledAnswer, ...]:
    """The labelled answers of a file.

    Raises:
        ValueError: it cannot be read, or is empty, or a line is wrong; the line and the field are named.
    """
    try:
        answers = tuple(_labelled(path, number, values) for number, values in read_json_lines(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not answers:
        raise ValueError(f"{path} has no labelled answers; write some with: trimtab judge-eval --generate {path}")
    return answers


def write_labelled(options: Generate) -> None:
    """Write the file that Generate asks for.

    Raises:
        ValueError: it exists already, or cannot be written, or prompts is below 1.
    """
    if options.prompts < 1:
        raise ValueError(f"prompts must be at least 1, got {options.prompts}")
    rng = random.Random(options.seed)
    lines = []
    for _ in range(options.prompts):
        prompt, rubric, notes = labelled_notes(rng, ANSWERS_A_PROMPT)
        for note in notes:
            criteria = [
                {"name": c.name, "text": c.text, "weight": c.weight, "label": c.check(note)}
                for c in rubric.criteria
                if c.check is not None
            ]
            lines.append(json_line({"prompt": prompt, "answer": note, "criteria": criteria}))
    try:
        with options.file.open("x") as file:
            file.writelines(lines)
    except OSError as error:
        raise ValueError(f"{options.file} cannot be written: {error}") from error


async def evaluate(
    answers: Sequence[LabelledAnswer],
    grader: Grader,
    prefers: Callable[[str, str, str], Awaitable[Preference]] | None,
) -> Report:
    """Ask about every answer, and with prefers about every two neighbouring answers to one prompt, both ways round."""

    async def judged(answer: LabelledAnswer) -> RubricScore | str:
        try:
            return await grader(answer.answer, answer.rubric, task=answer.prompt)
        except JudgeError as error:
            return str(error)

    async def flipped(pair: tuple[str, str, str]) -> list[bool] | str:
        try:
            return await position_flips([pair], prefers) if prefers else []
        except JudgeError as error:
            return str(error)

    scores = await asyncio.gather(*map(judged, answers))
    flips = await asyncio.gather(*map(flipped, _pairs(answers)))
    rulings = [
        Ruling(criterion.name or criterion.text, verdict, criterion.label, len(answer.answer))
        for answer, score in zip(answers, scores, strict=True)
        if isinstance(score, RubricScore)
        for criterion, verdict in zip(answer.criteria, score.verdicts, strict=True)
    ]
    failures = tuple(one for one in (*scores, *flips) if isinstance(one, str))
    return Report(tuple(rulings), failures, tuple(flip for one in flips if not isinstance(one, str) for flip in one))


def judge_eval(options: JudgeEval) -> int:
    """Run the command; the exit code is 1 when not one verdict came back.

    Raises:
        ValueError: something the user can mend.
    """
    if bool(options.model) == bool(options.checkpoint):
        raise ValueError("judge-eval needs either --model, of an endpoint, or --checkpoint")
    answers = read_labelled(options.file)
    with ExitStack() as stack:
        cache = VerdictCache(options.cache) if options.cache else None
        model = JudgeModel(_complete(options, stack), attempts=options.attempts, cache=cache)
        if options.form == "json":
            report = asyncio.run(evaluate(answers, partial(grade, model=model), _preference(model)))
        else:
            report = asyncio.run(evaluate(answers, _by_criterion(model), None))
    show(report, model.usage, Console())
    return 0 if report.rulings else 1


def show(report: Report, usage: Usage, console: Console) -> None:
    """Print agreement by criterion and over all, failures, biases and cost."""
    table = Table("criterion", "verdicts", "accuracy", "kappa", "judge says yes", "label says yes")
    by_name: dict[str, list[Ruling]] = {}
    for ruling in report.rulings:
        by_name.setdefault(ruling.criterion, []).append(ruling)
    for name, rulings in (*sorted(by_name.items()), ("all", list(report.rulings))):
        verdicts, labels = [ruling.verdict for ruling in rulings], [ruling.label for ruling in rulings]
        shares = [sum(values) / max(len(values), 1) for values in (verdicts, labels)]
        kappa = cohen_kappa(verdicts, labels)
        table.add_row(
            name, str(len(rulings)), f"{accuracy(verdicts, labels):.1%}", f"{kappa:.2f}", *map(_share, shares)
        )
    console.print(table)
    for failure in dict.fromkeys(report.failures[:3]):
        console.print(f"failed: {failure}", markup=False, soft_wrap=True)
    console.print(f"questions without a verdict: {len(report.failures)}")
    flips = f"{sum(report.flips) / len(report.flips):.1%} of {len(report.flips)}" if report.flips else "not asked"
    console.print(f"pairs whose verdict turns with their order: {flips}")
    lengths = [ruling.length for ruling in report.rulings]
    bias = length_bias([r.verdict for r in report.rulings], [r.label for r in report.rulings], lengths)
    console.print(f"correlation of verdict and length at equal truth: {bias:+.2f}")
    console.print(
        ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in usage.as_dict().items()), soft_wrap=True
    )


def _labelled(path: Path, number: int, values: object) -> LabelledAnswer:
    try:
        return LabelledAnswer.model_validate_json(json_line(values))
    except ValidationError as error:
        worst = error.errors()[0]
        field = ".".join(map(str, worst["loc"])) or "the whole line"
        raise ValueError(f"{path}, line {number}, {field}: {worst['msg']}") from None


def _pairs(answers: Sequence[LabelledAnswer]) -> list[tuple[str, str, str]]:
    by_prompt: dict[str, dict[str, None]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.prompt, {})[answer.answer] = None
    return [(prompt, *pair) for prompt, texts in by_prompt.items() for pair in pairwise(texts)]


def _complete(options: JudgeEval, stack: ExitStack) -> Complete:
    if options.model:
        return Endpoint(
            options.model,
            options.base_url,
            key_variable=options.key_variable,
            temperature=options.temperature,
            max_tokens=options.max_tokens,
            seconds=options.seconds,
            at_once=options.at_once,
        )
    check_checkpoint(options.checkpoint)
    chat = load_format(options.checkpoint)
    check_format(Judge(thinking=options.thinking), chat)
    config = engine_config(options.checkpoint, chat)
    pool = Pool(config, 1)
    stack.callback(pool.close)
    pool.wait_until_ready()
    tokens = min(options.max_tokens, config.max_model_len // 2)
    identity = str(Path(options.checkpoint).resolve())
    return EngineModel(pool.generate, chat, identity=identity, max_tokens=tokens, thinking=options.thinking)


def engine_config(checkpoint: str, chat: Chat | TemplateChat) -> EngineConfig:
    """What an engine for this judge is started with: its cache comes from the model's sizes."""
    model = read_config(checkpoint)
    length = min(model.get("max_position_embeddings", LONGEST_CONTEXT), LONGEST_CONTEXT)
    cache = CACHED_CONTEXTS * length * shape_of(model).cached * 4
    return EngineConfig(model=checkpoint, max_model_len=length, kv_cache_bytes=cache, stop_ids=tuple(chat.stop_ids))


def _preference(model: JudgeModel) -> Callable[[str, str, str], Awaitable[Preference]]:
    async def prefers(task: str, first: str, second: str) -> Preference:
        return await prefer(first, second, model, task=task)

    return prefers


def _by_criterion(model: JudgeModel) -> Grader:
    async def grader(answer: str, rubric: Rubric, *, task: str = "") -> RubricScore:
        return await rubric_score(answer, rubric, yes_no(model))  # the quickstart's judge never sees the prompt

    return grader


def _share(value: float) -> str:
    return f"{value:.0%}"
