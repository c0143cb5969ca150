"""A model that judges: it is asked until its reply can be read, and what it said is remembered."""

import asyncio
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from trimtab.rewards.judging.rubric import Judge, JudgeError, parse_verdict

T = TypeVar("T")

BUSY_SECONDS = 30.0
"""A cache that another process writes to is waited for so long."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said, and what it cost; retries are the requests before this one that failed."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0


class Complete(Protocol):
    """One request to a model: an endpoint (endpoint.Endpoint) or engines of our own (rollout.judge.EngineModel)."""

    identity: str
    """What besides the prompt decides the reply: the model and how it samples. Part of the cache's key."""

    async def __call__(self, prompt: str, schema: Mapping[str, Any] | None, attempt: int) -> Reply:
        """The reply to a prompt, as JSON of the schema where the model can be held to it.

        attempt counts from 0; from 1 on it should sample anew. Retries over a network are its own affair.

        Raises:
            ValueError: the reply is unfit, and another attempt may be better.
            Exception: the model cannot be reached.
        """


@dataclass(slots=True)
class Usage:
    """What a judge did so far."""

    calls: int = 0
    """Requests that were answered, fit or not."""
    retries: int = 0
    """Requests that failed on the way, and replies that could not be read."""
    failures: int = 0
    """Questions without a verdict."""
    cache_hits: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds_waited: float = 0.0
    """For replies, summed over questions, which run side by side."""

    def as_dict(self) -> dict[str, float]:
        """The counters by name."""
        return asdict(self)


class VerdictCache:
    """Replies by content, in a file that several processes may share, or in memory alone.

    Raises:
        ValueError: the file cannot be opened, or is something else.
    """

    def __init__(self, path: Path | str = ":memory:") -> None:
        try:
            self._database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise ValueError(f"{path} cannot be used as a cache of verdicts: {error}") from error

    def get(self, key: str) -> str | None:
        """The reply remembered under a key."""
        row = self._database.execute("SELECT text FROM replies WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def put(self, key: str, text: str) -> None:
        """Remember a reply."""
        self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        self._database.close()


class JudgeModel:
    """A model, how often it is asked for a reply that can be read, and its memory.

    Equal questions are asked once, also while the first is under way: the answers of a group are often the same.

    Raises:
        ValueError: attempts is below 1.
    """

    def __init__(self, complete: Complete, *, attempts: int = 3, cache: VerdictCache | None = None) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        self.usage = Usage()
        self._complete = complete
        self._attempts = attempts
        self._cache = cache or VerdictCache()
        self._asking: dict[str, asyncio.Future[str]] = {}

    async def ask(self, prompt: str, parse: Callable[[str], T], *, schema: Mapping[str, Any] | None = None) -> T:
        """What parse makes of the model's reply; parse raises ValueError for one that is malformed.

        Raises:
            JudgeError: the model cannot be reached, or no attempt gave a reply that can be read.
        """
        question = json.dumps([self._complete.identity, prompt, schema], sort_keys=True)
        key = hashlib.sha256(question.encode()).hexdigest()
        asked = self._asking.get(key)
        if asked is None:
            asked = self._asking[key] = asyncio.ensure_future(self._answer(key, prompt, parse, schema))
            asked.add_done_callback(lambda _: self._asking.pop(key, None))
        else:
            self.usage.cache_hits += 1
        return parse(await asyncio.shield(asked))  # whoever gives up waiting does not take the reply from the others

    async def _answer(
        self, key: str, prompt: str, parse: Callable[[str], object], schema: Mapping[str, Any] | None
    ) -> str:
        """A reply that can be read, remembered or new."""
        try:
            if (known := self._cache.get(key)) is not None:
                self.usage.cache_hits += 1
                return known
            text = await self._fresh(prompt, parse, schema)
            self._cache.put(key, text)
            return text
        except Exception as error:  # a model behind a network: whatever breaks, there is no verdict
            self.usage.failures += 1
            raise JudgeError(f"no verdict: {str(error) or repr(error)}") from error

    async def _fresh(self, prompt: str, parse: Callable[[str], object], schema: Mapping[str, Any] | None) -> str:
        started = time.monotonic()
        try:
            for attempt in range(self._attempts):
                try:
                    reply = await self._complete(prompt, schema, attempt)
                    self._count(reply)
                    parse(reply.text)
                    return reply.text
                except ValueError as error:
                    unfit = error
                self.usage.retries += attempt + 1 < self._attempts
            raise ValueError(f"{self._attempts} replies could not be read, the last because: {unfit}")
        finally:
            self.usage.seconds_waited += time.monotonic() - started

    def _count(self, reply: Reply) -> None:
        self.usage.calls += 1
        self.usage.retries += reply.retries
        self.usage.prompt_tokens += reply.prompt_tokens
        self.usage.completion_tokens += reply.completion_tokens


def yes_no(model: JudgeModel) -> Judge:
    """The model as a judge of single criteria, as rubric.rubric_score asks it."""

    async def judge(prompt: str) -> str:
        return "yes" if await model.ask(prompt, parse_verdict) else "no"

    return judge
