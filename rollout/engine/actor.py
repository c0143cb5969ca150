"""An engine in a Ray actor: a process of its own, whose requests share a batch."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch

from trimtab.rollout.engine.engine import Engine, EngineConfig
from trimtab.rollout.engine.weights import Array, Handle, Layout
from trimtab.rollout.types import Completion, Request


class EngineServer:
    """One Engine in one process. Requests join its batch as they arrive, and wait while it is closed: weights and sleep
    wait until it is idle and close it meanwhile.

    It reserves no core: engines that sample and engines that judge take turns on the cores there are.
    """

    def __init__(self, config: EngineConfig, asked: float):
        started = time.time()
        self._engine = self._make(config)
        self._engine.start_seconds["process"] = max(0.0, started - asked)  # two processes, one clock, which may jump
        self._answers: dict[str, asyncio.Future[list[Completion]]] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._loop: asyncio.Task[None] | None = None
        self._moved = time.monotonic()

    def _make(self, config: EngineConfig) -> Engine:
        return Engine(config)

    async def ready(self) -> dict[str, float]:
        """Return as soon as the engine can serve: the seconds of its start, by part."""
        return self._engine.start_seconds

    async def gpu(self) -> str | None:
        """The identity of this engine's GPU."""
        return gpu_identity()

    @ray.method(concurrency_group="pulse")
    async def pulse(self) -> float:
        """Seconds since the engine has last moved, if it has requests; answered beside a step, however long it is."""
        return time.monotonic() - self._moved if self._answers else 0.0

    async def generate(self, request: Request) -> list[Completion]:
        while not self._open.is_set():
            await self._open.wait()
        key = self._engine.add(request)
        if not self._answers:
            self._moved = time.monotonic()
        answer = self._answers[key] = asyncio.get_running_loop().create_future()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
        return await answer

    async def begin_update(self) -> None:
        await self._close()
        self._engine.wake("weights")
        self._engine.begin_update()

    async def receive_shared(self, layout: Layout, handle: Handle) -> None:
        with self._open_after_errors():
            self._engine.receive_shared(layout, handle)

    async def receive_stored(self, arrays: list[Array]) -> None:
        with self._open_after_errors():
            self._engine.receive_stored(arrays)

    async def finish_update(self, version: int) -> int:
        with self._open_after_errors():
            self._engine.finish_update(version)
        if not self._engine.asleep:
            self._open.set()
        return self._engine.weight_version()

    async def weight_version(self) -> int:
        return self._engine.weight_version()

    async def checksums(self) -> dict[str, float]:
        return self._engine.checksums()

    async def selection(self, token_ids: tuple[int, ...]) -> np.ndarray:
        await self._close()
        with self._open_after_errors():
            found = self._engine.selection(token_ids)
        self._open.set()
        return found

    async def sleep(self) -> None:
        await self._close()
        self._engine.sleep()

    async def wake(self) -> None:
        self._engine.wake("weights")
        self._engine.wake("kv_cache")
        self._open.set()

    async def close(self) -> None:
        self._engine.close()

    async def _close(self) -> None:
        """Let what is running end; what comes waits."""
        self._open.clear()
        if self._loop is not None:
            await self._loop

    @contextlib.contextmanager
    def _open_after_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._open.set()
            raise

    async def _serve(self) -> None:
        while self._engine.busy:
            try:
                finished = self._engine.step()
            except Exception as error:
                for answer in self._answers.values():
                    if not answer.done():
                        answer.set_exception(RuntimeError(f"the engine failed: {error!r}"))
                raise
            self._moved = time.monotonic()
            for key, completions in finished:
                if not (answer := self._answers.pop(key)).done():
                    answer.set_result(completions)
            await asyncio.sleep(0)


def as_actor(server: type) -> Any:
    """A kind of server as a Ray actor, with a thread of its own for the pulse."""
    options = {"num_cpus": 0, "max_concurrency": 8192, "scheduling_strategy": "SPREAD"}
    return ray.remote(**options, concurrency_groups={"pulse": 1})(server)


def gpu_identity() -> str | None:
    """The GPU that this process works on, the same name in every process; None without one."""
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
