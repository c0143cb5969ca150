"""Distillation of specialists: they answer, what is right, short enough and new is kept, and a card says what was not.

Sampling is written chunk by chunk, so that what was sampled is never sampled again; selection is a function of that.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trimtab.environments.json_lines import json_line, read_json_lines
from trimtab.grpo.config import Config, Domain, read_settings
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.runs.durable import replace_text
from trimtab.grpo.runs.folder import remedy
from trimtab.grpo.runs.lock import locked
from trimtab.grpo.runs.record import record_start
from trimtab.grpo.runs.signals import Stop, until_stopped
from trimtab.grpo.sampling.mixture import PlayedBatch, draw_step
from trimtab.grpo.sampling.players import Players
from trimtab.grpo.setup.prepare import complete
from trimtab.grpo.stages.config import Distillation
from trimtab.rewards.language import SCRIPTS, language_consistency
from trimtab.rollout.formats.openai_messages import to_openai
from trimtab.rollout.types import Episode

KEPT = "kept.jsonl"
SPACE = re.compile(r"\s+")


@dataclass(slots=True)
class Share:
    """What became of the samples of one domain."""

    teacher: str
    thinking: bool
    prompts: int = 0
    samples: int = 0
    kept: int = 0
    kept_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Of each reason, the name of the first sample that it met."""

    def drop(self, reason: str, name: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, name)

    def summary(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher,
            "thinking": self.thinking,
            "prompts": self.prompts,
            "samples": self.samples,
            "kept": self.kept,
            "tokens_per_kept": self.kept_tokens / self.kept if self.kept else None,
            "dropped": dict(self.dropped.most_common()),
            "examples": self.examples,
        }


def prepare(config: Distillation, path: Path, *, resume: bool) -> "DistillationRun":
    """Check everything that can be checked before the first minute is spent.

    Raises:
        ValueError: a teacher, task or setting that is missing or unfit; in one sentence, with the remedy.
    """
    if resume:
        before = read_settings(Distillation, path / "config.json")
        if before != config:
            raise ValueError(f"{path} was sampled with other settings: leave them out, or start a new folder")
    elif path.exists():
        raise ValueError(f"{path} exists already; continue it with `trimtab train {path} --resume`")
    if missing := [name for name, domain in config.domains.items() if not domain.teacher]:
        raise ValueError(f"domain {missing[0]} has no specialist to answer: set domains.{missing[0]}.teacher")
    if config.language and config.language not in SCRIPTS:
        raise ValueError(f"language must be one of {', '.join(sorted(SCRIPTS))}, got {config.language!r}")
    return DistillationRun(config, path, tuple(complete(one, trains=False)[0] for one in by_teacher(config)))


def by_teacher(config: Distillation) -> Iterator[Config]:
    """For each specialist, what it plays: a rollout batch has prompts_at_once prompts of each of its domains."""
    teachers: dict[str, dict[str, Domain]] = defaultdict(dict)
    for name, domain in config.domains.items():
        prompts = min(config.prompts_at_once, config.prompts)
        teachers[domain.teacher][name] = replace(domain, teacher="", prompts=prompts)
    for teacher, domains in teachers.items():
        yield Config(
            model=teacher,
            domains=domains,
            syntax=config.syntax,
            judge=config.judge,
            rollout=config.rollout,
            sampling=config.sampling,
            group_size=config.samples,
            precision=config.precision,
            sandbox=config.sandbox,
            seed=config.seed,
        )


