"""Where the seconds of a rollout batch go. Imports no torch."""

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

PHASES = (
    "rollout",
    "rewards",
    "packing",
    "reference",
    "forward and backward",
    "optimiser",
    "weights",
    "wake and sleep",
    "saving",
)
"""`rollout` is the time in which at least one request of the policy's is under way in an engine; `rewards` what is left
of playing a batch: environments, rewards and judges that sampling did not hide."""


def metrics(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase under the names of metrics.jsonl, such as seconds/forward_and_backward."""
    return {f"seconds/{name.replace(' ', '_')}": value for name, value in seconds.items()}


P = ParamSpec("P")
T = TypeVar("T")


class Clock:
    """Seconds by phase. A second belongs to one phase only: the innermost, so that phases add up to at most the whole.

    Used from one thread.
    """

    def __init__(
        self, synchronise: Callable[[], None] | None = None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        """synchronise: waits for work that was launched, such as torch.cuda.synchronize; called where a phase gives way
        to another, so that the wait counts where the work was launched."""
        self._synchronise, self._now = synchronise, now
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._since = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time within counts to this phase, and not to the one around it, of which there may be one."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def while_awaited(self, name: str, call: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        """The same call; as long as at least one such call is awaited, time counts to the phase `name`."""
        under_way = 0

        async def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            nonlocal under_way
            if under_way == 0:
                self._enter(name)
            under_way += 1
            try:
                return await call(*args, **kwargs)
            finally:
                under_way -= 1
                if under_way == 0:
                    self._leave()

        return timed

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase since the last call of this function, or since the beginning."""
        if self._open:
            self._settle()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _enter(self, name: str) -> None:
        if name not in PHASES:
            raise ValueError(f"a phase is one of {', '.join(PHASES)}; got {name!r}")
        assert len(self._open) < 2, f"{name} within {' within '.join(reversed(self._open))}"
        if self._open:
            self._settle()
        self._since = self._now()
        self._open.append(name)

    def _leave(self) -> None:
        self._settle()
        self._open.pop()

    def _settle(self) -> None:
        """What passed since the last change belongs to the innermost phase."""
        if self._synchronise is not None:
            self._synchronise()
        now = self._now()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now
