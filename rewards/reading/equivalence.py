"""Mathematical equivalence in worker processes, which are killed and replaced where a comparison takes too long."""

import asyncio
import contextlib
import functools
import json
import os
import queue
import select
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from trimtab.rewards.reading.math_worker import DIFFERENT, EQUAL, READY, UNREADABLE_TRUTH
from trimtab.rewards.types import VerifierError

MAX_CHARACTERS = 2000
"""Of an answer or a truth; a longer answer equals nothing."""

_START_SECONDS = 120.0
_WORKERS = min(4, os.cpu_count() or 1)


async def compare_expressions(answer: str, truth: str, *, seconds: float) -> bool:
    """Whether `math-verify` finds two LaTeX expressions equal within seconds of one worker's time.

    Waiting for a worker does not count. An answer at which a worker takes longer, or dies twice, is wrong: a policy
    must not void what it cannot solve. Where the truth does the same to a worker by itself, nothing is said. Nothing
    here depends on the event loop: workers outlive it and end with this process.

    Raises:
        ValueError: the truth cannot be parsed or is too long, or seconds is not above 0.
        VerifierError: no worker could be started, or it breaks at the truth as well.
    """
    if seconds <= 0:
        raise ValueError(f"the time limit must be above 0 seconds, got {seconds}")
    if len(truth) > MAX_CHARACTERS:
        raise ValueError(f"a truth has at most {MAX_CHARACTERS} characters, got {len(truth)}: {truth[:80]!r}...")
    if len(answer) > MAX_CHARACTERS:
        return False
    reply = await asyncio.get_running_loop().run_in_executor(_threads(), _ask, answer, truth, seconds)
    if reply == UNREADABLE_TRUTH:
        raise ValueError(f"the truth {truth!r} cannot be read as mathematics: use exact() for answers in words")
    return reply == EQUAL


class _Worker:
    def __init__(self) -> None:
        # a session of its own: Ctrl-C is for the trainer, and a worker that died of it would call answers wrong
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trimtab.rewards.reading.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self.read(_START_SECONDS) != READY:
            self.kill()
            command = "python -m trimtab.rewards.reading.math_worker"
            raise VerifierError(f"the worker for mathematics did not start (is math-verify installed?): run {command}")

    def ask(self, answer: str, truth: str, seconds: float) -> bytes | None:
        """The reply; nothing (b"") when the worker died, None when its time ran out."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([answer, truth, seconds]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return b""
        return self.read(seconds)

    def read(self, seconds: float) -> bytes | None:
        assert self.process.stdout is not None
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        return os.read(self.process.stdout.fileno(), 1) if poll.poll(seconds * 1000) else None

    def kill(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # a question may still be in the buffer
            self.process.stdin.close()


_idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WORKERS, thread_name_prefix="trimtab-mathematics")


def _ask(answer: str, truth: str, seconds: float) -> bytes:
    if reply := _reply(answer, truth, seconds):
        return reply
    if _reply(truth, truth, seconds):
        return DIFFERENT
    raise VerifierError(f"the worker for mathematics breaks at the truth {truth[:80]!r} within {seconds:g} s")


def _reply(answer: str, truth: str, seconds: float) -> bytes | None:
    """Nothing where the time ran out, or where two workers died."""
    for take in (_take, _Worker):  # a worker may have died of something else, idle: only a fresh one's death counts
        worker = take()
        reply = worker.ask(answer, truth, seconds)
        if reply:
            _idle.put(worker)
            return reply
        worker.kill()
        if reply is None:
            break
    return None


def _take() -> _Worker:
    try:
        return _idle.get_nowait()
    except queue.Empty:
        return _Worker()
