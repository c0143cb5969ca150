"""Stages one after another: what is done is skipped, what was cut off goes on, what had other inputs is refused.

A stage names the output of an earlier one as "stage:NAME" wherever a checkpoint or a file of data is asked for. Every
stage runs in a process of its own, with a folder of its own below the pipeline's; pipeline.json says what each was made
of and what came out. Imports no torch.
"""

import ctypes
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trimtab.environments.json_lines import read_json_lines
from trimtab.grpo.config import Config, Settings, flat, load
from trimtab.grpo.runs.durable import replace_text
from trimtab.grpo.runs.lock import locked
from trimtab.grpo.setup.models import locate
from trimtab.grpo.stages.config import Blank, Conversion, Demonstrations, Distillation, Supervised
from trimtab.rollout.checkpoint import read_config

REFERENCE = "stage:"
PIECE = 1 << 20
WHOLE = 1 << 30
"""Larger files are told apart by a piece in every 64, smaller ones by all of it."""
PLACEMENT = ("out", "offload", "tokens_per_microbatch", "checkpoint_activations", "save_every", "run_gib", "trackers")
"""Settings that change nothing of what comes out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """Stages by name, in the order in which they run."""

    stages: dict[str, Settings]
    out: str = ""
    """Folder of all of it; empty: runs/RECIPE. The same command goes on where it was cut off."""

    def __post_init__(self) -> None:
        """Raises: ValueError: no stages, a name that is no folder's, a reference to no earlier stage."""
        if not self.stages:
            raise ValueError("a pipeline needs at least one stage")
        known: set[str] = set()
        for name, settings in self.stages.items():
            if not name.replace("-", "_").isidentifier():
                raise ValueError(f"stage {name!r}: a name has letters, digits, - and _")
            for where, reference in references(settings):
                if reference not in known:
                    there = f"earlier are {', '.join(known)}" if known else "it is the first"
                    raise ValueError(f"stage {name}: {where} is {REFERENCE}{reference}, no earlier stage ({there})")
            known.add(name)


def references(settings: Any) -> Iterator[tuple[str, str]]:
    """Where a stage names others, and which."""
    for where, value in _leaves(settings):
        if isinstance(value, str) and value.startswith(REFERENCE):
            yield where, value.removeprefix(REFERENCE)


def resolved(settings: Any, outputs: Mapping[str, Path]) -> Any:
    """The same with the outputs of other stages in place of their names."""
    if isinstance(settings, str):
        return str(outputs[name]) if (name := settings.removeprefix(REFERENCE)) != settings else settings
    if isinstance(settings, dict):
        return {key: resolved(value, outputs) for key, value in settings.items()}
    if isinstance(settings, tuple):
        return tuple(resolved(value, outputs) for value in settings)
    if is_dataclass(settings) and not isinstance(settings, type):
        values = {one.name: resolved(getattr(settings, one.name), outputs) for one in fields(settings)}
        return replace(settings, **values)
    return settings


def _leaves(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if is_dataclass(tree) and not isinstance(tree, type):
        tree = {one.name: getattr(tree, one.name) for one in fields(tree)}
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(tree, tuple):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{where}.{i}")
    else:
        yield where, tree


def check(pipeline: Pipeline) -> None:
    """Look at what lies outside of the pipeline, before anything runs.

    Raises:
        ValueError: a model or file that is not there, a task that leads nowhere, a stage without what it needs.
    """
    for name, settings in pipeline.stages.items():
        try:
            _check(settings)
            _check_selection(settings, pipeline)
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}") from error


def _check_selection(settings: Any, pipeline: Pipeline) -> None:
    """Refuse to train behind a conversion whose index_topk no sequence exceeds."""
    topk, longest = None, settings.max_len if isinstance(settings, Supervised) else None
    while isinstance(settings, Supervised | Conversion):
        if isinstance(settings, Conversion):
            topk = settings.indexer.index_topk
        if not settings.model.startswith(REFERENCE):
            if longest is None and Path(settings.model).is_dir():
                longest = read_config(settings.model).get("max_position_embeddings")
            break
        settings = pipeline.stages[settings.model.removeprefix(REFERENCE)]
    if topk and longest and topk >= longest:
        raise ValueError(
            f"index_topk is {topk} and a sequence has {longest} tokens at most: nothing is ever left out; take a "
            "smaller index_topk"
        )


