"""Messages in the form of OpenAI's chat API, with reasoning_content, from and to ours.

Ours say which result answers which call by position, theirs by id. Nothing is guessed: what one form cannot say
in the other is an error.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.formats.strict_json import dumps, loads

_KEYS = {
    "system": {"content", "tools", "response_format"},
    "developer": {"content", "tools", "response_format"},
    "user": {"content"},
    "assistant": {"content", "reasoning_content", "reasoning", "tool_calls"},
    "tool": {"content", "tool_call_id", "name"},
}
"""What a message of each role may hold beside its role. vLLM says reasoning for reasoning_content. Tools and the format
of answers within a message are DeepSeek's; OpenAI's API has them beside the messages."""


def to_openai(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI's API takes them; calls are named call_0, call_1, ... through the conversation.

    Raises:
        ValueError: arguments that are not JSON, results that do not match the calls before them.
    """
    said: list[dict[str, Any]] = []
    waiting: list[str] = []
    count = 0
    for message in messages:
        if (message.role == "tool") != bool(waiting):
            raise ValueError(f"{len(waiting)} calls wait for a result before a message of {message.role}")
        one: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.role == "tool":
            one["tool_call_id"] = waiting.pop(0)
        if message.role != "assistant" and (message.reasoning or message.tool_calls):
            raise ValueError(f"only an assistant reasons and calls tools, got a message of {message.role} that does")
        if message.reasoning:
            one["reasoning_content"] = message.reasoning
        if message.tools:
            one["tools"] = [{"type": "function", "function": dict(tool)} for tool in message.tools]
        if message.response_format is not None:
            one["response_format"] = dict(message.response_format)
        if message.tool_calls:
            waiting = [f"call_{count + i}" for i in range(len(message.tool_calls))]
            one["tool_calls"] = [_call(*pair) for pair in zip(waiting, message.tool_calls, strict=True)]
            count += len(waiting)
        said.append(one)
    return said


def _call(name: str, call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": dump_arguments(call.arguments)}
    return {"id": name, "type": "function", "function": function}


def from_openai(messages: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Our messages; results take the order of the calls they answer. A key whose value is None counts as absent.

    Calls without ids, as DeepSeek's encoder takes them, are answered in order by results without ids.

    Raises:
        ValueError: a role, a key, a type of content or of call that we lack, arguments that are not one JSON object,
            a result of no call, a call that has no result while another has or the conversation goes on.
    """
    ours: list[Message] = []
    waiting: dict[str, str] = {}  # function names by id, of calls whose results have not all come
    results: dict[str, Message] = {}
    for i, raw in enumerate(messages):
        one = {key: value for key, value in raw.items() if value is not None}
        role, where = one.pop("role", None), f"message {i}"
        if role not in _KEYS:
            raise ValueError(f"{where}: no role {role!r}; there are {', '.join(_KEYS)}")
        if unknown := one.keys() - _KEYS[role]:
            raise ValueError(f"{where}: a message of {role} has no {sorted(unknown)}; remove it")
        if (role == "tool") != bool(waiting):
            raise ValueError(f"{where}: {len(waiting)} calls wait for a result before a message of {role}")
        content = _text(one.get("content", "" if role == "assistant" else None), where)
        if role == "assistant":
            calls = [_read_call(call, f"#{at}", where) for at, call in enumerate(one.get("tool_calls", ()))]
            waiting = {name: call.name for name, call in calls}
            if len(waiting) < len(calls):
                raise ValueError(f"{where}: two calls share an id, of {[name for name, _ in calls]}")
            ours.append(Message(role, content, _reasoning(one, where), tuple(call for _, call in calls)))
        elif role == "tool":
            name = one.get("tool_call_id", f"#{len(results)}")
            if name not in waiting or name in results:
                raise ValueError(f"{where}: tool_call_id {name!r} is not one of {sorted(waiting.keys() - results)}")
            if one.get("name", waiting[name]) != waiting[name]:
                raise ValueError(f"{where}: a result of {one['name']!r} for a call of {waiting[name]!r}")
            results[name] = Message(role, content)
            if len(results) == len(waiting):
                ours += [results[name] for name in waiting]
                waiting, results = {}, {}
        else:
            tools = tuple(_read_tool(tool, where) for tool in one.get("tools", ()))
            ours.append(Message(role, content, tools=tools, response_format=one.get("response_format")))
    if results:
        raise ValueError(f"no result for {sorted(waiting.keys() - results)}")
    return tuple(ours)


def _text(content: Any, where: str) -> str:
    """A text, or a list of parts that are all texts, joined."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(_text(part.get("text"), where) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: content must be text, got {content!r:.80}")
    return content


def _reasoning(one: Mapping[str, Any], where: str) -> str:
    found = {_text(one[key], where) for key in ("reasoning_content", "reasoning") if key in one}
    if len(found) > 1:
        raise ValueError(f"{where}: reasoning and reasoning_content differ; send one of them")
    return found.pop() if found else ""


def _read_tool(tool: Any, where: str) -> Mapping[str, Any]:
    match tool:
        case {"type": "function", "function": {"name": str()} as function}:
            return function
    raise ValueError(
        f"{where}: a tool needs type 'function' and function (name, description, parameters): {tool!r:.200}"
    )


def _read_call(call: Any, position: str, where: str) -> tuple[str, ToolCall]:
    match {"id": position, **call} if isinstance(call, Mapping) else call:
        case {"id": str(name), "type": "function", "function": {"name": str(function), "arguments": str(text)}}:
            return name, ToolCall(function, load_arguments(text))
    raise ValueError(f"{where}: a call has an id, type 'function', function (name, arguments as text): {call!r:.200}")


def dump_arguments(arguments: Mapping[str, Any]) -> str:
    """A JSON object that load_arguments reads back as equal.

    Raises:
        ValueError: there is none (strict_json.dumps).
    """
    try:
        return dumps(dict(arguments))
    except ValueError as error:  # a tool call is model output
        raise ValueError(f"arguments are {error}") from error


def load_arguments(text: str) -> dict[str, Any]:
    """One JSON object, strictly.

    Raises:
        ValueError: anything else (strict_json.loads).
    """
    value = loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"arguments must be a JSON object, got {text[:80]!r}")
    return value


