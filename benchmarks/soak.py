"""A long run of a small policy into which faults are put at random, each with an outcome that is asserted.

    python benchmarks/soak.py                 500 steps; about 40 minutes on two cores
    python benchmarks/soak.py --steps 60 --seed 1

The policy is the quickstart's after a short cold start; it plays reasoning, agent and judged tasks on real engines, a
judge in a process of its own rules. From outside come: a killed engine, a killed judge, a full disk (the run lies in a
small tmpfs; without root it is left out), a slow disk, a clock that jumps, a gradient that is not finite, SIGTERM,
SIGKILL of everything, a damaged newest checkpoint. From inside: an environment that raises, a reward of NaN, a tool
that hangs (one episode of thirty each), an environment that hangs (one of 180). The run goes on after each; at the end
its ledger, its losses, its memory and its descriptors are looked at. soak_task.py holds what is put inside.
"""

import argparse
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil

from trimtab.environments.json_lines import read_json_lines
from trimtab.grpo.config import Config, Judge
from trimtab.grpo.recipes import quickstart
from trimtab.grpo.sampling.mixture import draw_step, load_tasks
from trimtab.grpo.setup.rehearsal import STAND_INS

HERE = Path(__file__).parent
TRIMTAB = [sys.executable, "-c", "import sys; from trimtab.grpo.commands.cli import main; sys.exit(main())"]
EVERY = (8, 16)
"""Steps between two faults from outside."""
LIMIT_S = 240.0
"""For the outcome of a fault to be seen."""
DISK_MIB = 192
SETTLED = 15
"""Steps of a process before its memory is looked at."""


def config(steps: int, port: int) -> Config:
    whole = quickstart()
    task = f"{HERE / 'soak_task.py'}:"
    names = {"reasoning": "Reasoning", "agent": "Agent", "alignment": "Alignment"}
    domains = {
        name: replace(domain, task=task + names[name], prompts=2, max_lost=0.9, episode_seconds=4.0)
        for name, domain in whole.domains.items()
    }
    return replace(
        whole,
        model="model",
        domains=domains,
        judge=Judge(model="judge", base_url=f"http://127.0.0.1:{port}/v1", seconds=5.0, patience_s=120.0, attempts=1),
        rollout=replace(whole.rollout, actors=1),
        sampling=replace(whole.sampling, max_tokens=48),
        group_size=4,
        minibatches=2,
        steps=steps,
        save_every=4,
        held_out=2,
    )


@dataclass
class Soak:
    """One run, the process that trains it now, and what was seen."""

    folder: Path
    steps: int
    port: int
    recipe: str
    process: subprocess.Popen[bytes] = None  # type: ignore[assignment]
    judge: subprocess.Popen[bytes] = None  # type: ignore[assignment]
    starts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[int, int, float, int]] = field(default_factory=list)
    """Start, step, MiB, descriptors."""

    def start(self) -> None:
        words = [str(self.folder), "--resume"] if (self.folder / "config.json").exists() else [self.recipe]
        out = [] if words[-1] == "--resume" else ["--out", str(self.folder)]
        log = open("log.txt", "ab")  # noqa: SIM115 (the child's)
        self.process = subprocess.Popen([*TRIMTAB, "train", *words, *out], stdout=log, stderr=log)
        self.starts += 1

    def start_judge(self) -> None:
        self.judge = subprocess.Popen([sys.executable, str(HERE / "soak_task.py"), str(self.port)])

    def done(self) -> int:
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def metric(self, name: str) -> float:
        rows = [row for _, row in read_json_lines(self.folder / "metrics.jsonl")]
        return rows[-1].get(name, 0.0) if rows else 0.0

    def said(self) -> str:
        """What this start has said."""
        return Path("log.txt").read_text(errors="replace").rpartition(f"run: {self.folder}")[2]

    def wait(self, what: str, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not until():
            if time.monotonic() > deadline:
                sys.exit(f"the soak failed: {what} was not seen within {LIMIT_S:g} s; see {Path('log.txt').resolve()}")
            self.sample()
            time.sleep(0.2)
        self.outcomes[what] += 1

    def play(self, steps: int) -> None:
        """Wait for so many more steps, or the end."""
        goal = min(self.done() + steps, self.steps)
        deadline = time.monotonic() + LIMIT_S
        while self.done() < goal:
            if (code := self.process.poll()) is not None and self.done() < goal:
                sys.exit(f"the soak failed: the run ended by itself with code {code}; see {Path('log.txt').resolve()}")
            if time.monotonic() > deadline:
                sys.exit(f"the soak failed: no {steps} steps in {LIMIT_S:g} s; see {Path('log.txt').resolve()}")
            self.sample()
            time.sleep(0.2)

    def sample(self) -> None:
        try:
            driver = psutil.Process(self.process.pid)
            found = (driver.memory_info().rss / 2**20, driver.num_fds())
        except psutil.Error:
            return
        if not self.samples or self.samples[-1][:2] != (self.starts, self.done()):
            self.samples.append((self.starts, self.done(), *found))

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_everything(self) -> None:
        everything = [psutil.Process(self.process.pid), *self.children()]
        for process in everything:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def again(self) -> None:
        before = self.done()
        self.start()
        self.wait("goes on", lambda: self.done() > 0 and "step" in self.said() and self.process.poll() is None)
        assert self.done() >= before - 2 * 4 - 1, "more was repeated than a checkpoint apart"


# ---- faults from outside: what is done, and the outcome that must be seen


def kill_engine(soak: Soak) -> None:
    before = soak.metric("engine_restarts")
    for child in soak.children():
        if "EngineServer" in " ".join(child.cmdline()):
            child.kill()
            break
    else:
        sys.exit("the soak failed: no engine was found")
    soak.wait("engine killed: replaced, requests repeated", lambda: soak.metric("engine_restarts") > before)


def kill_judge(soak: Soak) -> None:
    soak.judge.kill()
    soak.judge.wait()
    told = soak.said().count("answers again")
    time.sleep(3)
    soak.start_judge()
    done = soak.done()
    soak.wait(
        "judge killed: waited for, answers again",
        lambda: soak.said().count("answers again") > told or soak.done() > done + 2,
    )


def fill_disk(soak: Soak) -> None:
    filler = soak.folder.parent / "filler"
    failures = soak.metric("checkpoint_failures")
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(65536))
        except OSError:
            pass
    told = soak.said().count("could not be written")
    started = time.monotonic()
    while soak.said().count("could not be written") <= told and time.monotonic() < started + LIMIT_S:
        soak.sample()
        time.sleep(0.2)
    filler.unlink()
    soak.wait(
        "disk full: a write fails, is owed, and made up for",
        lambda: soak.metric("checkpoint_failures") >= failures and soak.said().count("could not be written") > told,
    )


