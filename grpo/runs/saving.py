"""When a run saves: as often as asked, after a write that failed, and on the way out of a failure."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.grpo.policy.learner import Learner
from trimtab.grpo.runs.folder import RunFolder


class Saving:
    """Writes the checkpoints of a run and knows which whole steps they hold."""

    def __init__(self, folder: RunFolder, learner: Learner, first: int, *, model: Path, merge: bool = False):
        """model is the checkpoint whose tokenizer goes along; merge: an adapter is also saved as a whole model."""
        self._folder, self._learner, self._model, self._merge = folder, learner, model, merge
        self.saved = first
        """Steps that the newest checkpoint holds."""
        self.failures = 0
        self._owed = False
        self.trained(first)

    def trained(self, steps: int) -> None:
        """So many steps are trained as a whole."""
        self._steps, self._updates = steps, self._learner.updates

    def after_step(self, *, due: bool) -> None:
        """Save if it is time, or if the last try failed."""
        if due or self._owed:
            self.save()

    def save(self) -> bool:
        """Write a checkpoint of the last whole step; whether it is there. A failed write costs this one alone."""
        if self.saved == self._steps:
            return True
        if self._learner.updates != self._updates:
            return False  # in the middle of a step
        try:
            self._folder.checkpoints.save(self._steps, self._write)
        except Exception as error:  # of torch, safetensors or the system: a full disk has a name of its own in each
            self.failures += 1
            self._owed = True
            print(
                f"trimtab: the checkpoint of step {self._steps} could not be written ({_sentence(error)}); "
                f"{self._folder.free_gib():.2f} GiB are free; it is tried again",
                file=sys.stderr,
            )
            return False
        self.saved, self._owed = self._steps, False
        return True

    @contextmanager
    def on_failure(self) -> Iterator[None]:
        """Save the last whole step if what is inside fails."""
        try:
            yield
        except Exception:
            self.save()
            self._folder.owing()
            raise

    def _write(self, path: Path) -> None:
        self._learner.save(path)
        folders = [path]
        if self._merge:
            folders.append(path / "merged")
            self._learner.save_merged(folders[-1])
        for file in (*self._model.glob("*token*"), *self._model.glob("chat_template*")):
            for place in folders:
                shutil.copy(file, place)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
