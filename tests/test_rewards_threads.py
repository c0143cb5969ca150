"""Threads for code that may hang, and the counts of bounds."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from trimtab.rewards import bounds
from trimtab.rewards.threads import Threads


def test_waiting_for_a_thread_is_not_counted_as_time_of_the_call() -> None:
    threads = Threads("tools", 4)

    async def all_of_them() -> list[None]:
        return await asyncio.gather(*(threads.run(lambda: time.sleep(0.2), limit=0.6) for _ in range(20)))

    assert asyncio.run(all_of_them()) == [None] * 20  # a second in all: five rounds of 0.2 s


def test_a_call_that_hangs_is_given_up_and_its_place_comes_back_with_it() -> None:
    threads, gate = Threads("tools", 1), threading.Event()

    async def play() -> str:
        with pytest.raises(TimeoutError, match=r"no result within 0\.05 s"):
            await threads.run(gate.wait, limit=0.05)
        with pytest.raises(RuntimeError, match="tools: 1 calls hang"):
            await threads.run(lambda: "never", limit=1)
        gate.set()
        while True:
            try:
                return await threads.run(lambda: "served", limit=1)
            except RuntimeError:
                await asyncio.sleep(0.01)

    assert asyncio.run(play()) == "served"


def test_who_waits_is_told_when_the_last_thread_hangs() -> None:
    threads, gate = Threads("tools", 1), threading.Event()

    async def play() -> list[object]:
        return await asyncio.gather(
            threads.run(gate.wait, limit=0.1), threads.run(lambda: 1, limit=0.1), return_exceptions=True
        )

    first, second = asyncio.run(play())
    gate.set()
    assert isinstance(first, TimeoutError)
    assert isinstance(second, RuntimeError)


def test_a_cancelled_caller_leaves_no_place_taken() -> None:
    threads, gate = Threads("tools", 1), threading.Event()

    async def play() -> int:
        running = asyncio.create_task(threads.run(gate.wait))
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(threads.run(lambda: 1))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        gate.set()
        await running
        return await threads.run(lambda: 2, limit=1)

    assert asyncio.run(play()) == 2


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()])
def test_what_is_no_exception_becomes_one(error: BaseException) -> None:
    def call() -> None:
        raise error

    with pytest.raises(RuntimeError, match="tools: the call ended with"):
        asyncio.run(Threads("tools", 1).run(call))


@pytest.mark.parametrize("error", [TimeoutError("of its own"), StopIteration(), KeyError("x")])
def test_what_a_call_raises_is_raised(error: Exception) -> None:
    def call() -> None:
        raise error

    async def play() -> Exception:
        try:
            await Threads("tools", 1).run(call, limit=1)
        except RuntimeError as raised:  # a coroutine turns StopIteration into RuntimeError
            return raised.__cause__ or raised  # type: ignore[return-value]
        except Exception as raised:
            return raised
        raise AssertionError("nothing was raised")

    assert asyncio.run(play()) is error


def test_the_process_ends_while_calls_hang() -> None:
    code = (
        "import asyncio, threading\n"
        "from trimtab.rewards.threads import Threads\n"
        "async def main():\n"
        "    try:\n"
        "        await Threads('tools', 2).run(threading.Event().wait, limit=0.1)\n"
        "    except TimeoutError:\n"
        "        print('given up')\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (0, "given up\n")


def test_a_bound_is_counted_each_time_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    before = bounds.counts().get("test_bound", 0)
    bounds.bit("test_bound", "the bound is 3")
    bounds.bit("test_bound", "the bound is 3")
    assert bounds.counts()["test_bound"] == before + 2
    assert capsys.readouterr().err.count("trimtab: the bound is 3") == 1
