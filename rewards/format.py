"""Format: whether an answer has the form that was asked for. A text that cannot be parsed fails, with the reason."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import referencing
import referencing.exceptions

from trimtab.rewards.types import Check

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)
_LAST_FENCED = re.compile(r"```(?:json)?[ \t]*\n((?:(?!```).)*)\n[ \t]*```\s*\Z", re.DOTALL | re.IGNORECASE)
_OPENING = re.compile(r"(?<!\A)[{\[]")
_ATTEMPTS = 200
"""Brackets at which the JSON at the end of a text may begin."""
_HEADING = re.compile(r"^#{1,6}[ \t]+(?P<marked>.*)$|^\*\*(?P<bold>[^*\n]+)\*\*:?[ \t]*$", re.MULTILINE)


def without_thinking(text: str) -> str:
    """What a model said aloud: without <think>...</think>, or anything before a </think> whose beginning its template
    gave; nothing of thoughts that do not end."""
    _, _, aloud = text.rpartition("</think>")
    return aloud.partition("<think>")[0]


def last_json(text: str) -> Any:
    """The JSON value that a text ends with, alone or in a ``` block; what stands before is a model's way to it.

    Raises:
        ValueError: it ends with none, or with one that json_value refuses.
    """
    text = without_thinking(text).strip()
    fenced = _LAST_FENCED.search(text)
    text = fenced[1].strip() if fenced else text
    try:
        return json_value(text)
    except ValueError:
        for opening in islice(_OPENING.finditer(text), _ATTEMPTS):
            with suppress(ValueError):
                return json_value(text[opening.start() :])
        raise


def json_value(text: str) -> Any:
    """The JSON value that a text is, alone or alone in one ``` block.

    Raises:
        ValueError: anything else around it, a key given twice, NaN or Infinity, or nesting too deep to read.
    """
    fenced = _FENCED.fullmatch(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


def is_json(text: str) -> Check:
    """Whether a text is one JSON value, as json_value reads it."""
    try:
        json_value(text)
    except ValueError as error:
        return Check(False, f"not JSON: {error}")
    return Check(True)


def fits_schema(text: str, schema: Mapping[str, Any]) -> Check:
    """Whether a text is JSON that satisfies a JSON schema (draft 2020-12, or what its $schema names).

    References must lie inside the schema: nothing is fetched.

    Raises:
        ValueError: the schema is wrong, or refers to something outside it.
    """
    validator_class = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator_class.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"the schema is wrong at {error.json_path}: {error.message}") from error
    try:
        value = json_value(text)
    except ValueError as error:
        return Check(False, f"not JSON: {error}")
    try:
        worst = jsonschema.exceptions.best_match(
            validator_class(schema, registry=referencing.Registry()).iter_errors(value)
        )
    except referencing.exceptions.Unresolvable as missing:
        raise ValueError(f"the schema refers to {missing.ref!r}, which is not in it: put it under $defs") from missing
    except RecursionError:
        return Check(False, "nested too deep")
    return Check(True) if worst is None else Check(False, f"{worst.json_path}: {worst.message[:200]}")


def fits_pattern(text: str, pattern: str) -> Check:
    """Whether a whole text, without spaces around it, matches a regular expression (dots match line ends too).

    The pattern is the user's: one that backtracks without bound can be made slow by an answer.

    Raises:
        ValueError: the pattern is no regular expression.
    """
    try:
        found = re.fullmatch(pattern, text.strip(), re.DOTALL)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is wrong: {error}") from error
    return Check(True) if found else Check(False, f"does not match {pattern}")


def has_sections(text: str, titles: Sequence[str]) -> Check:
    """Whether the Markdown headings of a text (# Title, or a line **Title**) are titles, once each, in this order.

    Case does not matter; other headings may stand between, and each section must hold some text.

    Raises:
        ValueError: no titles, or one twice.
    """
    wanted = [title.casefold() for title in titles]
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"sections need different titles, got {list(titles)}")
    headings = list(_HEADING.finditer(text))
    names = [(found["marked"] or found["bold"] or "").strip(" \t#:").casefold() for found in headings]
    if [name for name in names if name in wanted] != wanted:
        return Check(False, f"the sections must be {', '.join(titles)}, found {', '.join(names) or 'none'}")
    ends = [found.start() for found in headings[1:]] + [len(text)]
    for name, found, end in zip(names, headings, ends, strict=True):
        if name in wanted and not text[found.end() : end].strip():
            return Check(False, f"the section {name} is empty")
    return Check(True)


def has_tags(text: str, tags: Sequence[str]) -> Check:
    """Whether a text is <tag>...</tag> for each of tags, in this order, each with something in it and nothing between.

    Raises:
        ValueError: no tags, or one that is not a word.
    """
    if not tags or not all(re.fullmatch(r"[A-Za-z_][\w-]*", tag) for tag in tags):
        raise ValueError(f"tags must be words such as 'think', got {list(tags)}")
    rest = text.strip()
    for tag in tags:
        start, end = f"<{tag}>", f"</{tag}>"
        if text.count(start) != 1 or text.count(end) != 1:
            return Check(False, f"{start} and {end} must each stand once")
        if not rest.startswith(start) or end not in rest:
            return Check(False, f"{start} does not stand where it should")
        inside, _, rest = rest[len(start) :].partition(end)
        if not inside.strip():
            return Check(False, f"{start} is empty")
        rest = rest.lstrip()
    return Check(False, f"text after {end}") if rest else Check(True)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key!r} is given twice")
        value[key] = item
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