@dataclass(frozen=True, slots=True)
class DistillationRun:
    """A checked distillation, ready to start."""

    config: Distillation
    path: Path
    parts: tuple[Config, ...]
    """What each specialist plays, complete."""

    def train(self) -> int:
        """Sample what is missing, select, and write the card. Returns the exit code.

        Raises:
            ValueError: nothing is left of what was sampled.
        """
        return until_stopped(self._sample_and_select, lambda: remedy(self.path))

    def _sample_and_select(self, console: Console, stop: Stop) -> int:
        (self.path / "sampled").mkdir(parents=True, exist_ok=True)
        with locked(self.path / "lock", str(self.path)):
            replace_text(self.path / "config.json", self.config.to_json())
            record_start(self.path, 0, {})
            for number, part in enumerate(self.parts):
                self._sample(number, part, console, stop)
            rows = [row for file in self._files() for _, row in read_json_lines(file)]
            kept, shares = select(rows, self.config)
            self._write(kept, shares)
        console.print(card_table(shares))
        console.print(f"conversations  {self.path / KEPT}")
        console.print(f"card           {self.path / 'card.md'}")
        return 0

    def _sample(self, number: int, part: Config, console: Console, stop: Stop) -> None:
        """Play the batches of one specialist that have no file yet."""
        batches = math.ceil(self.config.prompts / self.config.prompts_at_once)
        missing = [i for i in range(batches) if not self._file(number, i).is_file()]
        if not missing:
            return
        console.print(
            f"specialist {part.model}: {', '.join(part.domains)}, {len(missing)} of {batches} batches to play"
        )
        clock = Clock(torch.cuda.synchronize if torch.cuda.is_available() else None)
        with ExitStack() as stack:
            players = stack.enter_context(Players.start(part, self.path, clock))
            stop.listen()
            console.print(players.wait_until_ready())
            players.pool.wake()
            for i in missing:
                with stop.after_the_step():
                    draws = draw_step(part, players.tasks, i)
                    left = self.config.prompts - i * self.config.prompts_at_once
                    draws = [draw for draw in draws if int(draw.name.rpartition("-")[2]) < left]
                    played = players.play(draws, part.group_size)
                    text = "".join(map(json_line, rows_of(played, part)))
                    replace_text(self._file(number, i), text)
                right = [row["score"] >= self.config.at_least for row in rows_of(played, part) if "score" in row]
                share = sum(right) / len(right) if right else 0.0
                console.print(f"batch {i + 1}/{batches}: {len(right)} answers, {share:.0%} right", highlight=False)
            stop.now_if_asked()

    def _file(self, number: int, batch: int) -> Path:
        return self.path / "sampled" / f"specialist-{number}-batch-{batch:05d}.jsonl"

    def _files(self) -> list[Path]:
        return sorted((self.path / "sampled").glob("*.jsonl"))

    def _write(self, kept: Sequence[Mapping[str, Any]], shares: Mapping[str, Share]) -> None:
        if not kept:
            reasons = sum((share.dropped for share in shares.values()), Counter[str]())
            said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            raise ValueError(
                f"nothing is left of what the specialists said: {said}; lower at_least, or train them more"
            )
        replace_text(self.path / KEPT, "".join(map(json_line, kept)))
        card = {"domains": {name: share.summary() for name, share in shares.items()}, "kept": len(kept)}
        replace_text(self.path / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
        replace_text(self.path / "card.md", card_text(shares, self.config))


def rows_of(played: PlayedBatch, part: Config) -> Iterator[dict[str, Any]]:
    """A row for each sample, lost ones included."""
    for group in played.groups:
        for episode in group.episodes:
            domain = part.domains[group.domain]
            yield {
                "domain": group.domain,
                "prompt": group.name,
                "name": episode.name,
                "thinking": domain.thinking,
                "score": episode.rewards.get(domain.score, 0.0),
                "rewards": dict(episode.rewards),
                "ended": episode.ended,
                "resets": len(episode.resets),
                "tokens": sum(len(segment.logp) for segment in episode.segments),
                "messages": _said(episode),
            }
    for lost in played.lost:
        yield {"domain": lost.domain, "prompt": lost.name.rpartition("#")[0], "name": lost.name, "lost": lost.reason}


def _said(episode: Episode) -> list[dict[str, Any]] | None:
    """The conversation up to its last answer in OpenAI's form; None: it has none."""
    messages = episode.messages
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]
    try:
        return to_openai(messages) or None
    except ValueError:  # calls that cannot be written
        return None


