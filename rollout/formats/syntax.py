"""How policies write reasoning and tool calls: the common forms, each written and read.

Reading is strict and total: a text is content and well-formed calls, or ValueError. Templates write calls themselves;
what is written here serves those that leave them to the message's text.
"""

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.environments.base import ToolCall
from trimtab.rollout.formats.strict_json import dumps, loads

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each parameter, by tool and parameter as "tool.parameter". Forms without quotes need it."""
Calls = tuple[ToolCall, ...]


def write_json(calls: Sequence[ToolCall], key: str = "arguments") -> list[str]:
    """{"name": ..., "arguments": {...}} for each call."""
    return [f'{{"name": {dumps(call.name)}, "{key}": {dumps(dict(call.arguments))}}}' for call in calls]


def write_lines(calls: Sequence[ToolCall]) -> list[str]:
    """write_json on a line of its own, as Hermes has it."""
    return [f"\n{text}\n" for text in write_json(calls)]


def read_json(body: str, schemas: Schemas) -> Calls:
    """One call of write_json."""
    return (_read_call(loads(body), "arguments", frozenset()),)


@dataclass(frozen=True, slots=True)
class Syntax:
    """Reasoning between two marks, then content, then calls between two marks; the defaults are Qwen3's and Hermes'.

    Raises:
        ValueError: a mark of reasoning that is empty.
    """

    think_open: str = "<think>"
    think_close: str = "</think>"
    call_open: str = "<tool_call>"
    """Empty: calls are the whole turn, and a turn that cannot be read as calls is content."""
    call_close: str = "</tool_call>"
    """Empty: a call reaches to the next one or to the end of the turn."""
    others: tuple[str, ...] = ("<tool_response>", "</tool_response>")
    """Further marks of the template, which no policy may write."""
    read: Callable[[str, Schemas], Calls] = read_json
    """The calls between two marks; ValueError for anything else."""
    write: Callable[[Sequence[ToolCall]], list[str]] = write_lines
    """What stands between two marks, pair by pair."""

    def __post_init__(self) -> None:
        if not self.think_open or not self.think_close:
            raise ValueError(f"reasoning needs two marks, got {self.think_open!r} and {self.think_close!r}")

    @property
    def marks(self) -> tuple[str, ...]:
        """Every mark that is not empty."""
        return tuple(filter(None, (self.think_open, self.think_close, self.call_open, self.call_close, *self.others)))

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        """Calls as a turn holds them."""
        return "\n".join(self.call_open + body + self.call_close for body in self.write(calls)) if calls else ""

    def split(self, text: str, schemas: Schemas) -> tuple[str, Calls]:
        """Content and calls of a turn.

        Raises:
            ValueError: a call that is broken or not closed, text behind a call.
        """
        if not self.call_open:
            try:
                return "", self.read(text.strip(), schemas)
            except ValueError:  # model output: what is no call is an answer
                return text, ()
        content, *blocks = text.split(self.call_open)
        calls: list[ToolCall] = []
        for block in blocks:
            body, closing, after = block.partition(self.call_close) if self.call_close else (block, "end", "")
            if not closing or after.strip():
                raise ValueError(f"a call is not closed, or text follows it: {block[-80:]!r}")
            calls += self.read(body, schemas)
        return content, tuple(calls)


def _read_call(value: Any, key: str, ignored: frozenset[str]) -> ToolCall:
    if isinstance(value, dict) and {"name", key} <= value.keys() <= {"name", key, *ignored}:
        name, arguments = value["name"], value[key]
        if isinstance(name, str) and isinstance(arguments, dict):
            return ToolCall(name, arguments)
    raise ValueError(f"a call needs name and {key}, nothing else: {value!r:.80}")


def _write_parameters(calls: Sequence[ToolCall]) -> list[str]:
    return write_json(calls, "parameters")


def _read_parameters(body: str, schemas: Schemas) -> Calls:
    return (_read_call(loads(body.removeprefix("<|python_tag|>")), "parameters", frozenset({"type"})),)


def _write_list(calls: Sequence[ToolCall]) -> list[str]:
    return [f" [{', '.join(write_json(calls))}]"]


def _read_list(body: str, schemas: Schemas) -> Calls:
    calls = loads(body)
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"calls must be a JSON list, got {body[:80]!r}")
    return tuple(_read_call(call, "arguments", frozenset({"id"})) for call in calls)


def _write_args(calls: Sequence[ToolCall]) -> list[str]:
    return [f"{call.name}[ARGS]{dumps(dict(call.arguments))}" for call in calls]


def _read_args(body: str, schemas: Schemas) -> Calls:
    head, mark, arguments = body.partition("[ARGS]")
    name = head.partition("[CALL_ID]")[0].strip()
    if not mark or not name:
        raise ValueError(f"a call needs a name and [ARGS]: {body[:80]!r}")
    return (_read_call({"name": name, "arguments": loads(arguments)}, "arguments", frozenset()),)


def _plain(value: Any) -> str:
    """A value of a form without quotes."""
    return value if isinstance(value, str) else dumps(value)


def _read_plain(text: str, schema: Mapping[str, Any]) -> Any:
    """What a value of a form without quotes stands for: text where the schema says so or nothing else can be read."""
    if schema.get("type") == "string":
        return text
    try:
        return {"True": True, "False": False, "None": None}[text] if text in ("True", "False", "None") else loads(text)
    except ValueError:  # model output
        return text


def _named(call: str, pairs: Iterable[tuple[str, str]], schemas: Schemas) -> ToolCall:
    arguments: dict[str, Any] = {}
    for name, text in pairs:
        if name in arguments:
            raise ValueError(f"{call!r} has the parameter {name!r} twice")
        arguments[name] = _read_plain(text, schemas.get(f"{call}.{name}", {}))
    return ToolCall(call, arguments)


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\n?(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _write_functions(calls: Sequence[ToolCall]) -> list[str]:
    return [
        f"\n<function={call.name}>\n"
        + "".join(f"<parameter={key}>\n{_plain(value)}\n</parameter>\n" for key, value in call.arguments.items())
        + "</function>\n"
        for call in calls
    ]


def _read_function(body: str, schemas: Schemas) -> Calls:
    match = _FUNCTION.fullmatch(body)
    if not match or _PARAMETER.sub("", match[2]).strip():
        raise ValueError(f"a broken call: {body[:80]!r}")
    return (_named(match[1], _PARAMETER.findall(match[2]), schemas),)


_ARGUMENT = re.compile(r"<arg_key>([^<\n]+)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_KEYED = re.compile(r"\s*([^<\s]+)\s*((?:<arg_key>.*)?)", re.DOTALL)


def _write_keyed(calls: Sequence[ToolCall]) -> list[str]:
    return [
        f"{call.name}\n"
        + "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_plain(value)}</arg_value>\n"
            for key, value in call.arguments.items()
        )
        for call in calls
    ]


def _read_keyed(body: str, schemas: Schemas) -> Calls:
    match = _KEYED.fullmatch(body)
    if not match or _ARGUMENT.sub("", match[2]).strip():
        raise ValueError(f"a broken call: {body[:80]!r}")
    return (_named(match[1], _ARGUMENT.findall(match[2]), schemas),)


def _write_python(calls: Sequence[ToolCall]) -> list[str]:
    texts = (", ".join(f"{key}={value!r}" for key, value in call.arguments.items()) for call in calls)
    return [f"[{', '.join(f'{call.name}({text})' for call, text in zip(calls, texts, strict=True))}]"]


def _read_python(body: str, schemas: Schemas) -> Calls:
    try:
        tree = ast.parse(body.strip(), mode="eval").body
        calls = tuple(map(_python_call, tree.elts)) if isinstance(tree, ast.List) else ()
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:  # model output
        raise ValueError(f"not a list of calls ({error}): {body[:80]!r}") from error
    if not calls:
        raise ValueError(f"not a list of calls: {body[:80]!r}")
    return calls


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("a call is name(parameter=value, ...)")
    arguments = {str(one.arg): ast.literal_eval(one.value) for one in node.keywords if one.arg}
    if len(arguments) < len(node.keywords):
        raise ValueError("a parameter twice, or without a name")
    dumps(arguments)
    return ToolCall(node.func.id, arguments)


_FENCED = re.compile(
    r"\s*<｜tool▁call▁begin｜>function<｜tool▁sep｜>([^\n]+)\n```json\n(.*?)\n```<｜tool▁call▁end｜>\s*",  # noqa: RUF001
    re.DOTALL,
)


def _write_fenced(calls: Sequence[ToolCall]) -> list[str]:
    begin, sep, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
    bodies = (f"{call.name}\n```json\n{dumps(dict(call.arguments))}\n```" for call in calls)
    return ["\n".join(f"{begin}function{sep}{body}{end}" for body in bodies)]


def _read_fenced(body: str, schemas: Schemas) -> Calls:
    found = _FENCED.findall(body)
    if not found or _FENCED.sub("", body).strip():
        raise ValueError(f"broken calls: {body[:80]!r}")
    return tuple(_read_call({"name": name, "arguments": loads(text)}, "arguments", frozenset()) for name, text in found)


def _read_nothing(body: str, schemas: Schemas) -> Calls:
    raise ValueError("no calls")


def _write_nothing(calls: Sequence[ToolCall]) -> list[str]:
    raise ValueError(f"this syntax has no calls, got {calls[0].name}")


PLAIN = Syntax(call_open="", call_close="", others=(), read=_read_nothing, write=_write_nothing)
"""Whatever a turn holds behind its reasoning is content."""
_RESPONSE = ("<tool_response>", "</tool_response>")
PRESETS: Mapping[str, Syntax] = {
    "hermes": Syntax(),
    "function": Syntax(
        others=(*_RESPONSE, "<function=", "</function>", "<parameter=", "</parameter>"),
        read=_read_function,
        write=_write_functions,
    ),
    "glm": Syntax(
        others=(*_RESPONSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        read=_read_keyed,
        write=_write_keyed,
    ),
    "mistral": Syntax(
        "[THINK]", "[/THINK]", "[TOOL_CALLS]", "", ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"), _read_list, _write_list
    ),
    "mistral-args": Syntax(
        "[THINK]", "[/THINK]", "[TOOL_CALLS]", "", ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"), _read_args, _write_args
    ),
    "python": Syntax(
        call_open="<|tool_call_start|>",
        call_close="<|tool_call_end|>",
        others=("<|tool_response_start|>", "<|tool_response_end|>"),
        read=_read_python,
        write=_write_python,
    ),
    "deepseek": Syntax(
        call_open="<｜tool▁calls▁begin｜>",  # noqa: RUF001
        call_close="<｜tool▁calls▁end｜>",  # noqa: RUF001
        others=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),  # noqa: RUF001
        read=_read_fenced,
        write=_write_fenced,
    ),
    "llama": Syntax(call_open="", call_close="", others=(), read=_read_parameters, write=_write_parameters),
    "harmony": Syntax(
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>", others=()
    ),
}
"""Qwen3 and Hermes; Qwen3-Coder and Qwen3.5; GLM-4.5; Mistral up to 0.3 and after; LFM2; DeepSeek-V3; Llama 3; the
reasoning of gpt-oss. In this order a template's form is looked for, so the one whose calls have no marks comes late."""


def find_syntax(name: str) -> Syntax:
    """A preset.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"no syntax {name!r}; there are {', '.join(PRESETS)}, and a Syntax of your own")
    return PRESETS[name]


def parameter_schemas(tools: Iterable[Mapping[str, Any]]) -> Schemas:
    """The schemas of the parameters of tools, as Syntax.split takes them."""
    return {
        f"{tool['name']}.{name}": schema
        for tool in tools
        for name, schema in (tool.get("parameters") or {}).get("properties", {}).items()
        if isinstance(schema, Mapping)
    }