def _check(settings: Any) -> None:
    if isinstance(settings, Supervised | Blank) and not settings.data:
        raise ValueError("data is empty: give .jsonl or .parquet files")
    if isinstance(settings, Config | Supervised | Conversion) and not settings.model:
        raise ValueError(f"model is empty: give a checkpoint, or {REFERENCE}NAME")
    for file in getattr(settings, "data", ()):
        if not file.startswith(REFERENCE) and not Path(file).is_file():
            raise ValueError(f"{file}: no such file")
    if isinstance(settings, Config | Distillation | Demonstrations):
        for domain in settings.domains.values():
            load(domain.task)
    if isinstance(settings, Distillation):
        for name, domain in settings.domains.items():
            if not domain.teacher:
                raise ValueError(f"domain {name} has no specialist to answer: set domains.{name}.teacher")
    if isinstance(settings, Blank):
        load(settings.shape)
    for model in _models(settings):
        if not model.startswith(REFERENCE):
            locate(model)


def _models(settings: Any) -> Iterator[str]:
    domains = getattr(settings, "domains", {}).values()
    found = [getattr(settings, "model", ""), *(domain.teacher for domain in domains)]
    yield from filter(None, found)


class State:
    """pipeline.json: for each stage what it is made of, and once it is done, what came of it."""

    def __init__(self, folder: Path):
        self._file = folder / "pipeline.json"
        self.stages: dict[str, dict[str, Any]] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def save(self, name: str, row: dict[str, Any]) -> None:
        self.stages[name] = row
        replace_text(self._file, json.dumps(self.stages, indent=1, ensure_ascii=False) + "\n")


