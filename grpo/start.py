"""From settings to a checked run: each kind of settings has its loop. Imports torch only once a run is made."""

import json
from pathlib import Path
from typing import Any, Protocol

from trimtab.grpo.config import Config, read_settings
from trimtab.grpo.stages.config import Distillation, Supervised

Settings = Config | Supervised | Distillation
KINDS: tuple[tuple[str, Any], ...] = (("group_size", Config), ("at_least", Distillation), ("form", Supervised))
"""A setting that no other kind has, and the kind."""


class Run(Protocol):
    """What `trimtab train` starts."""

    def train(self) -> int:
        """Run to the end, or until a signal comes. Returns the exit code."""
        ...


def load_settings(folder: Path) -> Any:
    """The settings that a run's folder holds.

    Raises:
        ValueError: no run there, or one of another version.
    """
    file = folder / "config.json"
    try:
        found: Any = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is not a run: it has no {file.name}") from error
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
    if isinstance(settings, Config):
        from trimtab.grpo import train

        return train.prepare(settings, folder, resume=resume)
    if isinstance(settings, Distillation):
        from trimtab.grpo.stages import distillation

        return distillation.prepare(settings, folder, resume=resume)
    from trimtab.grpo.stages import supervised

    return supervised.prepare(settings, folder, resume=resume)
