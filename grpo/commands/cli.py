"""The trimtab command."""

import os
import sys
import sysconfig
import time
import traceback
from pathlib import Path
from typing import Any

import tyro

from trimtab.grpo.config import Config
from trimtab.grpo.recipes import PIPELINES, RECIPES, STAGES, find_pipeline, find_recipe
from trimtab.grpo.results.curve import curve_for
from trimtab.grpo.start import load_settings, prepare

USAGE = f"""usage: trimtab COMMAND

  trimtab train RECIPE [--option value ...]   start a run; RECIPE is {", ".join(sorted(RECIPES))} or path.py:function,
                                              a supervised stage ({", ".join(STAGES)}), or settings.json
  trimtab train RECIPE --help                 every option with its default
  trimtab train runs/NAME --resume            continue a run
  trimtab train RECIPE --check                ... and say at its end whether it followed the recipe's expected curve
  trimtab check runs/NAME                     the same of a run that has finished, or is under way
  trimtab pipeline RECIPE [--out FOLDER]      run stages one after another, or go on with them; RECIPE is
                                              {", ".join(PIPELINES)} or path.py:function
  trimtab convert CHECKPOINT FOLDER [--option value ...]   a dense DeepSeek-V3 becomes DeepSeek-V3.2, with an indexer
  trimtab judge-eval FILE --model NAME [--base-url URL] [--option value ...]   a judge against labels; --help: options
  trimtab judge-eval --generate FILE          write labelled answers to try it with
  trimtab grade-check TASK [--option value ...]   whether a task's reward pays its own answers and nothing else
  trimtab doctor [--json]                     what this machine can run, and why not"""


SPINS = "400"
"""Rounds that a thread of torch waits before it sleeps: about a microsecond. By itself it would spin for a millisecond,
on a core that a neighbour needs."""


def quiet() -> None:
    """Be a good neighbour; must be called before torch is imported, whose threads read it then."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 2 for what the user can mend."""
    quiet()
    words = sys.argv[1:] if argv is None else argv
    match words:
        case ["train", target, *options] if not target.startswith("-"):
            try:
                return _train(target, options)
            except KeyboardInterrupt:
                print("trimtab: stopped; nothing had begun", file=sys.stderr)
                return 130
        case ["check", folder] if not folder.startswith("-"):
            return _check(Path(folder))
        case ["pipeline", target, *options] if not target.startswith("-"):
            return _pipeline(target, options)
        case ["convert", source, out, *options] if not source.startswith("-") and not out.startswith("-"):
            return _convert(source, Path(out), options)
        case ["convert", "--help"]:
            return _convert("", Path(), ["--help"])
        case ["judge-eval", *options] if options:
            return _judge_eval(options)
        case ["grade-check", *options] if options:
            return _grade_check(options)
        case ["doctor"] | ["doctor", "--json"]:
            from trimtab.grpo.commands.doctor import doctor

            return doctor(as_json="--json" in words)
        case [] | ["-h" | "--help", *_] | [_, "-h" | "--help"]:
            print(USAGE)
            return 0
    return _fail(f"no command {' '.join(words)!r}\n{USAGE}")


def _train(target: str, options: list[str]) -> int:
    resume, checked = "--resume" in options, "--check" in options
    options = [option for option in options if option not in ("--resume", "--check")]
    try:
        if resume or target.endswith(".json"):
            default: Any = load_settings(Path(target) / "config.json" if resume else Path(target))
        else:
            default = find_recipe(target)()
        kind: Any = type(default)
        if checked and kind is not Config:
            raise ValueError(f"--check compares rewards with a recipe's expected curve, and {target} has no rewards")
        config = tyro.cli(kind, default=default, args=options, prog=f"trimtab train {target}", description=kind.__doc__)
        fresh = config.out or time.strftime(f"runs/{_name(target)}-%Y%m%d-%H%M%S")
        folder = Path(target if resume else fresh)

        from trimtab.grpo.policy.learner import Diverged
        from trimtab.grpo.runs.folder import remedy
        from trimtab.grpo.sampling.lost import TooManyLost
        from trimtab.grpo.sampling.scores import PartMissing
        from trimtab.grpo.sampling.sync import WeightMismatch
        from trimtab.rollout.engine.pool import EngineError

        run: Any = prepare(config, folder, resume=resume)
        if checked:
            curve_for(run.config)
    except (ValueError, FileNotFoundError) as error:
        print(theirs(error), end="", file=sys.stderr)
        return _fail(str(error))
    try:
        code = run.train()
    except ValueError as error:
        return _fail(str(error))
    except Exception as error:
        ours = isinstance(error, TooManyLost | PartMissing | EngineError | WeightMismatch | Diverged | OSError)
        print(theirs(error) or ("" if ours else traceback.format_exc()), end="", file=sys.stderr)
        print(f"trimtab: {error or repr(error)}; {remedy(folder)}", file=sys.stderr)
        return 1
    return _check(folder) if checked and code == 0 else code


