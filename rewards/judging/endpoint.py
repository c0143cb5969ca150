"""A judge behind an OpenAI-compatible endpoint: OpenAI's own, a vLLM server, or any other that speaks its protocol."""

import asyncio
import os
import sys
import time
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import openai

from trimtab.rewards import bounds
from trimtab.rewards.judging.model import Reply

RETRY_TEMPERATURE = 0.7
"""A malformed reply is asked for again at least this warm: at 0 it would come back the same."""

DOWN = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError, TimeoutError)
"""Nobody there, no answer in time, too many requests, or an error of the server's own: it may pass. A request that is
refused for itself (its key, its model, its form) is none of these."""
LONGEST_PAUSE = 8.0
"""Seconds between two tries, as the client doubles them."""


class Endpoint:
    """Chat completions of one model. Failed requests are repeated with growing pauses, as the endpoint asks.

    Args:
        base_url: such as http://localhost:8000/v1; None is the client's default, which OPENAI_BASE_URL changes.
        key_variable: the environment variable that holds the key; unset, a placeholder is sent, which servers of one's
            own accept.
        temperature: None leaves it to the endpoint, for models that take no other.
        max_tokens: of a reply, hidden reasoning included.
        seconds: of one request, as the time without a byte; all tries and pauses together end after what they may take.
        retries: of a request that was refused for load, broke or took too long.
        patience: seconds for which an endpoint that is down, as DOWN says after all retries, is waited for; those who
            ask meanwhile wait too. When it is over, each request fails after its own retries, until one is answered.
        at_once: requests under way.

    Raises:
        ValueError: an impossible number.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        key_variable: str = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_tokens: int = 2048,
        seconds: float = 60.0,
        retries: int = 3,
        patience: float = 0.0,
        at_once: int = 32,
    ) -> None:
        for name, number in (("max_tokens", max_tokens), ("seconds", seconds), ("at_once", at_once)):
            if not number > 0:
                raise ValueError(f"{name} must be above 0, got {number}")
        for name, number in (("retries", retries), ("patience", patience)):
            if not number >= 0:
                raise ValueError(f"{name} must be 0 or more, got {number}")
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=os.environ.get(key_variable) or "none",
            timeout=seconds,
            max_retries=retries,
            default_headers={"Connection": "close"},  # a connection that is kept belongs to one event loop
        )
        self._options: dict[str, Any] = {"model": model, "max_completion_tokens": max_tokens}
        if temperature is not None:
            self._options["temperature"] = temperature
        self.identity = f"{self._client.base_url} {self._options}"
        self._limit = seconds + retries * (seconds + LONGEST_PAUSE)
        self._patience = patience
        self._down_since: float | None = None
        self._at_once = at_once
        self._rooms: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def __call__(self, prompt: str, schema: Mapping[str, Any] | None, attempt: int) -> Reply:
        """One reply; see judge_model.Complete.

        Raises:
            ValueError: the reply is empty, cut off or a refusal.
            openai.OpenAIError: the endpoint refuses the request, or fails whenever it is tried.
            TimeoutError: all tries together took too long.
        """
        room = self._rooms.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._at_once))
        async with room:
            raw = await self._answered(prompt, schema, attempt)
        completion = raw.parse()
        choice = completion.choices[0]
        if choice.finish_reason != "stop" or not choice.message.content:
            raise ValueError(f"the reply ended with {choice.finish_reason}: {choice.message.content!r}")
        usage = completion.usage
        return Reply(
            text=choice.message.content,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            retries=raw.retries_taken,
        )

    async def _answered(self, prompt: str, schema: Mapping[str, Any] | None, attempt: int) -> Any:
        """The endpoint's answer, which is waited for while it is down."""
        while True:
            try:
                async with asyncio.timeout(self._limit):
                    raw = await self._client.chat.completions.with_raw_response.create(
                        messages=[{"role": "user", "content": prompt}], **self._request(schema, attempt)
                    )
            except DOWN as error:
                now = time.monotonic()
                self._down_since = now if self._down_since is None else self._down_since
                if now - self._down_since >= self._patience:
                    raise
                told = f"the judge at {self._client.base_url} is down ({error or type(error).__name__})"
                bounds.bit("judge_patience", f"{told}: it is waited for, at most {self._patience:g} s")
                await asyncio.sleep(min(LONGEST_PAUSE, self._patience / 10))
                continue
            if self._down_since is not None:
                down, self._down_since = time.monotonic() - self._down_since, None
                print(f"trimtab: the judge answers again, after {down:.0f} s", file=sys.stderr)
            return raw

    def _request(self, schema: Mapping[str, Any] | None, attempt: int) -> dict[str, Any]:
        request = dict(self._options)
        if attempt:
            request["seed"] = attempt
            if "temperature" in request:
                request["temperature"] = max(request["temperature"], RETRY_TEMPERATURE)
        if schema is not None:
            form = {"name": "verdict", "schema": schema, "strict": True}
            request["response_format"] = {"type": "json_schema", "json_schema": form}
        return request
