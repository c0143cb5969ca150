"""Engines in Ray actors behind the interface of one. The logic of sampling is in Engine, which needs no cluster."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from trimtab.rollout.engine.engine import ENVIRONMENT, Engine, EngineConfig, check_device, weight_bytes
from trimtab.rollout.engine.weights import Array, Handle, Layout, Named, shared_chunks, to_arrays
from trimtab.rollout.types import Completion, Request

Source = Callable[[], Iterable[Named]]
"""The newest weights, tensor by tensor, under the names transformers gives them; each call begins anew."""

START_LIMIT_S = 300.0
SILENCE_LIMIT_S = 60.0
RESTARTS_IN_A_ROW = 3
RECORDING_BYTES = 1 << 30
"""Shared memory for what engines recorded of a batch; beyond it Ray uses the disk."""


@ray.remote(num_cpus=0, max_concurrency=4096, scheduling_strategy="SPREAD")
class EngineActor:
    """One Engine in one process. Requests join its batch as they arrive, and wait while it is closed: weights and sleep
    wait until it is idle and close it meanwhile.

    It reserves no core: engines that sample and engines that judge take turns on the cores there are.
    """

    def __init__(self, config: EngineConfig, asked: float):
        started = time.time()
        self._engine = Engine(config)
        self._engine.start_seconds["process"] = started - asked
        self._answers: dict[str, asyncio.Future[list[Completion]]] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._loop: asyncio.Task[None] | None = None
        self._steps = 0

    async def ready(self) -> dict[str, float]:
        """Return as soon as the engine can serve: the seconds of its start, by part."""
        return self._engine.start_seconds

    async def gpu(self) -> str | None:
        """The identity of this engine's GPU."""
        return gpu_identity()

    async def steps(self) -> int:
        """Steps so far: an engine at work whose count stands still hangs."""
        return self._steps

    async def generate(self, request: Request) -> list[Completion]:
        while not self._open.is_set():
            await self._open.wait()
        key = self._engine.add(request)
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

    The engines start in the background; requests wait for them. Weights reach an engine on the caller's GPU through
    memory of that GPU, any other through shared memory of the host.

    Args:
        num_gpus_per_actor: where Ray puts the engines; their memory is what the config says.
        store_bytes: shared memory of the host for weights and recordings, used as it fills; None: room for the
            weights twice and for recordings.

    Raises:
        ValueError: fewer than one actor; graphs or sleep without a GPU.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_actors: int,
        num_gpus_per_actor: float = 0,
        *,
        store_bytes: int | None = None,
    ):
        if num_actors < 1:
            raise ValueError(f"num_actors must be at least 1, got {num_actors}")
        check_device(config, on_gpu=num_gpus_per_actor > 0)
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            recordings = RECORDING_BYTES if num_gpus_per_actor else RECORDING_BYTES // 4
            ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=store_bytes or recordings + 2 * weight_bytes(config),
            )
        self.restarts = 0
        self.start_seconds: list[dict[str, float]] = []
        """Where the time of each engine's start went, once they are ready."""
        self.update_seconds: dict[str, float] = {}
        """What the engines took for the parts of the last update; the rest of it was the source's and the copies'."""
        self._restarts_in_a_row = 0
        self._config, self._num_gpus = config, num_gpus_per_actor
        self._newest: tuple[Source, int] | None = None
        self._stored: Any = None
        self._unfinished = [0] * num_actors
        self._homes: dict[str, int] = {}
        self._actors = [self._start() for _ in range(num_actors)]

    def wait_until_ready(self) -> None:
        """Return when every engine can serve.

        Raises:
            EngineError: one did not start; all are closed.
        """
        try:
            self.start_seconds = ray.get([actor.ready.remote() for actor in self._actors], timeout=START_LIMIT_S)
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

    def load_weights(self, source: Source, version: int) -> None:
        """Load weights everywhere, once each engine has finished what it has; later requests see the new ones.

        An engine that sleeps wakes for them, but for its cache: call wake when there is room for it.

        Args:
            source: called now, and again whenever an engine is replaced: it gives the weights of this version until
                the next call of load_weights.

        Raises:
            ValueError: a name or a shape does not fit the policy.
            EngineError: an engine does not have the version afterwards.
        """
        self._newest, self._stored = (source, version), None
        self._homes.clear()
        actors = list(self._actors)
        for home, error in self._deliver(actors).items():
            self._replace(home, actors[home], error)

    def _deliver(self, actors: list[Any]) -> dict[int, BaseException]:
        """Bring the newest weights to these actors: which of them failed, and how."""
        assert self._newest is not None
        source, version = self._newest
        calls = _Calls(actors)
        self.update_seconds = calls.seconds
        calls.ask("begin_update")
        here = gpu_identity()
        places = {} if here is None else calls.ask("gpu")
        shared = [i for i, place in places.items() if place == here]
        if shared:
            for layout, handles in shared_chunks(source(), len(shared)):
                calls.ask("receive_shared", {i: (layout, handle) for i, handle in zip(shared, handles, strict=True)})
        stored = [i for i in range(len(actors)) if i not in shared]
        if stored:
            if self._stored is None:
                self._stored = ray.put(to_arrays(source()))
            calls.ask("receive_stored", {i: (self._stored,) for i in stored})
        reached = calls.ask("finish_update", dict.fromkeys(range(len(actors)), (version,)))
        if wrong := {i: got for i, got in reached.items() if got != version}:
            raise EngineError(f"after an update to version {version}, engines hold {wrong}")
        if shared:
            torch.cuda.ipc_collect()  # the readers are done with the memory
        for error in calls.failed.values():
            if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
                raise ValueError(f"weights of version {version} do not load: {error.cause}") from None
        return calls.failed

    def versions(self) -> list[int]:
        """The version of the weights that each engine holds, as it says itself."""
        return self._ask("weight_version")

    def probe(self, request: Request) -> list[Completion]:
        """One continuation by each engine, to compare with the trainer's own log-probabilities."""
        one = replace(request, n=1)
        return [completion for (completion,) in self._ask("generate", one)]

    def checksums(self) -> list[dict[str, float]]:
        """For each engine, the sum of its weights by tensor group; weights.checksums gives those of the trainer."""
        return self._ask("checksums")

    def sleep(self) -> None:
        """Give the engines' GPU memory back once they are idle; requests that come wait.

        Does nothing where the engines were made to stay awake (EngineConfig.sleep).
        """
        if self._config.sleep:
            self._ask("sleep")

    def wake(self) -> None:
        """Take the GPU memory again, for weights and cache, and serve what has come meanwhile."""
        if self._config.sleep:
            self._ask("wake")

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """The answer of every engine to the same call.

        Raises:
            EngineError: one died, failed or hangs.
        """
        try:
            asked = [getattr(actor, method).remote(*arguments) for actor in self._actors]
            return ray.get(asked, timeout=START_LIMIT_S)
        except (RayActorError, RayTaskError, GetTimeoutError) as error:
            raise EngineError(f"an engine failed at {method}: {_cause(error)}") from error

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
        return actor.options(num_gpus=self._num_gpus, runtime_env={"env_vars": environment}).remote(
            self._config, time.time()
        )

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
            failed = self._deliver([actor]) if self._newest is not None else {}
        except (RayActorError, RayTaskError, GetTimeoutError) as again:
            failed = {0: again}
        if failed:
            self._replace(home, actor, failed[0])


class _Calls:
    """The same call to several actors at once; one that fails is left out of the next calls."""

    def __init__(self, actors: list[Any]):
        self._actors = actors
        self.failed: dict[int, BaseException] = {}
        self.seconds: dict[str, float] = {}

    def ask(self, method: str, arguments: dict[int, tuple[Any, ...]] | None = None) -> dict[int, Any]:
        """The answers of those that have not failed, by their places."""
        started = time.perf_counter()
        whom = arguments if arguments is not None else dict.fromkeys(range(len(self._actors)), ())
        asked = {
            i: getattr(self._actors[i], method).remote(*given) for i, given in whom.items() if i not in self.failed
        }
        answers = {}
        for i, reference in asked.items():
            try:
                answers[i] = ray.get(reference, timeout=START_LIMIT_S)
            except (RayActorError, RayTaskError, GetTimeoutError) as error:
                self.failed[i] = error
        self.seconds[method] = self.seconds.get(method, 0.0) + time.perf_counter() - started
        return answers


def gpu_identity() -> str | None:
    """The GPU that this process works on, the same name in every process; None without one."""
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


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
