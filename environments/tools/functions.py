"""Any Python function with type hints as a tool, and an environment that lends tools of any kind to the policy."""

import asyncio
import inspect
import json
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_json

from trimtab.environments.base import Message, Step, VoidEpisode
from trimtab.environments.guard import guarded
from trimtab.environments.tools.tool import Tool, answer_calls, close_tools, distinct, opening, shorten
from trimtab.rewards import bounds
from trimtab.rewards.threads import Threads, TimeLimit
from trimtab.rewards.types import named_parts

Parts = Mapping[str, float]
"""The named, unweighted parts of a reward."""
Reward = Callable[[Message], Parts | Awaitable[Parts]]
"""Takes the message that answers, returns the parts of its reward; may be a coroutine function."""

_FIELD = "argument_"
"""Before a parameter's name it gives a field that no attribute of a pydantic model has."""


@dataclass(frozen=True, slots=True)
class FunctionTool:
    """A function as a tool. parameters: the JSON schema of its arguments; model: validates them; the rest: see tool."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    model: type[BaseModel]
    function: Callable[..., Any]
    seconds: float
    characters: int

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """The function's result as_text, or "error: ..." when the arguments are wrong, it raises or takes too long.

        Raises:
            VoidEpisode: the function raised it.
        """
        try:
            result = as_text(await _invoke(self.function, _validated(self, arguments), self.seconds))
            return shorten(result, self.characters)
        except VoidEpisode:
            raise
        except _Late:
            bounds.bit("tool_seconds", f"tool {self.name}: a call took longer than seconds = {self.seconds:g}")
            return f"error: no result within {self.seconds:g} s"
        except ValidationError as error:
            return f"error: {_explain(error)}"
        except ValueError as error:
            return f"error: {error}"
        except Exception as error:  # the function is a user's code, called with what a model wrote
            return f"error: {type(error).__name__}: {error}"


def tool(function: Callable[..., Any], *, seconds: float = 120.0, characters: int = 20_000) -> FunctionTool:
    """A tool from a function, sync or async, whose parameters have type hints and whose docstring says what it does.

    The docstring's sections on parameters (Google, NumPy or reST style) describe them; Annotated[int, Field(ge=1)] and
    the like narrow them. A sync function runs in a thread, beside the other calls of its message; a coroutine function
    that awaits nothing runs alone, in the order of the calls.

    Args:
        seconds: of a call; after that the policy reads that there is no result. A coroutine function is cancelled, a
            sync one runs on in its thread: give its own network calls a limit.
        characters: of a result; of a longer one the policy reads the beginning and the end.

    Raises:
        ValueError: seconds or characters is not above 0, no name, no docstring, a parameter without a type hint or one
            that cannot be given by name, a hint that is not defined or that JSON cannot express.

    >>> def add(a: int, b: int = 1) -> int:
    ...     "Add two numbers."
    ...     return a + b
    >>> tool(add).parameters["required"]
    ['a']
    """
    for name_of_limit, limit in (("seconds", seconds), ("characters", characters)):
        if not limit > 0:
            raise ValueError(f"{name_of_limit} must be above 0, got {limit}")
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise ValueError(f"{function!r} has no name; a tool is a function that is defined with def")
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    if not doc.short_description:
        raise ValueError(f"{name} has no docstring; its first line tells the policy what the tool does")
    told = {parameter.arg_name: parameter.description for parameter in doc.params if parameter.description}
    model = _arguments_model(name, function, told)
    try:
        parameters = model.model_json_schema(schema_generator=_Untitled)
    except PydanticUserError as error:
        raise ValueError(f"{name} has a parameter that JSON cannot express: {error}") from error
    parameters.pop("title", None)
    parameters.setdefault("properties", {})
    description = "\n".join(filter(None, (doc.short_description, doc.long_description)))
    return FunctionTool(name, description, parameters, model, function, seconds, characters)


def as_text(result: Any) -> str:
    """A result as the policy reads it: a text as it is, all else as JSON where JSON can express it, otherwise by str.

    >>> as_text({"a": [1, 2]})
    '{"a":[1,2]}'
    """
    return result if isinstance(result, str) else to_json(result, fallback=str, inf_nan_mode="constants").decode()


class ToolEnv:
    """One prompt, tools to find its answer with, and a reward for the answer.

    The first message without calls is the answer. With the message at the limit the episode is over: if it still calls,
    the calls are carried out and the empty message is scored as the answer. The tools belong to this episode alone when
    they hold anything, and are closed with it.

    Args:
        system: the text of the system message, which offers the tools as well.
        max_messages: assistant messages of one episode.
        max_calls: calls of one message that are carried out.
    """

    def __init__(
        self,
        prompt: str,
        tools: Sequence[Tool],
        reward: Reward,
        *,
        system: str = "",
        max_messages: int = 16,
        max_calls: int = 8,
    ) -> None:
        if max_messages < 1 or max_calls < 1:
            raise ValueError(f"max_messages and max_calls must be at least 1, got {max_messages} and {max_calls}")
        self.prompt = prompt
        self.tools = distinct(tools)
        self._reward = reward
        self._system = system
        self._max_calls = max_calls
        self._left = max_messages

    async def start(self) -> tuple[Message, ...]:
        return opening(self.prompt, self.tools, self._system)

    async def step(self, message: Message) -> Step:
        self._left -= 1
        if not message.tool_calls:
            return Step(rewards=await scored(self._reward, message), done=True)
        replies = await answer_calls(self.tools, message.tool_calls, most=self._max_calls)
        if self._left > 0:
            return Step(replies)
        return Step(replies, await scored(self._reward, Message("assistant")), done=True)

    @property
    def holds(self) -> bool:
        """Whether a tool has anything to close."""
        return any(hasattr(tool, "close") for tool in self.tools)

    async def close(self) -> None:
        """Close the tools; may be called again."""
        await close_tools(self.tools)


REWARDS = Threads("rewards", 32)
CALLS = Threads("tools", 128)


async def scored(reward: Callable[..., Parts | Awaitable[Parts]], *arguments: Any) -> dict[str, float]:
    """The parts that a reward function, sync or async, gives. A sync one runs in a thread: it may take its time.

    Raises:
        ValueError: they are no mapping of names to finite numbers.
        Exception: what the function raised.
    """
    if inspect.iscoroutinefunction(reward):
        return named_parts(await reward(*arguments))
    parts = await REWARDS.run(partial(reward, *arguments))
    return named_parts(await parts if inspect.isawaitable(parts) else parts)


class _Untitled(GenerateJsonSchema):
    """JSON schema without the titles that repeat the names of parameters."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _arguments_model(name: str, function: Callable[..., Any], told: Mapping[str, str]) -> type[BaseModel]:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ValueError(f"{name} has a type hint that is not defined where the function is: {error}") from error
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{name}: parameter {parameter} cannot be given by name, and the policy gives no other")
        if parameter.name not in hints:
            raise ValueError(f"{name}: parameter {parameter.name} has no type hint; its JSON schema comes from there")
        default = ... if parameter.default is parameter.empty else parameter.default
        hint = hints[parameter.name]
        if parameter.name in told:
            hint = Annotated[hint, Field(description=told[parameter.name])]
        fields[_FIELD + parameter.name] = (hint, Field(default, alias=parameter.name))
    try:
        return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    except PydanticUserError as error:
        raise ValueError(f"{name} has a parameter that JSON cannot express: {error}") from error


def _validated(tool: FunctionTool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the function's types; strictly, so that "3" and true are no integers."""
    text = json.dumps(dict(arguments), allow_nan=False)
    model = tool.model.model_validate_json(text, strict=True)
    return {field.removeprefix(_FIELD): getattr(model, field) for field in tool.model.model_fields}


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, detail['loc'])) or 'arguments'}: {detail['msg']}"
        for detail in error.errors(include_url=False, include_input=False)
    )


class _Late(Exception):
    """A call's time is over."""


async def _invoke(function: Callable[..., Any], arguments: Mapping[str, Any], seconds: float) -> Any:
    """What the function returns; its time begins when it does.

    Raises:
        _Late: it takes longer.
    """
    if not inspect.iscoroutinefunction(function):
        try:
            result = await CALLS.run(partial(function, **arguments), limit=seconds)
        except TimeLimit as error:
            raise _Late from error
        if not inspect.isawaitable(result):
            return result
    else:
        result = function(**arguments)
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await guarded(_awaited(result))
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise _Late from error


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result
