"""The trimtab command."""

import sys
import time
from pathlib import Path

import tyro

from trimtab.grpo.config import Config
from trimtab.grpo.curve import curve_for
from trimtab.grpo.recipes import RECIPES, find_recipe
from trimtab.grpo.run import RunFolder

USAGE = f"""usage: trimtab COMMAND

  trimtab train RECIPE [--option value ...]   start a run; RECIPE is {", ".join(sorted(RECIPES))} or path.py:function
  trimtab train RECIPE --help                 every option with its default
  trimtab train runs/NAME --resume            continue a run
  trimtab train RECIPE --check                ... and say at its end whether it followed the recipe's expected curve
  trimtab check runs/NAME                     the same of a run that has finished, or is under way
  trimtab judge-eval FILE --model NAME [--base-url URL] [--option value ...]   a judge against labels; --help: options
  trimtab judge-eval --generate FILE          write labelled answers to try it with
  trimtab doctor [--json]                     what this machine can run, and why not"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 2 for what the user can mend."""
    words = sys.argv[1:] if argv is None else argv
    match words:
        case ["train", target, *options] if not target.startswith("-"):
            try:
                return _train(target, options)
            except KeyboardInterrupt:
                print("trimtab: stopped at once; what was not saved is lost", file=sys.stderr)
                return 130
        case ["check", folder] if not folder.startswith("-"):
            return _check(Path(folder))
        case ["judge-eval", *options] if options:
            return _judge_eval(options)
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
        default = Config.load(Path(target) / "config.json") if resume else find_recipe(target)()
        config = tyro.cli(
            Config, default=default, args=options, prog=f"trimtab train {target}", description=Config.__doc__
        )
        fresh = config.out or time.strftime(f"runs/{_name(target)}-%Y%m%d-%H%M%S")
        folder = Path(target if resume else fresh)

        from trimtab.grpo.sync import WeightMismatch
        from trimtab.grpo.train import NothingPlayed, prepare
        from trimtab.grpo.trainer import Diverged
        from trimtab.rollout.engine.pool import EngineError

        run = prepare(config, folder, resume=resume)
        if checked:
            curve_for(run.config)
    except ValueError as error:
        return _fail(str(error))
    try:
        code = run.train()
    except (OSError, NothingPlayed, EngineError, WeightMismatch, Diverged) as error:
        print(f"trimtab: {error}; {_remedy(folder)}", file=sys.stderr)
        return 1
    return _check(folder) if checked and code == 0 else code


def _remedy(folder: Path) -> str:
    """What to do with a run that has stopped."""
    if RunFolder(folder).checkpoints():
        return f"checkpoints are whole, go on with: trimtab train {folder} --resume"
    return "no checkpoint had been saved yet: start it anew"


def _check(folder: Path) -> int:
    from trimtab.grpo.commands.check import check

    try:
        return check(folder)
    except ValueError as error:
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


def _name(target: str) -> str:
    return Path(target.partition(":")[0]).stem


def _fail(message: str) -> int:
    print(f"trimtab: {message}", file=sys.stderr)
    return 2