def run(pipeline: Pipeline, folder: Path, console: Console) -> int:
    """Run what is not done. Returns the exit code: that of the stage that did not end well.

    Raises:
        ValueError: a stage was made of other inputs than it would be made of now; another process is at it.
    """
    check(pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", str(folder)):
        state = State(folder)
        outputs: dict[str, Path] = {}
        for name, settings in pipeline.stages.items():
            inputs = inputs_of(settings, outputs)
            row = state.stages.get(name)
            if row:
                _check_inputs(name, row["inputs"], inputs, folder)
            if not row or "output" not in row or not Path(row["output"]).exists():
                row = {"kind": type(settings).__name__, "inputs": inputs, "seconds": row["seconds"] if row else 0.0}
                state.save(name, row)
                console.rule(f"{name}: {row['kind']}", align="left")
                started = time.perf_counter()
                code = _run(resolved(settings, outputs), folder / name)
                row["seconds"] += time.perf_counter() - started
                if code == 0:
                    found = {
                        "tokens": tokens_of(settings, folder / name),
                        "figures": figures_of(settings, folder / name),
                    }
                    row |= {"output": str(output_of(settings, folder / name)), **found}
                state.save(name, row)
                if code:
                    show(pipeline, state, console)
                    console.print(f"stage {name} ended with code {code}; the same command goes on from there")
                    return code
            outputs[name] = Path(row["output"])
    show(pipeline, state, console)
    return 0


def _run(settings: Settings, folder: Path) -> int:
    """One stage in a process of its own, which saves and ends if this one dies. A folder that is there goes on."""
    if isinstance(settings, Conversion | Demonstrations | Blank) and folder.exists():
        return 0  # these are there whole or not at all
    if folder.exists() and not (folder / "config.json").is_file():
        shutil.rmtree(folder)  # cut off before anything was written
    words = [str(folder), "--resume"]
    if not folder.exists():
        file = folder.with_suffix(".json")
        replace_text(file, settings.to_json())
        words = [str(file), "--out", str(folder)]
    command = [sys.executable, "-c", "from trimtab.grpo.commands.cli import main; raise SystemExit(main())", "train"]
    process = subprocess.Popen([*command, *words], preexec_fn=_end_with_parent)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the stage as well
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Linux: SIGTERM when the parent dies, however it does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def inputs_of(settings: Settings, outputs: Mapping[str, Path]) -> dict[str, Any]:
    """What decides a stage: its settings, and what its files and folders hold."""
    named = {name for _, name in references(settings)}
    files = {f"{REFERENCE}{name}": signature(outputs[name]) for name in sorted(named)}
    outside = [value for value in (*_models(settings), *getattr(settings, "data", ())) if REFERENCE not in value]
    for value in outside:
        if Path(value).exists():
            files[value] = signature(Path(value))
    for domain in getattr(settings, "domains", {}).values():
        if (file := domain.task.rpartition(":")[0]).endswith(".py") and Path(file).is_file():
            files[file] = signature(Path(file))
    kept = {key: value for key, value in flat(json.loads(settings.to_json())).items() if key not in PLACEMENT}
    return {"settings": kept, "files": files}


def signature(path: Path) -> str:
    """Tells what a file or folder holds: names, sizes and contents, of files above WHOLE a share of them."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.name != "lock":
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path) if path.is_dir() else file.name} {size}".encode())
            with file.open("rb") as stream:
                for start in range(0, size, PIECE if size <= WHOLE else 64 * PIECE):
                    stream.seek(start)
                    digest.update(stream.read(PIECE))
    return digest.hexdigest()[:16]


def _check_inputs(name: str, before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    remedy = f"take another --out, or remove {folder / name} and its entry of pipeline.json to make it anew"
    for key in before["settings"].keys() | now["settings"].keys():
        old, new = before["settings"].get(key), now["settings"].get(key)
        if old != new:
            raise ValueError(f"stage {name} was made with {key} = {old!r}, and the recipe now says {new!r}: {remedy}")
    for file in before["files"].keys() | now["files"].keys():
        if before["files"].get(file) != now["files"].get(file):
            raise ValueError(f"stage {name} was made of another {file} than is there now: {remedy}")


def output_of(settings: Settings, folder: Path) -> Path:
    """What a finished stage gives to others: a checkpoint's folder, or a file of conversations."""
    match settings:
        case Config() | Supervised():
            return max((folder / "checkpoints").glob("step-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))
        case Distillation():
            return folder / "kept.jsonl"
        case Demonstrations():
            return folder / "conversations.jsonl"
    return folder


def tokens_of(settings: Settings, folder: Path) -> int | None:
    """Tokens that a stage has learnt from or sampled."""
    match settings:
        case Config():
            return sum(row.get("sampled_tokens", 0) for _, row in read_json_lines(folder / "metrics.jsonl"))
        case Supervised():
            return sum(row["tokens"] for _, row in read_json_lines(folder / "metrics.jsonl"))
        case Distillation():
            files = (folder / "sampled").glob("*.jsonl")
            return sum(row.get("tokens", 0) for file in files for _, row in read_json_lines(file))
    return None


def figures_of(settings: Settings, folder: Path) -> dict[str, Any]:
    """What a stage measured: held-out scores or losses before and after, samples kept."""
    match settings:
        case Config():
            held_out = json.loads((folder / "held_out.json").read_text())
            names = held_out["after"]["score"]
            return {name: [held_out[when]["score"][name] for when in ("before", "after")] for name in names}
        case Supervised():
            held_out = json.loads((folder / "held_out.json").read_text())
            return {name: [held_out[when][name] for when in ("before", "after")] for name in held_out["after"]}
        case Distillation():
            domains = json.loads((folder / "card.json").read_text())["domains"]
            return {name: [one["samples"], one["kept"]] for name, one in domains.items()}
    return {}


def show(pipeline: Pipeline, state: State, console: Console) -> None:
    """All stages as a person reads them, in 80 columns; pipeline.json has the same."""
    console.print(table(pipeline, state))
    for name, row in state.stages.items():
        if name in pipeline.stages and "output" in row:
            console.print(f"{name}: {row['output']}", soft_wrap=True, highlight=False)


def table(pipeline: Pipeline, state: State) -> Table:
    """A line for each figure of each stage."""
    shown = Table(title="stages", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("stage", "from", "tokens", "seconds", "figure", "before", "after"):
        shown.add_column(header, justify="left" if header in ("stage", "from", "figure") else "right")
    for name, settings in pipeline.stages.items():
        row = state.stages.get(name, {})
        sources = ", ".join(dict.fromkeys(source for _, source in references(settings)))
        tokens, seconds = row.get("tokens"), row.get("seconds")
        first = (name, sources, f"{tokens:,}" if tokens else "-", f"{seconds:.0f}" if seconds else "-")
        figures = [(key, *map(_number, pair)) for key, pair in row.get("figures", {}).items()]
        for line in [first + (figures.pop(0) if figures else ("-", "", "")), *(("",) * 4 + one for one in figures)]:
            shown.add_row(*line)
    return shown


def _number(value: Any) -> str:
    """Of a list, a layer each, the mean."""
    value = fmean(value) if isinstance(value, list) else value
    return str(value) if isinstance(value, int) else f"{value:.3f}"