def restore_reasoning(messages: Sequence[Message], known: Iterable[Message]) -> tuple[Message, ...]:
    """messages with the reasoning that an agent framework dropped, found by what the policy said.

    Frameworks send back an assistant's content and calls but often not its reasoning, which must stay until a new
    user message. known are the messages as the policy produced them. A turn is found by equal content and calls;
    turns that are equal in both are taken in order, and then both histories must hold equally many.

    Raises:
        ValueError: a turn that the policy never said, or other reasoning than its own; turns that cannot be told
            apart and of which some are missing.
    """
    spoken: dict[str, list[str]] = defaultdict(list)
    asked: dict[str, list[int]] = defaultdict(list)
    for message in known:
        if message.role == "assistant":
            spoken[_identity(message)].append(message.reasoning)
    for i, message in enumerate(messages):
        if message.role == "assistant":
            asked[_identity(message)].append(i)
    restored = list(messages)
    for identity, places in asked.items():
        choices = spoken.get(identity, [])
        if len(set(choices)) == 1:
            choices = choices[:1] * len(places)
        if len(choices) != len(places):
            reason = (
                f"{len(places)} of {len(choices)} equal turns with different reasoning" if choices else "never said"
            )
            raise ValueError(
                f"message {places[0]}: cannot tell which turn of the policy this is ({reason}): {identity:.200}"
            )
        for i, reasoning in zip(places, choices, strict=True):
            if messages[i].reasoning not in ("", reasoning):
                raise ValueError(f"message {i}: other reasoning than the policy's: {messages[i].reasoning[:80]!r}")
            restored[i] = replace(messages[i], reasoning=reasoning)
    return tuple(restored)


def unseen(messages: Sequence[Message], known: Sequence[Message]) -> tuple[Message, ...]:
    """What a framework's messages say beyond known, with which they begin; reasoning that they lack is taken as said.

    So a conversation that holds known goes on from the ids it holds, whatever the framework keeps of them.

    Raises:
        ValueError: they do not begin with known: the framework changed what was said.
    """
    restored = restore_reasoning(messages, known)
    for i, message in enumerate(known):
        if restored[i : i + 1] != (message,):
            raise ValueError(
                f"message {i} is not what was said; begin a new conversation: {restored[i : i + 1]!r:.200}"
            )
    return restored[len(known) :]


def _identity(message: Message) -> str:
    calls = [(call.name, dict(call.arguments)) for call in message.tool_calls]
    return json.dumps([message.content, calls], sort_keys=True, ensure_ascii=False)
