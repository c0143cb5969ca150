"""Other people's code, so that what goes wrong in it belongs to one episode."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
GRACE_SECONDS = 5.0
"""What is cancelled may clean up for so long; then it is left to itself."""


async def guarded(call: Coroutine[Any, Any, T]) -> T:
    """What call returns. It runs in a task of its own, which is cancelled with this one, whether it likes it or not.

    Raises:
        Exception: what it raised. A SystemExit, or a CancelledError that nobody asked for (clients of MCP and anyio
            leak them), comes as RuntimeError.
    """
    task = asyncio.ensure_future(_settled(call))
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait([task], timeout=GRACE_SECONDS)
        raise
    if task.cancelled():
        raise RuntimeError("it was cancelled from within")
    result, error = task.result()
    if error is None:
        return result  # type: ignore[return-value]
    if isinstance(error, Exception):
        raise error
    raise RuntimeError(f"it ended with {error!r}") from error


async def _settled(call: Coroutine[Any, Any, T]) -> tuple[T | None, BaseException | None]:
    """A task that raises SystemExit would end the loop."""
    try:
        return await call, None
    except (Exception, SystemExit) as error:
        return None, error
