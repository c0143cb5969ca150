"""Engines that die, hang, take long or meet a request that kills them, in real actors around a small engine."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray
from tiny import save_tiny_deepseek

from trimtab.rollout.engine import pool as pool_module
from trimtab.rollout.engine.actor import EngineServer
from trimtab.rollout.engine.engine import EngineConfig
from trimtab.rollout.engine.order import SUSPECTS, Order
from trimtab.rollout.engine.pool import EngineError, Limits, Pool
from trimtab.rollout.types import Completion, Request, RequestLost, Sampling


class SmallEngine:
    """Answers each request after ten steps; what a request's name asks for befalls the process."""

    def __init__(self) -> None:
        self.start_seconds = {"imports": 0.0}
        self.asleep = False
        self._left: dict[str, int] = {}
        self._version = 0

    @property
    def busy(self) -> bool:
        return bool(self._left)

    def add(self, request: Request) -> str:
        if request.name.startswith("refused"):
            raise ValueError(f"{request.name}: refused")
        self._left[request.name] = 10
        return request.name

    def step(self) -> list[tuple[str, list[Completion]]]:
        names = list(self._left)
        if any(name.startswith("poison") for name in names):
            os.kill(os.getpid(), signal.SIGKILL)
        if any(name.startswith("error") for name in names):
            raise RuntimeError("illegal memory access")
        if any(name.startswith("stands") for name in names):
            time.sleep(1000)
        if any(name.startswith("long") and self._left[name] == 10 for name in names):
            time.sleep(9)  # as a kernel does, it leaves the interpreter to others
        time.sleep(0.005)
        for name in names:
            self._left[name] -= 1
        done = [name for name in names if not self._left[name]]
        for name in done:
            del self._left[name]
        return [(name, [_completion(self._version)]) for name in done]

    def begin_update(self) -> None: ...

    def receive_stored(self, arrays: list) -> None: ...

    def finish_update(self, version: int) -> None:
        self._version = version

    def weight_version(self) -> int:
        return self._version

    def wake(self, what: str) -> None: ...

    def close(self) -> None: ...


def _completion(version: int) -> Completion:
    one = np.zeros(1, np.int32)
    return Completion(
        token_ids=one, logp=one.astype(np.float32), kept_ids=one, kept_offsets=np.arange(2),
        routes=np.zeros((0, 0, 0), np.uint8), weight_version=version, finish="stop",
    )  # fmt: skip


class SmallServer(EngineServer):
    def _make(self, config):
        if os.path.exists(f"{config.model}/broken"):
            os.kill(os.getpid(), signal.SIGKILL)
        return SmallEngine()


