"""What soak.py puts into a run: faulty tasks, a disk and a clock with moods, a judge, and the policy it starts with.

python benchmarks/soak_task.py model      the policy, in a folder model
python benchmarks/soak_task.py PORT       the judge
"""

import asyncio
import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from trimtab.environments.base import Env, Message, Step
from trimtab.environments.tasks.agent import AgentTask
from trimtab.environments.tasks.alignment import AlignmentTask
from trimtab.environments.tasks.reasoning import ReasoningTask
from trimtab.environments.tools.functions import tool

KINDS = {"raise": 1 / 30, "nan": 1 / 30, "tool": 1 / 30, "hang": 1 / 180}
"""Shares of the episodes with each fault."""

_fsync, _time = os.fsync, time.time
_offset = 0.0


def _slow_fsync(descriptor: int) -> None:
    if Path("slow").exists():
        time.sleep(0.3)
    _fsync(descriptor)


def _jumping_time() -> float:
    return _time() + _offset


os.fsync, time.time = _slow_fsync, _jumping_time


def note(kind: str, token: str) -> None:
    history = Path("disk/run/history.jsonl")
    starts = history.read_bytes().count(b"\n") if history.exists() else 0
    with open("injected.txt", "a") as file:
        file.write(f"{kind} {token} {starts}\n")


def hang() -> str:
    "Never returns."
    threading.Event().wait()
    return ""


class Faulty:
    """An environment with what befalls it drawn beforehand, so that a resumed run meets the same."""

    def __init__(self, env: Env, fault: str, token: str) -> None:
        self._env, self._fault, self.token = env, fault, token

    async def start(self) -> tuple[Message, ...]:
        return await self._env.start()

    async def step(self, message: Message) -> Step:
        global _offset
        if Path("jump").exists():
            _offset += random.choice((-86400.0, 86400.0))
            Path("jump").unlink(missing_ok=True)
        if Path("nan").exists():
            Path("nan").unlink(missing_ok=True)
            return Step(rewards={"outcome": 1e308, "rubric": 1e308, "rubric_truth": 1e308}, done=True)
        match self._fault:
            case "raise":
                note("void", self.token)
                raise RuntimeError(f"{self.token} fails")
            case "nan":
                note("void", self.token)
                return Step(rewards={self.token: float("nan")}, done=True)
            case "hang":
                note("hang", self.token)
                await asyncio.sleep(1000)
            case "tool":
                note("tool", self.token)
                assert await tool(hang, seconds=0.2).call({}) == "error: no result within 0.2 s"
        return await self._env.step(message)


class _Task:
    """A task of the quickstart, of which some episodes are faulty."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], Env]:
        make, faults = self._task.sample(rng, held_out=held_out), _faults(rng, held_out)
        return lambda: Faulty(make(), *next(faults))

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        return self._task.demonstrate(rng)


def _faults(rng: random.Random, held_out: bool) -> Iterator[tuple[str, str]]:
    """For each attempt at a prompt, its fault and a name for it."""
    seed = rng.getrandbits(40)
    attempts = random.Random(seed)
    number = 0
    while True:
        (fault,) = attempts.choices(["", *KINDS], [1 - sum(KINDS.values()), *KINDS.values()])
        yield "" if held_out else fault, f"injected-{seed:x}-{number}"
        number += 1


class Reasoning(_Task):
    def __init__(self) -> None:
        super().__init__(ReasoningTask())


class Agent(_Task):
    def __init__(self) -> None:
        super().__init__(AgentTask())


class Alignment(_Task):
    def __init__(self, judge: Any) -> None:
        super().__init__(AlignmentTask(judge))


class Judge(BaseHTTPRequestHandler):
    """Says yes to every second question, by its length."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = "yes" if len(body["messages"][0]["content"]) % 2 else "no"
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "usage": usage}
        payload = json.dumps(reply | {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        pass


def make_policy() -> None:
    from rich.console import Console

    from trimtab.grpo.recipes import quickstart
    from trimtab.grpo.stages.cold_start import cold_start

    whole = quickstart()
    made = cold_start(replace(whole, cold_start=replace(whole.cold_start, steps=120)), Console(stderr=True))
    shutil.copytree(made, "model")


if __name__ == "__main__":
    if sys.argv[1] == "model":
        make_policy()
    else:
        ThreadingHTTPServer.allow_reuse_address = True
        ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Judge).serve_forever()