def select(rows: Iterable[Mapping[str, Any]], config: Distillation) -> tuple[list[dict[str, Any]], dict[str, Share]]:
    """What stays of all samples, and what became of them by domain.

    A sample goes for the first of these reasons: it was lost; its conversation did not end with an answer; its context
    was reset (nobody saw all of it at once); it is not right; too long; in another language; a double, of the same
    opening and answer; one more of a prompt that has enough. Of a prompt's samples the shortest come first. The order
    of rows does not matter.
    """
    shares = {name: Share(domain.teacher, domain.thinking) for name, domain in config.domains.items()}
    prompts: dict[str, set[str]] = defaultdict(set)
    kept: list[dict[str, Any]] = []
    seen: set[tuple[str, str, str]] = set()
    taken: Counter[tuple[str, str]] = Counter()
    for row in sorted(rows, key=lambda row: (row["domain"], row["prompt"], row.get("tokens", 0), row["name"])):
        share = shares[row["domain"]]
        share.samples += 1
        prompts[row["domain"]].add(row["prompt"])
        if reason := _unfit(row, config):
            share.drop(reason, row["name"])
            continue
        opening, answer = _texts(row["messages"])
        if (row["domain"], opening, answer) in seen:
            share.drop("double", row["name"])
        elif taken[row["domain"], opening] >= config.keep:
            share.drop("enough of its prompt", row["name"])
        else:
            seen.add((row["domain"], opening, answer))
            taken[row["domain"], opening] += 1
            share.kept += 1
            share.kept_tokens += row["tokens"]
            kept.append({name: row[name] for name in ("domain", "thinking", "messages", "tokens")})
    for name, names in prompts.items():
        shares[name].prompts = len(names)
    return kept, shares


def _unfit(row: Mapping[str, Any], config: Distillation) -> str:
    """Why a sample cannot stay, whatever the others are; empty: it can."""
    if "lost" in row:
        return "lost"
    if row["ended"] != "done" or not row["messages"] or row["messages"][-1].get("tool_calls"):
        return "without an answer"
    if row["resets"]:
        return "context reset"
    if row["score"] < config.at_least:
        return "not right"
    if config.max_tokens is not None and row["tokens"] > config.max_tokens:
        return "too long"
    if _language(row, config) < config.min_language:
        return "another language"
    return ""


def _language(row: Mapping[str, Any], config: Distillation) -> float:
    if not config.language:
        return float(row["rewards"].get("language", 1.0))
    said = [message for message in row["messages"] if message["role"] == "assistant"]
    text = "\n".join(f"{one.get('reasoning_content', '')}\n{one['content']}" for one in said)
    return language_consistency(text, config.language)


def _texts(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What was asked before the first answer, and what assistants said, without regard to space and case."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    said = [message for message in messages if message["role"] == "assistant"]
    return _plain(messages[:first]), _plain(said)


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    parts = [
        part
        for one in messages
        for part in (one["role"], one.get("reasoning_content", ""), one["content"], json.dumps(one.get("tool_calls")))
    ]
    return "\0".join(SPACE.sub(" ", part).strip() for part in parts).casefold()


def card_table(shares: Mapping[str, Share]) -> Table:
    table = Table(title="what the specialists said", title_justify="left")
    for header in ("domain", "samples", "kept", "tokens each", "dropped"):
        table.add_column(header, justify="right" if header in ("samples", "kept", "tokens each") else "left")
    for name, share in shares.items():
        table.add_row(name, str(share.samples), str(share.kept), _each(share), _dropped(share))
    return table


def card_text(shares: Mapping[str, Share], config: Distillation) -> str:
    """The data card in Markdown."""
    lines = [
        "# Conversations distilled from specialists",
        "",
        f"{sum(share.kept for share in shares.values())} conversations of {len(shares)} domains. Kept: at least "
        f"{config.at_least:g} of the score part, at most {config.max_tokens or 'any number of'} sampled tokens, "
        f"{config.keep} of a prompt, no doubles; {config.language or 'the language that its task asks for'}.",
        "",
        "| domain | specialist | thinking | prompts | samples | kept | tokens each | dropped |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, share in shares.items():
        cells = [name, share.teacher, "yes" if share.thinking else "no", share.prompts, share.samples, share.kept]
        lines.append(f"| {' | '.join(map(str, [*cells, _each(share), _dropped(share)]))} |")
    examples = [(name, reason, one) for name, share in shares.items() for reason, one in share.examples.items()]
    lines += ["", "An example of each, to be found in `sampled/` by its name:", ""]
    lines += [f"* {name}, {reason}: {one}" for name, reason, one in examples]
    return "\n".join(lines) + "\n"


def _each(share: Share) -> str:
    return f"{share.kept_tokens / share.kept:.0f}" if share.kept else "-"


def _dropped(share: Share) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in share.dropped.most_common()) or "none"
