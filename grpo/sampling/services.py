"""What tasks may ask for by name: `judge` says yes or no to one criterion, `grade` rules on a whole rubric."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.grpo.config import Config, Judge
from trimtab.grpo.sampling.mixture import chat_of
from trimtab.rewards.judging.endpoint import Endpoint
from trimtab.rewards.judging.model import JudgeModel, VerdictCache, yes_no
from trimtab.rewards.judging.verdicts import grade
from trimtab.rollout.attempt import Generate
from trimtab.rollout.engine.engine import EngineConfig
from trimtab.rollout.engine.pool import Pool
from trimtab.rollout.formats.chat import Chat
from trimtab.rollout.formats.template import TemplateChat
from trimtab.rollout.judge import EngineModel

SERVICES = frozenset({"judge", "grade"})


@dataclass(frozen=True, slots=True)
class Judging:
    """The services, and the models behind them, which count what they do."""

    judge: JudgeModel
    grade: JudgeModel

    @property
    def services(self) -> dict[str, Any]:
        """What a task gets, by name."""
        return {"judge": yes_no(self.judge), "grade": partial(grade, model=self.grade)}

    def metrics(self) -> Mapping[str, float]:
        """What was asked so far, as judge_calls and so on."""
        models = {id(model): model.usage.as_dict() for model in (self.judge, self.grade)}
        return {f"judge_{name}": sum(usage[name] for usage in models.values()) for name in self.judge.usage.as_dict()}


def is_needed(config: Config) -> bool:
    """Whether the task of any domain names a service."""
    return any(domain.services & SERVICES for domain in config.domains.values())


def check(config: Config) -> None:
    """Ask the endpoint that would judge for one word, or try the chat format of the checkpoint that would.

    Raises:
        ValueError: it does not answer, or cannot be asked as the recipe wants.
    """
    if not is_needed(config):
        return
    if not config.judge.model:
        if checkpoint := config.judge.checkpoint or config.model:  # the cold start's plays in both modes
            check_format(config.judge, chat_of(config, checkpoint))
        return
    try:
        now = replace(config.judge, patience_s=0.0)  # at the start nobody waits
        asyncio.run(_endpoint(now)("Reply with one word: yes", None, 0))
    except ValueError:
        return  # it answers, though not as asked
    except Exception as error:  # a model behind a network: no key, no such model, nobody there
        where = config.judge.base_url or "its default endpoint"
        raise ValueError(f"the judge {config.judge.model!r} at {where} does not answer: {error!r}") from error


def check_format(judge: Judge, chat: Chat | TemplateChat) -> None:
    """Try the chat format of a judge in an engine of ours in the mode that it is asked in.

    Raises:
        ValueError: it does not play in this mode; says whether the other one would do.
    """
    if not isinstance(chat, TemplateChat):
        return  # DeepSeek-V3.2's plays in both
    try:
        chat.verify(thinking=judge.thinking)
    except ValueError as error:
        other = not judge.thinking
        remedy = f"set judge.thinking to {other}" if _plays(chat, thinking=other) else "take another judge"
        mode = "with" if judge.thinking else "without"
        raise ValueError(f"the judge's chat template cannot be played {mode} thinking: {remedy} ({error})") from error


def _plays(chat: TemplateChat, *, thinking: bool) -> bool:
    try:
        chat.verify(thinking=thinking)
        return True
    except ValueError:
        return False


@contextmanager
def endpoint(config: Config, folder: Path) -> Iterator[Judging]:
    """The judge behind an endpoint; its verdicts are kept in the run's folder, so a resumed run does not pay again."""
    cache = VerdictCache(folder / "verdicts.sqlite")
    try:
        model = JudgeModel(_endpoint(config.judge), attempts=config.judge.attempts, cache=cache)
        yield Judging(model, model)
    finally:
        cache.close()


def _endpoint(judge: Judge) -> Endpoint:
    return Endpoint(
        judge.model,
        judge.base_url or None,
        key_variable=judge.key_variable,
        temperature=judge.temperature,
        max_tokens=judge.max_tokens,
        seconds=judge.seconds,
        patience=judge.patience_s,
        at_once=judge.at_once,
    )


def judging(judge: Judge, generate: Generate, chat: Chat | TemplateChat, *, model: str, window: int) -> Judging:
    """The services of a model in an engine of ours, whose replies leave half of its window to the question."""
    short, long = (
        JudgeModel(
            EngineModel(generate, chat, identity=model, max_tokens=min(tokens, window // 2), thinking=judge.thinking),
            attempts=judge.attempts,
        )
        for tokens in (judge.verdict_tokens, judge.max_tokens)
    )
    return Judging(short, long)


@contextmanager
def engine(config: Config, settings: EngineConfig, chat: Chat | TemplateChat, gpu_share: float) -> Iterator[Judging]:
    """A frozen checkpoint in an engine of its own."""
    pool = Pool(settings, 1, gpu_share)
    try:
        pool.wait_until_ready()
        yield judging(config.judge, pool.generate, chat, model=settings.model, window=settings.max_model_len)
    finally:
        pool.close()
