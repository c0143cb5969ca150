"""Any Python function with type hints as a tool, and an environment that lends such tools to the policy.

What the policy gets wrong, and what breaks inside a tool, comes back as the text of a tool result, never as an
exception; only VoidEpisode, with which a tool says that nothing can be said about the episode, passes through.
"""

import asyncio
import inspect
import json
import math
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_json

from trimtab.environments.base import Message, Step, ToolCall, VoidEpisode
from trimtab.environments.tools import Tool, run_tool

Reward = Callable[[Message], Mapping[str, float] | Awaitable[Mapping[str, float]]]
"""Takes the message that answers, returns the named parts of its reward; may be a coroutine function."""

_FIELD = "argument_"
"""Before a parameter's name it gives a field that no attribute of a pydantic model has."""


@dataclass(frozen=True, slots=True)
class FunctionTool:
    """A function as a tool. parameters: the JSON schema of its arguments; model: validates them."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    model: type[BaseModel]
    function: Callable[..., Any]


def tool(function: Callable[..., Any]) -> FunctionTool:
    """A tool from a function, sync or async, whose parameters have type hints and whose docstring says what it does.

    The docstring's sections on parameters (Google, NumPy or reST style) describe them; Annotated[int, Field(ge=1)] and
    the like narrow them. A sync function runs in a thread, so that calls of one message run at the same time.

    Raises:
        ValueError: no name, no docstring, a parameter without a type hint or one that cannot be given by name, a type
            that JSON cannot express.

    >>> def add(a: int, b: int = 1) -> int:
    ...     "Add two numbers."
    ...     return a + b
    >>> tool(add).parameters["required"]
    ['a']
    """
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
    return FunctionTool(name, description, parameters, model, function)


async def call(tools: Sequence[FunctionTool | Tool], called: ToolCall) -> str:
    """The result of a call as text, or "error: ..." when the name, the arguments or the tool itself is wrong.

    A text is returned as it is; everything else as JSON where JSON can express it, otherwise by str.

    Raises:
        VoidEpisode: the tool raised it.
    """
    found = next((tool for tool in tools if tool.name == called.name), None)
    if found is None:
        return f"error: no tool {called.name}; there are {', '.join(tool.name for tool in tools) or 'none'}"
    if isinstance(found, Tool):
        return run_tool([found], called)
    try:
        return as_text(await _invoke(found.function, _validated(found, called.arguments)))
    except VoidEpisode:
        raise
    except ValidationError as error:
        return f"error: {_explain(error)}"
    except ValueError as error:
        return f"error: {error}"
    except (Exception, SystemExit) as error:  # the tool is a user's code, called with what a model wrote
        return f"error: {type(error).__name__}: {error}"


def as_text(result: Any) -> str:
    """A tool's result as the policy reads it.

    >>> as_text({"a": [1, 2]})
    '{"a":[1,2]}'
    """
    return result if isinstance(result, str) else to_json(result, fallback=str, inf_nan_mode="constants").decode()


def describe(tools: Sequence[FunctionTool | Tool]) -> str:
    """The tools for a system prompt: a line for each, with its JSON schema.

    >>> describe([])
    ''
    """
    lines = [f"{tool.name}: {tool.description}\n{json.dumps(tool.parameters, ensure_ascii=False)}" for tool in tools]
    return "\n".join(["Tools:", *lines]) if lines else ""


class ToolEnv:
    """One prompt, tools to find its answer with, and a reward for the answer.

    The calls of one message run at the same time and answer in order. The first message without calls is the answer.
    With the message at the limit the episode is over: if it still calls, the calls are carried out and the empty
    message is scored as the answer.

    Args:
        system: the system message; describe(tools) when None, no such message when empty.
        max_messages: assistant messages of one episode.
        max_calls: calls of one message that are carried out.
    """

    def __init__(
        self,
        prompt: str,
        tools: Sequence[FunctionTool | Tool],
        reward: Reward,
        *,
        system: str | None = None,
        max_messages: int = 16,
        max_calls: int = 8,
    ) -> None:
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise ValueError(f"every tool needs a name of its own, got {', '.join(names)}")
        if max_messages < 1 or max_calls < 1:
            raise ValueError(f"max_messages and max_calls must be at least 1, got {max_messages} and {max_calls}")
        self.prompt = prompt
        self.tools = tuple(tools)
        self._reward = reward
        self._system = describe(tools) if system is None else system
        self._max_messages = max_messages
        self._max_calls = max_calls
        self._messages = 0

    async def start(self) -> tuple[Message, ...]:
        opening = (Message("system", self._system),) if self._system else ()
        return (*opening, Message("user", self.prompt))

    async def step(self, message: Message) -> Step:
        self._messages += 1
        if not message.tool_calls:
            return Step(rewards=await score(self._reward, message), done=True)
        texts = await asyncio.gather(*(self._run(i, called) for i, called in enumerate(message.tool_calls)))
        replies = tuple(Message("tool", text) for text in texts)
        if self._messages < self._max_messages:
            return Step(replies)
        return Step(replies, await score(self._reward, Message("assistant")), done=True)

    async def _run(self, position: int, called: ToolCall) -> str:
        if position >= self._max_calls:
            return f"error: at most {self._max_calls} calls at a time"
        return await call(self.tools, called)


async def score(reward: Reward, message: Message) -> dict[str, float]:
    """The parts that a reward function, sync or async, gives to a message.

    Raises:
        ValueError: the result is no mapping of names to finite numbers.
    """
    parts = reward(message)
    if inspect.isawaitable(parts):
        parts = await parts
    if not isinstance(parts, Mapping):
        raise ValueError(f'a reward returns named parts, such as {{"outcome": 1.0}}, got {parts!r}')
    for name, value in parts.items():
        if not (isinstance(name, str) and isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"a part of a reward is a name with a finite number, got {name!r}: {value!r}")
    return {name: float(value) for name, value in parts.items()}


class _Untitled(GenerateJsonSchema):
    """JSON schema without the titles that repeat the names of parameters."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _arguments_model(name: str, function: Callable[..., Any], told: Mapping[str, str]) -> type[BaseModel]:
    hints = typing.get_type_hints(function, include_extras=True)
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


async def _invoke(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    result, error = await asyncio.to_thread(_settle, function, arguments)
    if error is not None:
        raise error
    return await result if inspect.isawaitable(result) else result


def _settle(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Any, BaseException | None]:
    """The result, or what was raised: a future cannot carry StopIteration out of a thread."""
    try:
        return function(**arguments), None
    except (Exception, SystemExit) as error:
        return None, error
