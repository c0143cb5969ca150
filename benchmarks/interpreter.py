"""Many episodes with the code interpreter: how fast, how much memory, and whether anything is left behind.

    python benchmarks/interpreter.py
    python benchmarks/interpreter.py --episodes 20 --concurrency 4

Each episode starts a kernel, executes pieces of code that build on each other, answers and is closed. Prints a table,
and exits with 1 when a process, a file, a descriptor or a thread is left, or an answer is wrong. Memory is the sum of
the resident memory of this process and all below it, ten times a second; a page that several share counts for each.
"""

import argparse
import asyncio
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

from trimtab.environments.base import Message, ToolCall
from trimtab.environments.tools.functions import ToolEnv
from trimtab.environments.tools.interpreter import Interpreter
from trimtab.rewards.sandbox import isolation

CODES = ("numbers = range({})", "squares = [i * i for i in numbers]", "print(sum(squares))")
SETTLE_SECONDS = 5.0
"""Time that the system has for taking down the namespaces of killed kernels."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--episodes", type=int, default=200)
    arguments.add_argument("--concurrency", type=int, default=16)
    options = arguments.parse_args(argv)
    print(f"{os.cpu_count()} cores; sandbox: {isolation()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="t") as folder:  # the kernels' folders, apart from those of other programs
        tempfile.tempdir = folder
        asyncio.run(play_all(1, 1))  # imports, and what asyncio opens once
        before = Left.count(folder)
        with Memory() as memory:
            begin = time.monotonic()
            right = asyncio.run(play_all(options.episodes, options.concurrency))
            seconds = time.monotonic() - begin
        after = Left.settled(folder, before)
    return report(options.episodes, options.concurrency, right, seconds, memory.peak, before, after)


async def play_all(episodes: int, concurrency: int) -> int:
    """Play the episodes, at most so many at a time; return how many were answered rightly."""
    room = asyncio.Semaphore(concurrency)

    async def one(number: int) -> bool:
        async with room:
            return await play(number)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number)) for number in range(episodes)]
    return sum(task.result() for task in tasks)


async def play(number: int) -> bool:
    """One episode, answered with what the last execution prints; whether that is right."""
    answer = str(sum(i * i for i in range(number)))
    env = ToolEnv("The sum of squares?", [Interpreter()], lambda message: {"outcome": float(message.content == answer)})
    try:
        await env.start()
        for code in CODES:
            call = ToolCall("python", {"code": code.format(number)})
            (reply,) = (await env.step(Message("assistant", tool_calls=(call,)))).replies
        return (await env.step(Message("assistant", reply.content))).rewards["outcome"] == 1.0
    finally:
        await env.close()


@dataclass(frozen=True, slots=True)
class Left:
    """What episodes may leave behind."""

    processes: int
    """Below this one, or anywhere with the folder in their command line, as kernels have."""
    files: int
    """Below the folder."""
    descriptors: int
    """Open in this process, sockets among them."""
    threads: int

    @classmethod
    def count(cls, folder: str) -> "Left":
        gc.collect()
        own = psutil.Process()
        elsewhere = {process.pid for process in psutil.process_iter(["cmdline"]) if folder in str(process.info)}
        below = {process.pid for process in own.children(recursive=True)}
        files = sum(1 for _ in Path(folder).rglob("*"))
        return cls(len(below | elsewhere), files, own.num_fds(), own.num_threads())

    @classmethod
    def settled(cls, folder: str, before: "Left") -> "Left":
        """The count once it is as before, or after SETTLE_SECONDS."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while (found := cls.count(folder)) != before and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


class Memory:
    """The peak of the resident bytes of this process and all below it, while inside `with`."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        own = psutil.Process()
        while not self._over.wait(0.1):
            total = 0
            for process in (own, *own.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    total += process.memory_info().rss
            self.peak = max(self.peak, total)


def report(episodes: int, concurrency: int, right: int, seconds: float, peak: int, before: Left, after: Left) -> int:
    """Print the table; return the exit status."""
    rows = [
        ("episodes, at a time", f"{episodes}, {concurrency}"),
        ("answered rightly", f"{right}"),
        ("seconds", f"{seconds:.1f}"),
        ("episodes a second", f"{episodes / seconds:.2f}"),
        ("executions a second", f"{episodes * len(CODES) / seconds:.2f}"),
        ("peak resident memory, MiB", f"{peak / 2**20:.0f}"),
    ]
    left = {one.name: (getattr(before, one.name), getattr(after, one.name)) for one in fields(Left)}
    rows += [(f"{name} before and after", f"{counts[0]}, {counts[1]}") for name, counts in left.items()]
    print("\n".join(f"| {name} | {value} |" for name, value in (("", ""), ("---", "---"), *rows)))
    if after != before or right != episodes:
        print("something was left behind, or an answer was wrong", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
