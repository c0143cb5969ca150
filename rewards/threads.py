"""Threads for code that may never come back: each kind of code has its own, so one that hangs stops no other."""

import asyncio
import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class TimeLimit(TimeoutError):
    """A call ran longer than it may; a TimeoutError that it raised itself is none of this kind."""


@dataclass(slots=True)
class _Call:
    came_back: bool = False
    given_up: bool = False


class Threads:
    """Runs calls in daemon threads, at most `at_once` of them, from any event loop.

    A call that is given up, because its time is over or its caller is cancelled, goes on in its thread and keeps its
    place until it comes back: the process can end all the same.
    """

    def __init__(self, name: str, at_once: int):
        if at_once < 1:
            raise ValueError(f"{name}: at_once must be at least 1, got {at_once}")
        self._name, self._at_once = name, at_once
        self._lock = threading.Lock()
        self._free, self._hanging = at_once, 0
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    async def run(self, call: Callable[[], T], *, limit: float | None = None) -> T:
        """The result of call, in a thread of its own; its time begins when it does.

        Raises:
            TimeLimit: it ran longer than limit seconds.
            RuntimeError: it left with something that is no Exception (sys.exit), or every thread hangs.
            Exception: what it raised.
        """
        await self._enter()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[T | None, BaseException | None]] = loop.create_future()
        state, context = _Call(), contextvars.copy_context()

        def work() -> None:
            result, error = None, None
            try:
                result = context.run(call)
            except BaseException as raised:  # of other people's code
                error = raised
            self._return(state)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, answer, (result, error))

        threading.Thread(target=work, name=f"trimtab {self._name}", daemon=True).start()
        try:
            await asyncio.wait([answer], timeout=limit)
        finally:
            if not answer.done():
                self._give_up(state)
        if not answer.done():
            raise TimeLimit(f"no result within {limit:g} s")
        result, error = answer.result()
        if error is None:
            return result  # type: ignore[return-value]
        if not isinstance(error, Exception):
            raise RuntimeError(f"{self._name}: the call ended with {error!r}") from error
        raise error

    async def _enter(self) -> None:
        with self._lock:
            if self._hanging == self._at_once:
                raise self._all_hang()
            if self._free:
                self._free -= 1
                return
            loop = asyncio.get_running_loop()
            turn: asyncio.Future[None] = loop.create_future()
            self._waiting.append((loop, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came, and nobody takes it
                self._leave()
            raise

    def _leave(self) -> None:
        """Hand the place to who waits longest."""
        with self._lock:
            while self._waiting:
                loop, turn = self._waiting.popleft()
                try:
                    loop.call_soon_threadsafe(self._grant, turn)
                    return
                except RuntimeError:  # a loop that was closed while something waited in it
                    continue
            self._free += 1

    def _grant(self, turn: "asyncio.Future[None]") -> None:
        if turn.done():
            self._leave()
        else:
            turn.set_result(None)

    def _return(self, state: _Call) -> None:
        with self._lock:
            state.came_back = True
            self._hanging -= state.given_up
        self._leave()

    def _give_up(self, state: _Call) -> None:
        with self._lock:
            if state.came_back:
                return
            state.given_up = True
            self._hanging += 1
            if self._hanging < self._at_once:
                return
            waiting = list(self._waiting)
            self._waiting.clear()
        for loop, turn in waiting:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_fail, turn, self._all_hang())

    def _all_hang(self) -> RuntimeError:
        return RuntimeError(f"{self._name}: {self._at_once} calls hang, and no thread is left for another")


def _settle(answer: "asyncio.Future[Any]", value: Any) -> None:
    if not answer.done():
        answer.set_result(value)


def _fail(turn: "asyncio.Future[None]", error: Exception) -> None:
    if not turn.done():
        turn.set_exception(error)
