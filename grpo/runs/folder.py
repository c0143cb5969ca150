"""A run's folder: configuration, metrics, episodes, checkpoints. Everything is written whole or not at all."""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.environments.base import Message
from trimtab.environments.json_lines import json_line, read_json_lines
from trimtab.grpo.config import Settings
from trimtab.grpo.runs.checkpoints import Checkpoints
from trimtab.grpo.runs.durable import Owed, append_text, replace_text
from trimtab.grpo.runs.lock import locked
from trimtab.rewards import bounds
from trimtab.rollout.types import Group, Lost


class RunFolder:
    """Paths and writes of one run:

    config.json                     the resolved configuration that trains
    history.jsonl                   every start: its step, command, versions and what changed (grpo/runs/record.py)
    sources/                        the files that recipes, tasks and rewards were loaded from
    metrics.jsonl                   one line a step
    ledger.jsonl                    one line a step: its prompts, and what of them trained
    episodes/step-00007.jsonl       every episode of a step, readable
    lost.jsonl                      why episodes were lost
    checkpoints/step-00010/         a transformers checkpoint, optimizer.pt, state.json
    held_out.json                   scores before and after

    A write that fails while the run goes on (a full disk) is owed and made up for; `owing` says whether any is.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._owed = Owed(lambda text: print(f"trimtab: {text}", file=sys.stderr))

    @classmethod
    def create(cls, path: Path, config: Settings) -> "RunFolder":
        """Start a new folder.

        Raises:
            ValueError: it exists already.
        """
        if path.exists():
            raise ValueError(f"{path} exists already; continue it with `trimtab train {path} --resume`")
        (path / "checkpoints").mkdir(parents=True)
        folder = cls(path)
        folder.save_config(config)
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """A folder that `create` made.

        Raises:
            ValueError: it is not one.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise ValueError(f"{path} is not a run: it has no config.json")
        return folder

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes from training here.

        Raises:
            ValueError: another one does.
        """
        return locked(self.path / "lock", str(self.path))

    def save_config(self, config: Settings) -> None:
        replace_text(self.config, config.to_json())

    def go_on(self, config: Settings, step: int) -> None:
        """Make ready to train from `step` on with these settings: mend and forget what a kill has left."""
        self.save_config(config)
        self.mend()
        self.rewind(step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", json.dumps(metrics) + "\n")

    def log_ledger(self, row: Mapping[str, Any]) -> None:
        self._append("ledger.jsonl", json_line(row))

    def log_lost(self, step: int, lost: Iterable[Lost]) -> None:
        """Why episodes of a step are missing, each reason of a domain once, with how often it came."""
        found = Counter((one.domain, one.kind, one.reason) for one in lost)
        rows = (
            {"step": step, "domain": domain, "kind": kind, "count": count, "reason": reason}
            for (domain, kind, reason), count in found.items()
        )
        self._append("lost.jsonl", "".join(map(json_line, rows)))

    def _append(self, name: str, text: str) -> None:
        if text:
            self._owed.write(partial(append_text, self.path / name, text))

    def owing(self) -> OSError | None:
        """Try what is owed once more; what still fails."""
        return self._owed.settle()

    def metrics(self) -> list[dict[str, Any]]:
        return self._rows("metrics.jsonl")

    def ledger(self) -> list[dict[str, Any]]:
        return self._rows("ledger.jsonl")

    def _rows(self, name: str) -> list[dict[str, Any]]:
        file = self.path / name
        return [row for _, row in read_json_lines(file)] if file.exists() else []

    def mend(self) -> None:
        """Drop the last line of a log that a kill has cut off, saying so, and what was never finished."""
        for rest in list(self.path.rglob("*.partial")):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        for file in self.path.glob("*.jsonl"):
            data = file.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(file, whole)
                print(f"trimtab: {file} ended in half a line, which is dropped", file=sys.stderr)

    def rewind(self, step: int) -> None:
        """Forget what was logged from `step` on: those steps are about to be repeated."""
        for name in ("metrics.jsonl", "ledger.jsonl", "lost.jsonl"):
            if rows := self._rows(name):
                replace_text(self.path / name, "".join(json_line(row) for row in rows if row["step"] < step))
        for file in self._episode_files():
            if _step_of(file) >= step:
                file.unlink()

    def save_episodes(self, step: int, groups: Iterable[Group]) -> None:
        rows = (
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
            }
            for group in groups
            for episode in group.episodes
        )
        text = "".join(map(json_line, rows))
        self._owed.write(partial(_write_in_folder, self.path / "episodes" / f"step-{step:05d}.jsonl", text))

    def save_held_out(self, **results: Mapping[str, Any]) -> None:
        text = json.dumps(self.held_out() | results, indent=2, ensure_ascii=False) + "\n"
        self._owed.write(partial(replace_text, self.path / "held_out.json", text))

    def held_out(self) -> dict[str, Any]:
        """What `save_held_out` has written so far."""
        file = self.path / "held_out.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def keep_within(self, gib: float) -> None:
        """Remove the oldest steps' episodes while the folder, checkpoints aside, holds more than so many GiB."""
        files = [
            file for file in self.path.rglob("*") if file.is_file() and self.checkpoints.folder not in file.parents
        ]
        over = sum(file.stat().st_size for file in files) - gib * 2**30
        for file in self._episode_files()[:-1]:
            if over <= 0:
                return
            over -= file.stat().st_size
            file.unlink()
            bounds.bit("run_gib", f"{self.path} holds more than run_gib = {gib:g} GiB: the oldest episodes are removed")

    def free_gib(self) -> float:
        """What is left on the folder's disk."""
        return shutil.disk_usage(self.path).free / 2**30

    def _episode_files(self) -> list[Path]:
        return sorted((self.path / "episodes").glob("step-*.jsonl"), key=_step_of)


def remedy(path: Path) -> str:
    """What to do with a run that has stopped."""
    folder = RunFolder(path)
    if folder.checkpoints.all():
        return f"checkpoints are whole, go on with: trimtab train {path} --resume"
    if (path / "sampled").is_dir():
        return f"what was sampled is kept, go on with: trimtab train {path} --resume"
    if folder.config.is_file():
        return f"nothing was saved yet, begin again with: trimtab train {path} --resume"
    return "nothing had begun: start it anew"


def _said(message: Message) -> dict[str, Any]:
    """A message without what it leaves empty."""
    return {key: value for key, value in asdict(message).items() if value or key in ("role", "content")}


def _write_in_folder(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    replace_text(file, text)


def _step_of(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))
