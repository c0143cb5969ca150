"""JSON without the liberties of Python's module: what is written reads back as equal, what is read can be written."""

import json
import math
from collections.abc import Callable
from typing import Any, NoReturn


def dumps(value: Any) -> str:
    """JSON that loads reads back as equal, spaced as Python spaces it, beyond ASCII as it is.

    Raises:
        ValueError: there is none: numbers that are not finite, names that are not text, tuples, cycles, ...
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        same = loads(text) == value
    except (TypeError, ValueError, RecursionError) as error:  # a tool call is model output
        raise ValueError(f"not JSON: {error}") from error
    if not same:
        raise ValueError(f"not JSON: {value!r:.80} reads back as {text[:80]}")
    return text


def loads(text: str) -> Any:
    """One JSON value, strictly.

    Raises:
        ValueError: anything else; a name given twice; a number that no finite float holds; half a surrogate pair;
            nesting too deep to read or to write.
    """
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # model output: malformed, never a crash
        raise ValueError(f"not JSON ({error}): {text[:80]!r}") from error
    return value


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, names included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_texts(one, change) for key, one in value.items()}
    return [map_texts(one, change) for one in value] if isinstance(value, list | tuple) else value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is out of range")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a name twice in {[name for name, _ in pairs]}")
    return value
