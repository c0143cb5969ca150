"""Engines in Ray actors behind the interface of one; the logic of sampling is in Engine, which needs no cluster.

An engine that dies or hangs is replaced, and its requests are repeated, but not for ever: whatever was there at every
death is given up.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from trimtab.rewards import bounds
from trimtab.rollout.engine.actor import EngineServer, as_actor, gpu_identity
from trimtab.rollout.engine.engine import ENVIRONMENT, EngineConfig, check_device, weight_bytes
from trimtab.rollout.engine.order import Order
from trimtab.rollout.engine.weights import Named, shared_chunks, to_arrays
from trimtab.rollout.types import Completion, EngineFailure, Request, RequestLost

Source = Callable[[], Iterable[Named]]
"""The newest weights, tensor by tensor, under the names transformers gives them; each call begins anew."""

START_LIMIT_S = 300.0
SILENCE_LIMIT_S = 60.0
"""An actor whose process does not answer for so long is dead."""
PULSE_EVERY_S = 5.0
DEATHS = 3
"""A request that was there when so many engines died is given up."""
LONGEST_PAUSE_S = 30.0
"""Between two starts of engines that die at once."""
RECORDING_BYTES = 1 << 30
"""Shared memory for what engines recorded of a batch; beyond it Ray uses the disk."""


class EngineError(EngineFailure):
    """Engines do not start, or die again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is expected of engines."""

    requests: int = 2048
    """Requests that one engine has at the same time; others wait."""
    step_seconds: float = 600.0
    """An engine with requests that does not move for so long is replaced."""
    restarts: int = 8
    """Engines that are replaced in a row, without a request that was answered or given up, before the run ends."""


class Pool:
    """num_actors engines. One that dies or hangs is replaced, with the newest weights, and its requests are repeated.

    The engines start in the background; requests wait for them. Weights reach an engine on the caller's GPU through
    memory of that GPU, any other through shared memory of the host.

    Args:
        num_gpus_per_actor: where Ray puts the engines; their memory is what the config says.
        limits: when a request waits, and when an engine counts as dead.
        store_bytes: shared memory of the host for weights and recordings, used as it fills; None: room for the
            weights twice and for recordings.

    Raises:
        ValueError: fewer than one actor; graphs or sleep without a GPU.
    """

    _server: type[EngineServer] = EngineServer

    def __init__(
        self,
        config: EngineConfig,
        num_actors: int,
        num_gpus_per_actor: float = 0,
        *,
        limits: Limits = Limits(),
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
        self._limits = limits
        self._order: tuple[asyncio.AbstractEventLoop, Order] | None = None
        self._renewals: dict[int, asyncio.Task[None]] = {}
        self._pulses: dict[Any, asyncio.Task[float]] = {}
        self.restarts = 0
        self.given_up = 0
        """Requests that were there whenever engines died."""
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
            RequestLost: it was there whenever engines died.
            EngineError: engines die again and again.
        """
        deaths = 0
        while True:
            async with self._turns().turn(deaths) as waited:
                if waited:
                    most = f"rollout.requests_per_engine = {self._limits.requests}"
                    bounds.bit("requests_per_engine", f"engines have all the requests they may ({most}); others wait")
                home = self._home(request)
                while (renewal := self._renewals.get(home)) is not None:
                    await asyncio.shield(renewal)
                actor = self._actors[home]
                self._unfinished[home] += request.n
                try:
                    completions = await self._answer(actor, request)
                    self._restarts_in_a_row = 0
                    return completions
                except (RayActorError, RayTaskError, TimeoutError) as error:
                    if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
                        raise ValueError(str(error.cause)) from None
                    died = error
                finally:
                    self._unfinished[home] -= request.n
                deaths += 1
                self._turns().died()
                await self._replace(home, actor, died)
            if deaths == DEATHS:
                self.given_up += 1
                self._restarts_in_a_row = 0
                raise RequestLost(f"{request.name}: {deaths} engines died while they had it: {_cause(died)}")

    def _turns(self) -> Order:
        """The order of requests in the event loop that runs now."""
        loop = asyncio.get_running_loop()
        if self._order is None or self._order[0] is not loop:
            self._order = loop, Order(self._limits.requests * len(self._actors))
            self._renewals.clear()
            self._pulses.clear()
        return self._order[1]

    async def _answer(self, actor: Any, request: Request) -> list[Completion]:
        """The answer of an actor at work.

        Raises:
            TimeoutError: its process is silent, or its engine stands still.
        """
        answer = asyncio.ensure_future(_wait(actor.generate.remote(request)))
        try:
            while not answer.done():
                await asyncio.wait([answer], timeout=PULSE_EVERY_S)
                if answer.done():
                    break
                still = await self._pulse(actor)
                if still > self._limits.step_seconds:
                    late = f"rollout.step_seconds = {self._limits.step_seconds:g}"
                    bounds.bit("step_seconds", f"an engine did not move for longer than {late} and is replaced")
                    raise TimeoutError(f"no step in {still:.0f} s ({late})")
            return answer.result()
        finally:
            answer.cancel()

    async def _pulse(self, actor: Any) -> float:
        """An actor's pulse, which all who wait for the actor share.

        Raises:
            TimeoutError: it is silent.
            RayActorError: it is dead.
        """
        asked = self._pulses.get(actor)
        if asked is None:
            asked = self._pulses[actor] = asyncio.ensure_future(
                asyncio.wait_for(_wait(actor.pulse.remote()), SILENCE_LIMIT_S)
            )
            asked.add_done_callback(lambda _: self._pulses.pop(actor, None))
        try:
            return await asyncio.shield(asked)
        except TimeoutError:
            raise TimeoutError(f"no sign of life in {SILENCE_LIMIT_S:g} s") from None

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
            asyncio.run(self._renew(home, error))

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

    def selection(self, token_ids: tuple[int, ...]) -> list[np.ndarray]:
        """What the indexers of each engine select for a sequence (Engine.selection)."""
        return self._ask("selection", token_ids)

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
        """The answer of every engine to the same call; one that died or hangs is replaced and asked again.

        Raises:
            EngineError: one fails again and again.
        """
        calls = _Calls(list(self._actors))
        found = calls.ask(method, dict.fromkeys(range(len(self._actors)), arguments))
        while calls.failed:
            for home, error in calls.failed.items():
                asyncio.run(self._renew(home, error))
            again, calls = list(calls.failed), _Calls(list(self._actors))
            found |= calls.ask(method, dict.fromkeys(again, arguments))
        return [found[home] for home in range(len(self._actors))]

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
        actor = as_actor(self._server).options(num_gpus=self._num_gpus, runtime_env={"env_vars": environment})
        return actor.remote(self._config, time.time())

    def _home(self, request: Request) -> int:
        """The actor that has the request's group, else the one with the fewest unfinished continuations that lives."""
        living = [home for home in range(len(self._actors)) if home not in self._renewals]
        freest = min(living or range(len(self._actors)), key=self._unfinished.__getitem__)
        group, hash_sign, _ = request.name.partition("#")
        return self._homes.setdefault(group, freest) if hash_sign else freest

    async def _replace(self, home: int, dead: Any, error: BaseException) -> None:
        """Put a new engine in the place of a dead one; whoever finds it dead waits for the same start.

        Raises:
            EngineError: engines die again and again.
        """
        if self._actors[home] is not dead:
            return
        renewal = self._renewals.get(home)
        if renewal is None:
            renewal = self._renewals[home] = asyncio.ensure_future(self._renew(home, error))
            renewal.add_done_callback(lambda _: self._renewals.pop(home, None))
        await asyncio.shield(renewal)

    async def _renew(self, home: int, error: BaseException) -> None:
        """Start an engine with the newest weights in this place; nothing waits for it but those who need it."""
        while True:
            self.restarts += 1
            self._restarts_in_a_row += 1
            if self._restarts_in_a_row > self._limits.restarts:
                raise EngineError(
                    f"{self._restarts_in_a_row} engines in a row died without answering a request "
                    f"(rollout.max_restarts = {self._limits.restarts}); the last: {_cause(error)}"
                ) from error
            ray.kill(self._actors[home])
            await asyncio.sleep(min(0.1 * 2 ** (self._restarts_in_a_row - 1), LONGEST_PAUSE_S))
            actor = self._start()
            try:
                await asyncio.wait_for(_wait(actor.ready.remote()), START_LIMIT_S)
                failed = await asyncio.to_thread(self._deliver, [actor]) if self._newest is not None else {}
            except (RayActorError, RayTaskError, TimeoutError) as again:
                failed = {0: again}
            self._actors[home] = actor
            if not failed:
                return
            error = failed[0]


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


def gpu_share(engines: int) -> float:
    """The part of a GPU for each of so many engines, with as much left for a trainer; 0 where there is no GPU."""
    share = torch.cuda.device_count() / (engines + 1)
    return min(1.0, int(100 * share) / 100)


async def _wait(reference: Any) -> Any:
    """An answer of Ray's, as a coroutine."""
    return await reference


def _cause(error: BaseException) -> str:
    """The last line of an error, which in Ray's holds what happened."""
    return (str(error).strip() or repr(error)).splitlines()[-1]