def slow_disk(soak: Soak) -> None:
    Path("slow").touch()
    soak.play(5)
    Path("slow").unlink()
    soak.outcomes["disk slow: the run waits for it"] += 1


def jump(soak: Soak) -> None:
    Path("jump").touch()
    soak.wait("clock jumps by a day: nothing ends", lambda: not Path("jump").exists())
    soak.play(2)


def diverge(soak: Soak) -> None:
    Path("nan").touch()
    soak.wait("gradient not finite: the run stops with a sentence", lambda: soak.process.poll() is not None)
    said = soak.said()
    if soak.process.returncode != 1 or "norm is" not in said or "--resume" not in said:
        sys.exit(f"the soak failed: a gradient that is not finite ended with {soak.process.returncode}: {said[-500:]}")
    soak.again()


def terminate(soak: Soak) -> None:
    soak.process.send_signal(signal.SIGTERM)
    soak.wait("SIGTERM: the step is finished and saved", lambda: soak.process.poll() is not None)
    if soak.process.returncode != 143 or "--resume" not in soak.said():
        sys.exit(f"the soak failed: SIGTERM ended with {soak.process.returncode}: {soak.said()[-500:]}")
    soak.again()


def kill(soak: Soak) -> None:
    soak.kill_everything()
    soak.outcomes["SIGKILL of everything: goes on from its checkpoint"] += 1
    soak.again()


def damage(soak: Soak) -> None:
    soak.kill_everything()
    newest = max((soak.folder / "checkpoints").glob("step-*[0-9]"))
    os.truncate(newest / "model.safetensors", 100)
    soak.start()
    soak.wait("newest checkpoint damaged: the one before is taken", lambda: f"{newest.name} is damaged" in _tail())
    soak.wait("goes on", lambda: "step" in soak.said() and soak.process.poll() is None)


def _tail() -> str:
    return Path("log.txt").read_text(errors="replace")[-20000:]


FAULTS = (kill_engine, kill_judge, fill_disk, slow_disk, jump, diverge, terminate, kill, damage)
RESTART = (diverge, terminate, kill, damage)
STRETCH = 0.3
"""Share of the steps, the first ones, in which nothing ends the process, whose memory can so be looked at."""


def run(soak: Soak, rng: random.Random) -> None:
    soak.start_judge()
    soak.start()
    soak.play(3)
    faults: list[Callable[[Soak], None]] = []
    while soak.done() < soak.steps - 12:
        if not faults:
            left_out = [*([] if soak.folder.parent.is_mount() else [fill_disk])]
            left_out += RESTART if soak.done() < STRETCH * soak.steps else ()
            faults = [fault for fault in FAULTS if fault not in left_out]
            rng.shuffle(faults)
        soak.play(rng.randint(*EVERY))
        if soak.done() < soak.steps - 12:
            fault = faults.pop()
            print(f"step {soak.done()}: {fault.__name__}", file=sys.stderr, flush=True)
            fault(soak)
    soak.wait("the end", lambda: soak.process.poll() is not None and soak.process.returncode == 0)
    soak.judge.kill()


