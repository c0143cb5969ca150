"""Environments of the verifiers library (0.1) played by our policy. Needs verifiers.

adapters.datasets.verifiers_task opens one.

A verifiers environment drives its model; ours are driven by the policy. Its rollout therefore runs as a task of its own
with a client that calls no model: what the environment asks goes out as replies, the policy's next message goes in.
"""

import asyncio
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import verifiers as vf
from verifiers.types import Response, ResponseMessage
from verifiers.types import ToolCall as NativeCall

from trimtab.environments.base import Message, Step, ToolCall, VoidEpisode
from trimtab.environments.split import is_held_out
from trimtab.environments.tools.tool import offered


class VerifiersTask:
    """The rows of an environment's training data; a row is held out by its prompt. There are no demonstrations.

    Raises:
        ValueError: no environment of verifiers 0.1, or one that scores the answers of a group against each other.
    """

    def __init__(self, environment: Any) -> None:
        if not isinstance(environment, vf.Environment):
            raise ValueError(f"an environment of verifiers is a verifiers.Environment, got {environment!r}")
        if environment.rubric.has_group_rewards:
            raise ValueError("the environment's rubric scores whole groups; only rewards of single rollouts are played")
        self._environment = environment
        self._splits: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for row in environment.get_dataset():
            self._splits[is_held_out(json.dumps(row["prompt"], sort_keys=True))].append(row)

    def sample(self, rng: random.Random, *, held_out: bool = False) -> Callable[[], "VerifiersEnv"]:
        rows = self._splits[held_out]
        if not rows:
            raise ValueError(f"the environment's data has no row with held_out={held_out}; it needs more prompts")
        row = rng.choice(rows)
        return lambda: VerifiersEnv(self._environment, row)

    def demonstrate(self, rng: random.Random) -> tuple[Message, ...]:
        raise ValueError("environments of verifiers have no demonstrations: leave them out of the cold start")


class VerifiersEnv:
    """One rollout. Reward parts: "outcome", the rubric's weighted sum; and each of its functions by name.

    An environment that breaks, or that times out by the clock, voids the episode. verifiers itself scores 0 where a
    reward function raises.
    """

    def __init__(self, environment: vf.Environment, row: Mapping[str, Any]) -> None:
        self._environment = environment
        self._row = dict(row)
        self._policy = _Policy()
        self._rollout: asyncio.Task[Any] | None = None
        self._seen = 0

    async def start(self) -> tuple[Message, ...]:
        play = self._environment.rollout(self._row, client=self._policy, model="policy", sampling_args={})
        self._rollout = asyncio.create_task(play)
        asked = await self._next()
        if asked is None:
            self._state()
            raise VoidEpisode("the environment ended before the policy said anything")
        prompt, tools = asked
        self._seen = len(prompt) + 1
        opening = tuple(map(_message, prompt))
        return _with_tools(opening, tools)

    async def step(self, message: Message) -> Step:
        assert self._rollout is not None, "start comes before step"
        self._policy.say(message)
        asked = await self._next()
        if asked is None:
            return Step(rewards=await self._score(self._state()), done=True)
        prompt, _ = asked
        if len(prompt) <= self._seen or prompt[self._seen - 1].role != "assistant":
            await self.close()
            raise VoidEpisode("the environment rewrites the conversation; only ones that append to it can be played")
        replies = tuple(map(_message, prompt[self._seen :]))
        self._seen = len(prompt) + 1
        return Step(replies)

    async def close(self) -> None:
        """End a rollout that is not over; the environment's own cleanup runs."""
        if self._rollout is not None:
            self._rollout.cancel()
            await asyncio.gather(self._rollout, return_exceptions=True)

    async def _next(self) -> tuple[list[Any], Sequence[Any]] | None:
        """What the environment asks of its model, or None when the rollout is over."""
        assert self._rollout is not None
        asked = asyncio.ensure_future(self._policy.asked.get())
        try:
            await asyncio.wait({asked, self._rollout}, return_when=asyncio.FIRST_COMPLETED)
            return asked.result() if asked.done() else None
        finally:
            asked.cancel()

    def _state(self) -> Any:
        assert self._rollout is not None
        try:
            state = self._rollout.result()
        except Exception as error:  # whatever another's environment raises
            raise VoidEpisode(f"the environment broke: {error!r}") from error
        if state.get("error") is not None:
            raise VoidEpisode(f"the environment broke: {state['error']!r}")
        if state.get("timed_out"):
            raise VoidEpisode("the environment's time was up; how long a message takes is not the policy's doing")
        return state

    async def _score(self, state: Any) -> dict[str, float]:
        rubric = self._environment.rubric
        await rubric.score_rollout(state)
        await rubric.cleanup(state)
        return {name: float(value) for name, value in (state["metrics"] or {}).items()} | {
            "outcome": float(state["reward"])
        }


class _Policy(vf.Client):
    """The environment's model: hands out what it is asked and waits for the policy's message."""

    def __init__(self) -> None:
        super().__init__(None)
        self.asked: asyncio.Queue[tuple[list[Any], Sequence[Any]]] = asyncio.Queue()
        self._said: asyncio.Queue[Message] = asyncio.Queue()
        self._count = 0

    def say(self, message: Message) -> None:
        self._said.put_nowait(message)

    def setup_client(self, config: Any) -> None:
        raise ValueError(f"the policy plays; an environment cannot set up a client for it, got {config!r}")

    async def to_native_tool(self, tool: Any) -> Any:
        return tool

    async def to_native_prompt(self, messages: Any) -> tuple[Any, dict[str, Any]]:
        return messages, {}

    async def get_native_response(
        self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **kwargs: Any
    ) -> Message:
        await self.asked.put((list(prompt), tools or ()))
        return await self._said.get()

    async def raise_from_native_response(self, response: Any) -> None:
        return None

    async def from_native_response(self, response: Message) -> Response:
        self._count += 1
        calls = [
            NativeCall(id=f"call_{self._count}_{i}", name=called.name, arguments=json.dumps(dict(called.arguments)))
            for i, called in enumerate(response.tool_calls)
        ]
        said = ResponseMessage(
            content=response.content,
            reasoning_content=response.reasoning or None,
            tool_calls=calls or None,
            finish_reason="tool_calls" if calls else "stop",
            is_truncated=False,
        )
        return Response(id=str(self._count), created=0, model="policy", message=said)

    async def close(self) -> None:
        return None


def _message(native: Any) -> Message:
    natives = getattr(native, "tool_calls", None) or ()
    calls = tuple(ToolCall(called.name, json.loads(called.arguments)) for called in natives)
    return Message(native.role, _text(native.content), getattr(native, "reasoning_content", None) or "", calls)


def _text(content: Any) -> str:
    """The text of a message's content, which may come in parts; an image is beyond a policy that reads text."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part if isinstance(part, dict) else part.model_dump() for part in content]
    if wrong := {part.get("type") for part in parts} - {"text"}:
        raise VoidEpisode(f"the environment sends {', '.join(map(str, wrong))}; the policy reads text only")
    return "".join(part["text"] for part in parts)


def _with_tools(opening: tuple[Message, ...], tools: Sequence[Any]) -> tuple[Message, ...]:
    """The opening with the tools offered by its system message."""
    if not tools:
        return opening
    if opening and opening[0].role == "system":
        return replace(opening[0], tools=offered(tools)), *opening[1:]
    return Message("system", tools=offered(tools)), *opening
