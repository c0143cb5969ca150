# ruff: noqa: RUF001 - the full-width bars are the format
"""The text of DeepSeek-V3.2's prompt format: its markup, and the blocks of calls, tools and response format.

The tools block and the response format block are part of the format to the letter; their wording is that of the encoder
which DeepSeek publishes with the checkpoint (encoding/encoding_dsv32.py). Everything else is in chat.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.environments.base import ToolCall
from trimtab.rollout.formats.strict_json import dumps, loads

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
DSML = "｜DSML｜"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, DSML)
"""Each must be one token of the tokenizer."""

CALLS_OPEN = f"\n\n<{DSML}function_calls>\n"
CALLS_CLOSE = f"\n</{DSML}function_calls>"
INVOKE_OPEN = f'<{DSML}invoke name="'
INVOKE_CLOSE = f"\n</{DSML}invoke>"
PARAMETER_OPEN = f'<{DSML}parameter name="'
PARAMETER_CLOSE = f"</{DSML}parameter>"
RAW = '" string="true">'
JSON = '" string="false">'
RESULTS_OPEN = "\n\n<function_results>"
RESULT_OPEN = "\n<result>"
RESULT_CLOSE = "</result>"
RESULTS_CLOSE = "\n</function_results>\n\n"
DEVELOPER = "\n\n# The user's message is: "
MARKUP = (
    CALLS_OPEN + INVOKE_OPEN,
    '">\n' + PARAMETER_OPEN,
    RAW,
    JSON,
    PARAMETER_CLOSE + "\n" + PARAMETER_OPEN,
    PARAMETER_CLOSE + INVOKE_CLOSE + "\n" + INVOKE_OPEN,
    PARAMETER_CLOSE + INVOKE_CLOSE + CALLS_CLOSE,
    RESULTS_OPEN + RESULT_OPEN,
    RESULT_CLOSE + RESULT_OPEN,
    RESULT_CLOSE + RESULTS_CLOSE,
)
"""Runs of fixed text between variable parts. A tokenizer may hold each as one token; none has to."""

RESERVED = (*SPECIAL_TOKENS, RAW, JSON, "<result>", "</result>", "<function_results>", "</function_results>")
"""What no content may hold, whoever says it: it could not be told from the markup."""

_TOOLS_OPEN = (
    "## Tools\n\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    f'You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your reply to '
    "the user:\n"
    f"<{DSML}function_calls>\n"
    f'<{DSML}invoke name="$FUNCTION_NAME">\n'
    f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f'<{DSML}invoke name="$FUNCTION_NAME2">\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f"</{DSML}function_calls>\n\n"
    "String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects "
    'should use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for '
    "other types (numbers, booleans, arrays, objects).\n\n"
    "If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking "
    "block. Here is an example:\n\n"
    f"<{DSML}function_calls>\n...\n</{DSML}function_calls>\n\n"
    "<function_results>\n...\n</function_results>\n\n"
    f"{THINK_OPEN}...thinking about results{THINK_CLOSE}\n\n"
    "Here are the functions available in JSONSchema format:\n"
    "<functions>\n"
)
_TOOLS_CLOSE = "\n</functions>\n"
_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

_INVOKE = re.compile(
    re.escape(INVOKE_OPEN) + r'(?P<name>[^"\n]+)">\n(?P<parameters>.*?)' + re.escape(INVOKE_CLOSE), re.DOTALL
)
_PARAMETER = re.compile(
    re.escape(PARAMETER_OPEN) + r'(?P<name>[^"\n]+)" string="(?P<raw>true|false)">(?P<value>.*?)' + PARAMETER_CLOSE,
    re.DOTALL,
)


def tools_block(tools: Sequence[Mapping[str, Any]]) -> str:
    """What a system or developer message says of the functions it offers: a line of JSON for each.

    Raises:
        ValueError: a function that is not JSON.
    """
    return _TOOLS_OPEN + "\n".join(map(dumps, map(dict, tools))) + _TOOLS_CLOSE


def response_format_block(schema: Mapping[str, Any]) -> str:
    """What it says of the JSON schema that answers must follow.

    Raises:
        ValueError: the schema is not JSON.
    """
    return _RESPONSE_FORMAT + dumps(dict(schema))


def format_calls(calls: Sequence[ToolCall]) -> str:
    """The DSML block of tool calls; empty without calls.

    Raises:
        ValueError: an argument that is not JSON.
    """
    if not calls:
        return ""
    return CALLS_OPEN + "\n".join(map(_format_call, calls)) + CALLS_CLOSE


def _format_call(call: ToolCall) -> str:
    parameters = "\n".join(
        PARAMETER_OPEN + key + (RAW if isinstance(value, str) else JSON) + format_value(value) + PARAMETER_CLOSE
        for key, value in call.arguments.items()
    )
    return f'{INVOKE_OPEN}{call.name}">\n{parameters}{INVOKE_CLOSE}'


def format_value(value: Any) -> str:
    """An argument as a call shows it: text as it is, everything else as JSON.

    Raises:
        ValueError: it is not JSON.
    """
    return value if isinstance(value, str) else dumps(value)


def parse_calls(text: str) -> tuple[ToolCall, ...]:
    """Read a DSML block, from behind its opening to its end.

    Raises:
        ValueError: anything but well-formed calls and their closing.
    """
    body, closing, after = text.partition(CALLS_CLOSE)
    if not closing or after:
        raise ValueError(f"tool calls are not closed, or text follows them: {text[-80:]!r}")
    found = list(_INVOKE.finditer(body))
    if not found or "\n".join(match[0] for match in found) != body:
        raise ValueError(f"broken tool calls: {body[:80]!r}")
    return tuple(map(_parse_call, found))


def _parse_call(match: re.Match[str]) -> ToolCall:
    arguments: dict[str, Any] = {}
    text = match["parameters"]
    found = list(_PARAMETER.finditer(text))
    if "\n".join(parameter[0] for parameter in found) != text:
        raise ValueError(f"broken parameters of {match['name']!r}: {text[:80]!r}")
    for parameter in found:
        if parameter["name"] in arguments:
            raise ValueError(f"{match['name']!r} has the parameter {parameter['name']!r} twice")
        raw = parameter["raw"] == "true"
        arguments[parameter["name"]] = parameter["value"] if raw else loads(parameter["value"])
    return ToolCall(match["name"], arguments)
