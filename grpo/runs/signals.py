"""Ctrl-C and SIGTERM: the first asks for a stop after the step, the second stops at once."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

TOGETHER = 0.5
"""Seconds within which signals are one: whoever stops a group of processes reaches some of them twice."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal ended what may end at any moment."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = exit_code(number)


def exit_code(number: int) -> int:
    """A shell's code for a process that a signal ended."""
    return 128 + number


class Stop:
    """Whether a stop was asked for."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._number: int | None = None
        self._at_once = True
        self._asked_at = 0.0

    def asked(self) -> bool:
        return self._number is not None

    @property
    def exit_code(self) -> int:
        return exit_code(self._number or signal.SIGINT)

    def listen(self) -> None:
        """Handle the signals. Ray takes SIGTERM for itself when it starts, so this is called again after that."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def now_if_asked(self) -> None:
        """Raises: Stopped: a signal came."""
        if self._number is not None:
            raise Stopped(self._number)

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Inside, the first signal waits for the step to end, as there is something to lose.

        Raises:
            Stopped: at the beginning, where a signal came just before.
        """
        self.now_if_asked()
        self._at_once = False
        try:
            yield
        finally:
            self._at_once = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, since = not self.asked(), time.monotonic() - self._asked_at
        if first:
            self._number, self._asked_at = number, time.monotonic()
        if self._at_once or not (first or since < TOGETHER):
            raise Stopped(number)
        if first:
            name = signal.Signals(number).name
            self._tell(f"{name}: stopping after this step; once more stops at once and loses it")


@contextmanager
def stop_on_signals(tell: Callable[[str], None]) -> Iterator[Stop]:
    """Listen while the context is open, in the main thread."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = Stop(tell)
    stop.listen()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def until_stopped(work: Callable[[Console, Stop], int], remedy: Callable[[], str]) -> int:
    """The exit code of work, or of the signal that ended it, which is said with the remedy."""
    console = Console()
    with stop_on_signals(console.print) as stop:
        try:
            return work(console, stop)
        except Stopped as stopped:
            console.print(f"stopped; {remedy()}")
            return stopped.exit_code
