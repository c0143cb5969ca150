"""Engines in Ray actors behind the interface of one. The logic of sampling is in Engine, which needs no cluster."""

import asyncio
import contextlib
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from trimtab.rollout.engine.engine import ENVIRONMENT, Engine, EngineConfig
from trimtab.rollout.types import Completion, Request

START_LIMIT_S = 300.0
SILENCE_LIMIT_S = 60.0
RESTARTS_IN_A_ROW = 3


@ray.remote(num_cpus=0, max_concurrency=4096, scheduling_strategy="SPREAD")
class EngineActor:
    """One Engine in one process. Requests join its batch as they arrive; weights wait until it is idle.

    It reserves no core: engines that sample and engines that judge take turns on the cores there are.
    """

    def __init__(self, config: EngineConfig):
        self._engine = Engine(config)
        self._answers: dict[str, asyncio.Future[list[Completion]]] = {}
        self._gate = asyncio.Lock()
        self._loop: asyncio.Task[None] | None = None
        self._steps = 0

    async def ready(self) -> None:
        """Return as soon as the engine can serve."""

    async def steps(self) -> int:
        """Steps so far: an engine at work whose count stands still hangs."""
        return self._steps

    async def generate(self, request: Request) -> list[Completion]:
        async with self._gate:
            key = self._engine.add(request)
            answer = self._answers[key] = asyncio.get_running_loop().create_future()
            if self._loop is None or self._loop.done():
                self._loop = asyncio.create_task(self._serve())
        return await answer

    async def load_weights(self, weights: Any, version: int) -> None:
        async with self._gate:
            if self._loop is not None:
                await self._loop
            self._engine.load_weights(weights, version)

    async def close(self) -> None:
        self._engine.close()

    async def _serve(self) -> None:
        while self._engine.busy:
            try:
                finished = self._engine.step()
            except Exception as error:
                for answer in self._answers.values():
                    answer.set_exception(RuntimeError(f"the engine failed: {error!r}"))
                raise
            self._steps += 1
            for key, completions in finished:
                self._answers.pop(key).set_result(completions)
            await asyncio.sleep(0)


class EngineError(RuntimeError):
    """Engines do not start, or die again and again."""


class Pool:
    """num_actors engines. One that dies or hangs is replaced, with the newest weights, and its requests are repeated.

    The engines start in the background; requests wait for them.

    Raises:
        ValueError: fewer than one actor.
    """

    def __init__(self, config: EngineConfig, num_actors: int, num_gpus_per_actor: float = 0):
        if num_actors < 1:
            raise ValueError(f"num_actors must be at least 1, got {num_actors}")
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=256 << 20,
            )
        self.restarts = 0
        self._restarts_in_a_row = 0
        self._config, self._num_gpus = config, num_gpus_per_actor
        self._weights: tuple[Any, int] | None = None
        self._unfinished = [0] * num_actors
        self._homes: dict[str, int] = {}
        self._actors = [self._start() for _ in range(num_actors)]

    def wait_until_ready(self) -> None:
        """Return when every engine can serve.

        Raises:
            EngineError: one did not start; all are closed.
        """
        try:
            ray.get([actor.ready.remote() for actor in self._actors], timeout=START_LIMIT_S)
        except Exception as error:
            self.close()
            raise EngineError(f"the engines did not start: {_cause(error)}") from error

    async def generate(self, request: Request) -> list[Completion]:
        """Sample request.n continuations.

        Raises:
            ValueError: the engine refuses the request.
            EngineError: engines died several times in a row without finishing anything.
        """
        while True:
            home = self._home(request)
            actor = self._actors[home]
            self._unfinished[home] += request.n
            try:
                completions = await _answer(actor, actor.generate.remote(request))
                self._restarts_in_a_row = 0
                return completions
            except (RayActorError, RayTaskError, TimeoutError) as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
                    raise ValueError(str(error.cause)) from None
                self._replace(home, actor, error)
            finally:
                self._unfinished[home] -= request.n

    def load_weights(self, weights: Any, version: int) -> None:
        """Load weights everywhere, once each engine has finished what it has; later requests see the new ones.

        Args:
            weights: CPU tensors by the names transformers gives them.

        Raises:
            ValueError: a name or a shape does not fit the policy.
        """
        self._weights = (ray.put(weights), version)
        self._homes.clear()
        actors = list(self._actors)
        loads = [actor.load_weights.remote(*self._weights) for actor in actors]
        for home, (actor, load) in enumerate(zip(actors, loads, strict=True)):
            try:
                ray.get(load, timeout=START_LIMIT_S)
            except (RayActorError, RayTaskError, GetTimeoutError) as error:
                if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
                    raise ValueError(f"weights of version {version} do not load: {error.cause}") from None
                self._replace(home, actor, error)

    def close(self) -> None:
        """End every engine, and Ray where this pool started it; may be called again."""
        actors, self._actors = self._actors, []
        if not actors:
            return
        with contextlib.suppress(Exception):  # an engine that is dead or hangs is killed below
            ray.get([actor.close.remote() for actor in actors], timeout=10)
        for actor in actors:
            ray.kill(actor)
        if self._owns_ray:
            ray.shutdown()

    def _start(self) -> Any:
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        actor: Any = EngineActor
        return actor.options(num_gpus=self._num_gpus, runtime_env={"env_vars": environment}).remote(self._config)

    def _home(self, request: Request) -> int:
        """The actor that has the request's group, else the one with the fewest unfinished continuations."""
        freest = self._unfinished.index(min(self._unfinished))
        group, hash_sign, _ = request.name.partition("#")
        return self._homes.setdefault(group, freest) if hash_sign else freest

    def _replace(self, home: int, dead: Any, error: BaseException) -> None:
        """Start a new actor in the place of a dead one, unless another request has seen to it."""
        if self._actors[home] is not dead:
            return
        self.restarts += 1
        self._restarts_in_a_row += 1
        if self._restarts_in_a_row > RESTARTS_IN_A_ROW:
            raise EngineError(
                f"engines died {self._restarts_in_a_row} times without finishing a request; the last: {_cause(error)}"
            )
        ray.kill(dead)
        actor = self._actors[home] = self._start()
        try:
            ray.get(actor.ready.remote(), timeout=START_LIMIT_S)
            if self._weights is not None:
                ray.get(actor.load_weights.remote(*self._weights), timeout=START_LIMIT_S)
        except (RayActorError, RayTaskError, GetTimeoutError) as again:
            self._replace(home, actor, again)


def gpu_share(engines: int) -> float:
    """The part of a GPU for each of so many engines, with as much left for a trainer; 0 where there is no GPU."""
    share = torch.cuda.device_count() / (engines + 1)
    return min(1.0, int(100 * share) / 100)


async def _answer(actor: Any, reference: Any) -> Any:
    """The answer of an actor at work.

    Raises:
        TimeoutError: the actor is silent, or its engine stands still.
    """

    async def wait(awaited: Any) -> Any:
        return await awaited

    answer = asyncio.ensure_future(wait(reference))
    seen = -1
    while not answer.done():
        await asyncio.wait([answer], timeout=SILENCE_LIMIT_S)
        if not answer.done():
            steps = await asyncio.wait_for(wait(actor.steps.remote()), SILENCE_LIMIT_S)
            if steps == seen:
                raise TimeoutError(f"the engine made no step in {SILENCE_LIMIT_S:.0f} seconds")
            seen = steps
    return answer.result()


def _cause(error: BaseException) -> str:
    """The last line of an error, which in Ray's holds what happened."""
    return (str(error).strip() or repr(error)).splitlines()[-1]
