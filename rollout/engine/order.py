"""Which requests may run: as many as the engines take, and those that saw engines die a few at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

SUSPECTS = 8
"""Requests that run at the same time, right after a death, of those that were there when an engine died; one more for
each that is answered. Whatever was there at two deaths runs alone, so that the request that kills engines is told from
those beside it."""


class Order:
    """Lets requests in, in one event loop.

    Args:
        most: requests that run at the same time.
    """

    def __init__(self, most: int):
        self._most = most
        self._changed = asyncio.Condition()
        self._running = self._suspects = self._waiting_alone = 0
        self._allowed = SUSPECTS

    @asynccontextmanager
    async def turn(self, deaths: int) -> AsyncIterator[bool]:
        """Wait for a turn; gives whether there was no room at first.

        Args:
            deaths: engines that died while this request ran.
        """
        async with self._changed:
            waited = self._running >= self._most
            self._waiting_alone += deaths > 1
            try:
                await self._changed.wait_for(lambda: self._may_run(deaths))
            finally:
                self._waiting_alone -= deaths > 1
            self._running += 1
            self._suspects += bool(deaths)
        try:
            yield waited
            self._allowed += bool(deaths)
        finally:
            async with self._changed:
                self._running -= 1
                self._suspects -= bool(deaths)
                self._changed.notify_all()

    def died(self) -> None:
        """An engine did."""
        self._allowed = SUSPECTS

    def _may_run(self, deaths: int) -> bool:
        if deaths > 1:
            return not self._running
        if self._waiting_alone or self._running >= self._most:
            return False
        return not deaths or self._suspects < self._allowed
