"""A run's folder: configuration, metrics, episodes, checkpoints. Everything is written whole or not at all."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.environments.base import Message
from trimtab.grpo.config import Config
from trimtab.rollout.types import Group

KEEP_CHECKPOINTS = 2


class RunFolder:
    """Paths and writes of one run:

    config.json                     the resolved configuration
    metrics.jsonl                   one line a step
    episodes/step-00007.jsonl       every episode of a step, readable
    lost.jsonl                      why episodes were voided or refused
    checkpoints/step-00010/         a transformers checkpoint, optimizer.pt, state.json
    held_out.json                   scores before and after
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunFolder":
        """Start a new folder.

        Raises:
            ValueError: it exists already.
        """
        if path.exists():
            raise ValueError(f"{path} exists already; continue it with `trimtab train {path} --resume`")
        (path / "episodes").mkdir(parents=True)
        (path / "checkpoints").mkdir()
        config.save(path / "config.json")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """A folder that `create` made.

        Raises:
            ValueError: it is not one.
        """
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is not a run: it has no config.json")
        return cls(path)

    @classmethod
    def reopen(cls, path: Path, config: Config) -> "RunFolder":
        """A folder that `create` made, to go on in with these settings."""
        folder = cls.open(path)
        partial = path / "config.json.partial"
        config.save(partial)
        os.replace(partial, path / "config.json")
        return folder

    def load_config(self) -> Config:
        return Config.load(self.path / "config.json")

    def log(self, metrics: Mapping[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def log_lost(self, step: int, **reasons: Iterable[str]) -> None:
        """Why episodes of a step are missing, each reason once, with how often it came."""
        with (self.path / "lost.jsonl").open("a") as file:
            for kind, found in reasons.items():
                for reason, count in Counter(found).items():
                    row = {"step": step, "kind": kind, "count": count, "reason": reason}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def rewind(self, step: int) -> None:
        """Forget what was logged from `step` on: those steps are about to be repeated."""
        for file in (self.path / "metrics.jsonl", self.path / "lost.jsonl"):
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            replace_text(file, "".join(line for line in lines if json.loads(line)["step"] < step))
        for file in (self.path / "episodes").glob("step-*.jsonl"):
            if _step_of(file) >= step:
                file.unlink()

    def save_episodes(self, step: int, groups: Iterable[Group]) -> None:
        lines = (
            json.dumps(
                {
                    "name": episode.name,
                    "domain": episode.domain,
                    "reward": round(episode.reward, 6),
                    "rewards": dict(episode.rewards),
                    "ended": episode.ended,
                    "sampled_tokens": sum(len(segment.logp) for segment in episode.segments),
                    "segments": len(episode.segments),
                    "resets": episode.resets,
                    "process": dict(episode.process),
                    "notes": dict(episode.notes),
                    "messages": [_said(message) for message in episode.messages],
                },
                ensure_ascii=False,
            )
            for group in groups
            for episode in group.episodes
        )
        replace_text(self.path / "episodes" / f"step-{step:05d}.jsonl", "\n".join(lines) + "\n")

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a temporary folder, put it in place, drop all but the newest checkpoints.

        A failure (a full disk) leaves the earlier checkpoints as they were.
        """
        final = self.path / "checkpoints" / f"step-{step:05d}"
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write(partial)
            (partial / "state.json").write_text(json.dumps({"step": step}) + "\n")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in self.checkpoints()[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = (self.path / "checkpoints").glob("step-*")
        return sorted(path for path in found if (path / "state.json").is_file() and path.suffix != ".partial")

    def latest_checkpoint(self) -> Path:
        """The newest checkpoint.

        Raises:
            ValueError: there is none.
        """
        if not (found := self.checkpoints()):
            raise ValueError(f"{self.path} has no checkpoint to resume from; start it anew")
        return found[-1]


def step_of_checkpoint(path: Path) -> int:
    """Rollout batches that were trained on before this checkpoint."""
    return int(json.loads((path / "state.json").read_text())["step"])


def replace_text(path: Path, text: str) -> None:
    """Write a file whole: readers see the old text or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _said(message: Message) -> dict[str, Any]:
    """A message without what it leaves empty."""
    return {key: value for key, value in asdict(message).items() if value or key in ("role", "content")}


def _step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))