class SmallPool(Pool):
    _server = SmallServer


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EngineConfig:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_deepseek(path)
    return EngineConfig(model=str(path), max_model_len=64)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all pools, whose workers find this file."""
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *_paths()])}},
    )
    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    yield
    ray.shutdown()


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def request(name: str) -> Request:
    return Request(name=name, prompt_ids=(1, 2), sampling=Sampling(max_tokens=4))


def answers(pool: Pool, *names: str, limit: float = 120) -> list[object]:
    """What becomes of requests that are made together: "stop", or the error."""

    async def play() -> list[object]:
        made = asyncio.gather(*(pool.generate(request(name)) for name in names), return_exceptions=True)
        return await asyncio.wait_for(made, limit)

    return [one if isinstance(one, BaseException) else one[0].finish for one in asyncio.run(play())]


@pytest.fixture
def pool(config) -> Iterator[Pool]:
    pool = SmallPool(config, 1)
    pool.wait_until_ready()
    yield pool
    pool.close()


def test_a_request_that_kills_its_engine_is_given_up_and_those_beside_it_are_answered(pool):
    pool.load_weights(lambda: [], 5)
    innocent = [f"r{i}" for i in range(40)]
    found = answers(pool, *innocent, "poison")
    assert found[:-1] == ["stop"] * 40
    assert isinstance(found[-1], RequestLost) and "3 engines died while they had it" in str(found[-1])
    assert pool.restarts == 3 and pool.given_up == 1 and pool.versions() == [5]


def test_two_that_kill_are_both_found(pool):
    found = answers(pool, "r0", "poison0", "r1", "poison1", "r2")
    assert [isinstance(one, RequestLost) for one in found] == [False, True, False, True, False]
    assert found[::2] == ["stop"] * 3 and pool.restarts <= 6


def test_an_engine_that_raises_is_replaced_and_what_it_had_is_repeated(pool):
    found = answers(pool, "r0", "error", "r1")
    assert found[0] == found[2] == "stop" and isinstance(found[1], RequestLost)
    assert "illegal memory access" in str(found[1])


def test_what_an_engine_refuses_kills_nothing(pool):
    found = answers(pool, "refused", "r0")
    assert isinstance(found[0], ValueError) and found[1] == "stop" and pool.restarts == 0


def test_a_long_step_kills_no_healthy_engine(pool, monkeypatch):
    monkeypatch.setattr(pool_module, "PULSE_EVERY_S", 0.5)
    monkeypatch.setattr(pool_module, "SILENCE_LIMIT_S", 5.0)  # less than the step; the pulse is answered beside it
    assert answers(pool, "long", "r0", "r1") == ["stop"] * 3
    assert pool.restarts == 0


def test_thousands_of_requests_kill_no_healthy_engine(pool, monkeypatch):
    monkeypatch.setattr(pool_module, "PULSE_EVERY_S", 0.5)
    assert answers(pool, *(f"r{i}" for i in range(4500))) == ["stop"] * 4500
    assert pool.restarts == 0


def test_an_engine_that_stands_still_is_replaced(config, monkeypatch):
    monkeypatch.setattr(pool_module, "PULSE_EVERY_S", 0.5)
    pool = SmallPool(config, 1, limits=Limits(step_seconds=2.0))
    try:
        pool.wait_until_ready()
        found = answers(pool, "stands", "r0")
        assert isinstance(found[0], RequestLost) and "rollout.step_seconds = 2" in str(found[0])
        assert found[1] == "stop" and pool.restarts == 3
    finally:
        pool.close()


def test_while_one_engine_is_replaced_others_play_on_and_time_goes_on(config):
    pool = SmallPool(config, 2)

    async def play() -> tuple[int, list[str]]:
        beats = 0
        victim = asyncio.ensure_future(pool.generate(request("v#0")))
        await asyncio.sleep(0)
        ray.kill(pool._actors[0])
        others = []
        while not victim.done():
            beats += 1
            (completion,) = await pool.generate(request(f"o{beats}"))
            others.append(completion.finish)
            await asyncio.sleep(0.05)
        return beats, [(await victim)[0].finish, *others]

    try:
        pool.wait_until_ready()
        beats, finished = asyncio.run(asyncio.wait_for(play(), 120))
        assert beats > 3 and set(finished) == {"stop"} and pool.restarts == 1
    finally:
        pool.close()


def test_engines_that_die_at_their_start_end_the_run_after_so_many(config, tmp_path):
    save_tiny_deepseek(tmp_path)
    broken = EngineConfig(model=str(tmp_path), max_model_len=64)
    pool = SmallPool(broken, 1, limits=Limits(restarts=2))
    try:
        pool.wait_until_ready()
        (tmp_path / "broken").touch()
        ray.kill(pool._actors[0])
        (found,) = answers(pool, "r0")
        assert isinstance(found, EngineError) and "rollout.max_restarts = 2" in str(found)
        assert pool.restarts == 3
    finally:
        pool.close()


def test_an_engine_that_died_while_it_was_idle_is_replaced_at_the_next_call(pool):
    pool.load_weights(lambda: [], 3)
    ray.kill(pool._actors[0])
    time.sleep(0.2)
    assert pool.versions() == [3] and pool.restarts == 1
    assert answers(pool, "r0") == ["stop"]


# ---- the order of requests


def test_suspects_run_a_few_at_a_time_and_twice_suspect_alone():
    async def run() -> tuple[int, int, int]:
        order, inside, seen = Order(1000), {0: 0, 1: 0, 2: 0}, {0: 0, 1: 0, 2: 0}

        async def one(deaths: int, i: int) -> None:
            async with order.turn(deaths):
                inside[deaths] += 1
                seen[deaths] = max(seen[deaths], sum(inside.values()) if deaths == 2 else inside[deaths])
                await asyncio.sleep(0.001)
                if i % 2:
                    order.died()
                inside[deaths] -= 1

        await asyncio.gather(*(one(i % 3, i) for i in range(90)))
        return seen[0], seen[1], seen[2]

    fresh, suspects, alone = asyncio.run(run())
    assert fresh > SUSPECTS and suspects <= 2 * SUSPECTS and alone == 1


def test_no_more_requests_run_than_engines_may_have():
    async def run() -> list[bool]:
        order, waited = Order(4), []

        async def one() -> None:
            async with order.turn(0) as late:
                waited.append(late)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(one() for _ in range(12)))
        return waited

    assert sum(asyncio.run(run())) == 8