def _pipeline(target: str, options: list[str]) -> int:
    from rich.console import Console

    from trimtab.grpo.pipeline import Pipeline, run

    try:
        made = find_pipeline(target)()
        if not isinstance(made, Pipeline):
            raise ValueError(f"{target} is no pipeline, but {type(made).__name__}: trimtab train runs it")
        match options:
            case []:
                folder = Path(made.out or Path("runs") / _name(target))
            case ["--out", out]:
                folder = Path(out)
            case _:
                raise ValueError(f"a pipeline takes --out FOLDER and nothing else, got {' '.join(options)!r}")
        return run(made, folder, Console(width=None if sys.stdout.isatty() else 160))
    except (ValueError, OSError) as error:
        print(theirs(error), end="", file=sys.stderr)
        return _fail(str(error))


def theirs(error: BaseException) -> str:
    """The traceback of what failed in code that is the user's, from its first line there; empty: it was not theirs."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(frames) if not _is_installed(frame.filename)), None)
    if first is None:
        return ""
    lines = ["Traceback (most recent call last), from your code on:\n", *traceback.format_list(frames[first:])]
    return "".join([*lines, *traceback.format_exception_only(error)])


def _is_installed(file: str) -> bool:
    """Whether a source file belongs to trimtab, a package or Python."""
    places = [Path(__file__).parents[2] / room for room in ("grpo", "rollout", "rewards", "environments", "kernels")]
    places += [Path(path) for path in {*sysconfig.get_paths().values(), sys.prefix}]
    return file.startswith("<") or any(Path(file).is_relative_to(place) for place in places)


def _check(folder: Path) -> int:
    from trimtab.grpo.commands.check import check

    try:
        return check(folder)
    except ValueError as error:
        return _fail(str(error))


def _convert(source: str, out: Path, options: list[str]) -> int:
    from trimtab.grpo.commands.convert import run
    from trimtab.grpo.stages.config import Indexer

    try:
        return run(source, out, tyro.cli(Indexer, args=options, prog="trimtab convert CHECKPOINT FOLDER"))
    except (ValueError, OSError) as error:
        return _fail(str(error))


def _judge_eval(options: list[str]) -> int:
    from trimtab.grpo.commands.judge_eval import Generate, JudgeEval, judge_eval, write_labelled

    try:
        if options[0] == "--generate":
            write_labelled(tyro.cli(Generate, args=options[1:], prog="trimtab judge-eval --generate"))
            return 0
        return judge_eval(tyro.cli(JudgeEval, args=options, prog="trimtab judge-eval"))
    except ValueError as error:
        return _fail(str(error))


def _grade_check(options: list[str]) -> int:
    from trimtab.grpo.commands.grade_check import GradeCheck, grade_check

    try:
        return grade_check(tyro.cli(GradeCheck, args=options, prog="trimtab grade-check"))
    except (ValueError, FileNotFoundError) as error:
        print(theirs(error), end="", file=sys.stderr)
        return _fail(str(error))


def _name(target: str) -> str:
    return Path(target.partition(":")[0]).stem


def _fail(message: str) -> int:
    print(f"trimtab: {message}", file=sys.stderr)
    return 2