def report(soak: Soak) -> int:
    """Print the tables; the exit code is 1 where anything was lost, doubled or unaccounted for."""
    rows = [row for _, row in read_json_lines(soak.folder / "ledger.jsonl")]
    names = Counter(prompt["name"] for row in rows for prompt in row["prompts"])
    expected = {
        f"step{step}-{name}-{i}" for step in range(soak.steps) for name in quickstart().domains for i in range(2)
    }
    lost = len(expected - names.keys())
    doubled = sum(count - 1 for count in names.values()) + len(names.keys() - expected)
    reasons = Counter[str]()
    tokens = set()
    for _, row in read_json_lines(soak.folder / "lost.jsonl"):
        reasons[row["kind"]] += row["count"]
        tokens |= {word.strip("':") for word in row["reason"].split() if word.strip("':").startswith("injected-")}
    injected, hung, calls = _injected(soak).values()
    unaccounted = len(injected - tokens)
    print(f"\n{soak.steps} steps, {soak.starts} starts; {os.cpu_count()} cores, {platform.machine()}\n")
    print("| fault, and its outcome | times |\n| --- | --- |")
    for what, count in sorted(soak.outcomes.items()):
        if what not in ("goes on", "the end"):
            print(f"| {what} | {count} |")
    print(f"| environment raises, reward is NaN: the episode is lost with its reason | {len(injected)} |")
    print(f"| environment hangs: the episode is lost for its time | {len(hung)} ({reasons['time']} episodes) |")
    print(f"| tool hangs: the policy reads that there is no result | {len(calls)} |")
    print(f"\nprompts lost {lost}, doubled {doubled}; faults inside that no reason tells of {unaccounted}")
    print(f"episodes lost by kind: {dict(reasons)}")
    slopes = _slopes(soak.samples)
    print(f"memory of the driver {slopes[0]:+.2f} MiB, descriptors {slopes[1]:+.2f} in 100 steps ({slopes[2]} steps)")
    return int(bool(lost or doubled or unaccounted))


def _injected(soak: Soak) -> dict[str, set[str]]:
    """By fault, the names of the attempts that met one in the play of their step that counts, the last one. Names of
    the dry runs before a start are others."""
    settings = config(soak.steps, soak.port)
    tasks = load_tasks(settings, **STAND_INS)
    starts = [row["step"] for _, row in read_json_lines(soak.folder / "history.jsonl")]
    last = {}
    for step in range(soak.steps):
        start = max(i for i, first in enumerate(starts, 1) if first <= step)
        for draw in draw_step(settings, tasks, step):
            last |= {draw.make_env().token: start for _ in range(settings.group_size + 1)}
    found: dict[str, set[str]] = {"void": set(), "hang": set(), "tool": set()}
    for line in Path("injected.txt").read_text().splitlines():
        kind, token, start = line.split()
        if last.get(token) == int(start):
            found[kind].add(token)
    return found


def _slopes(samples: list[tuple[int, int, float, int]]) -> tuple[float, float, int]:
    """Least squares over the longest stretch without a restart, its first steps left out."""
    longest: list[tuple[int, int, float, int]] = []
    for start in {sample[0] for sample in samples}:
        of_start = [sample for sample in samples if sample[0] == start]
        settled = [sample for sample in of_start if sample[1] >= of_start[0][1] + SETTLED]
        longest = max(longest, settled, key=len)
    if len(longest) < 3:
        return float("nan"), float("nan"), 0
    steps, memory, descriptors = (np.array([sample[i] for sample in longest], float) for i in (1, 2, 3))
    slopes = [100 * np.polyfit(steps, values, 1)[0] for values in (memory, descriptors)]
    return slopes[0], slopes[1], int(steps[-1] - steps[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a checkpoint to start from; else a cold start makes one")
    options = parser.parse_args()
    options.model = options.model and options.model.resolve()
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    os.chdir(home)
    print(f"in {home}", file=sys.stderr)
    if options.model:
        shutil.copytree(options.model, "model")
    else:
        subprocess.run([sys.executable, str(HERE / "soak_task.py"), "model"], check=True)
    disk = home / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(disk)], capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = config(options.steps, port)
    settings.save(home / "settings.json")
    Path("recipe.py").write_text(
        "from pathlib import Path\nfrom trimtab.grpo.config import Config\n"
        f"def recipe():\n    return Config.load(Path({str(home / 'settings.json')!r}))\n"
    )
    soak = Soak(disk / "run", options.steps, port, f"{home / 'recipe.py'}:recipe")
    try:
        run(soak, random.Random(options.seed))
        return report(soak)
    finally:
        for process in filter(None, (soak.process, soak.judge)):
            process.kill()
        if mount.returncode == 0:
            shutil.copytree(soak.folder, home / "run", ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
            subprocess.run(["umount", "-l", str(disk)])


if __name__ == "__main__":
    sys.exit(main())
