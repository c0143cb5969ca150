"""The checkpoints of a run: whole or absent, checked before they are used, two kept."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from trimtab.grpo.runs.durable import digests, sync

KEEP = 2
STATE = "state.json"


class Checkpoints:
    """checkpoints/step-00010/ and so on, each with state.json: its step and the SHA-256 of its files."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a temporary folder, put it in place, drop all but the newest.

        Raises:
            Exception: what `write` raised; the earlier checkpoints are as they were.
        """
        final = self.folder / f"step-{step:05d}"
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write(partial)
            state = {"step": step, "sha256": digests(partial)}
            (partial / STATE).write_text(json.dumps(state, indent=1) + "\n")
            for path in [*partial.rglob("*"), partial]:
                sync(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync(self.folder)
        for old in self.all()[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first; whether they are damaged is not looked at."""
        found = [path for path in self.folder.glob("step-*") if path.suffix != ".partial"]
        return sorted((path for path in found if (path / STATE).is_file()), key=_step_in_name)

    def latest(self) -> Path | None:
        """The newest checkpoint that is as it was written; damaged ones are named and passed over.

        Raises:
            ValueError: there are checkpoints, and all of them are damaged.
        """
        found = self.all()
        for path in reversed(found):
            if not (wrong := damage(path)):
                return path
            print(f"trimtab: {path} is damaged ({wrong}) and left aside", file=sys.stderr)
        if found:
            raise ValueError(f"every checkpoint in {self.folder} is damaged; remove them to start from the model anew")
        return None


def step_of(checkpoint: Path) -> int:
    """Rollout batches that were trained on before this checkpoint."""
    return int(json.loads((checkpoint / STATE).read_text())["step"])


def damage(checkpoint: Path) -> str:
    """What differs from what was written; empty: nothing."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        expected, found = state["sha256"], digests(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{STATE}: {error!r}"
    wrong = [name for name, digest in expected.items() if found.get(name) != digest]
    return f"not as written: {', '.join(wrong)}" if wrong else ""


def _step_in_name(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
