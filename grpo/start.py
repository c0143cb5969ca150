"""From settings to a checked run: each kind of settings has its loop. Imports torch only once a run is made."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trimtab.grpo.config import Config, Settings, read_settings
from trimtab.grpo.stages.config import Blank, Conversion, Demonstrations, Distillation, Supervised

KINDS: tuple[tuple[str, Any], ...] = (
    ("group_size", Config),
    ("form", Supervised),
    ("at_least", Distillation),
    ("indexer", Conversion),
    ("conversations", Demonstrations),
    ("shape", Blank),
)
"""A setting that no other kind has, and the kind."""


class Run(Protocol):
    """What `trimtab train` starts."""

    def train(self) -> int:
        """Run to the end, or until a signal comes. Returns the exit code."""
        ...


@dataclass(frozen=True, slots=True)
class Once:
    """What is done in one go, whole or not at all."""

    out: Path
    make: Callable[[Path], str]
    """Fills the folder and says what it did."""

    def train(self) -> int:
        print(f"{self.make(self.out)}: {self.out}")
        return 0


def load_settings(file: Path) -> Any:
    """Settings of any kind from a JSON file.

    Raises:
        ValueError: no such file, or it holds something else.
    """
    try:
        found: Any = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{file.parent} is not a run: it has no {file.name}") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    kind = next((kind for name, kind in KINDS if isinstance(found, dict) and name in found), None)
    if kind is None:
        raise ValueError(f"{file} holds no settings of a run")
    return read_settings(kind, file)


def prepare(settings: Settings, folder: Path, *, resume: bool) -> Run:
    """Check everything that can be checked before the first minute is spent.

    Raises:
        ValueError: something that is missing or unfit; in one sentence, with the remedy.
        FileNotFoundError: no such file of data.
    """
    match settings:
        case Config():
            from trimtab.grpo import train

            return train.prepare(settings, folder, resume=resume)
        case Supervised():
            from trimtab.grpo.stages import supervised

            return supervised.prepare(settings, folder, resume=resume)
        case Distillation():
            from trimtab.grpo.stages import distillation

            return distillation.prepare(settings, folder, resume=resume)
    if folder.exists():
        raise ValueError(f"{folder} is there already: nothing is overwritten, give another folder")
    match settings:
        case Conversion():
            from trimtab.grpo.setup.models import locate
            from trimtab.grpo.stages.convert import convert

            return Once(folder, lambda out: convert(locate(settings.model), out, settings.indexer).summary)
        case Demonstrations():
            from trimtab.grpo.stages.beginning import write_demonstrations

            return Once(folder, lambda out: write_demonstrations(settings, out))
        case Blank():
            from trimtab.grpo.stages.beginning import write_blank

            return Once(folder, lambda out: write_blank(settings, out))
    raise TypeError(f"no loop for {type(settings).__name__}")
