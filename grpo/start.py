"""From settings to a checked run: each kind of settings has its loop. Imports torch only once a run is made."""

import json
from pathlib import Path
from typing import Any, Protocol

from trimtab.grpo.config import Config
from trimtab.grpo.stages.config import Supervised

Settings = Config | Supervised


class Run(Protocol):
    """What `trimtab train` starts."""

    def train(self) -> int:
        """Run to the end, or until a signal comes. Returns the exit code."""
        ...


def load_settings(folder: Path) -> Settings:
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
    return Config.load(file) if isinstance(found, dict) and "domains" in found else Supervised.load(file)


def prepare(settings: Settings, folder: Path, *, resume: bool) -> Run:
    """Check everything that can be checked before the first minute is spent.

    Raises:
        ValueError: something that is missing or unfit; in one sentence, with the remedy.
        FileNotFoundError: no such file of data.
    """
    if isinstance(settings, Config):
        from trimtab.grpo import train

        return train.prepare(settings, folder, resume=resume)
    from trimtab.grpo.stages import supervised

    return supervised.prepare(settings, folder, resume=resume)
