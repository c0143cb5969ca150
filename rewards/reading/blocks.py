"""The code in an answer: its fenced blocks, as CommonMark reads them."""

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache

from markdown_it import MarkdownIt

PYTHON = ("python", "py", "python3")
"""What tags a block as Python, before anything that follows in its first line."""

_FENCE = re.compile(r"[`~]{3,}\s*")


def code_block(text: str) -> str | None:
    """The Python program of an answer: its last closed block that is tagged as Python; without one, the last closed
    block without a tag that parses as Python and does something, so that sample output is none. None without either.
    """
    tagged = tagged_block(text, PYTHON)
    if tagged is not None:
        return tagged
    return next((code for language, code in reversed(list(_blocks(text))) if not language and is_program(code)), None)


def tagged_block(text: str, languages: Sequence[str]) -> str | None:
    """The last closed block of a text whose tag is one of languages, in small letters."""
    return next((code for language, code in reversed(list(_blocks(text))) if language in languages), None)


def is_program(code: str) -> bool:
    """Whether a text is Python with more than values in it."""
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what a model wrote
        return False
    return any(not _is_value(statement) for statement in statements)


def _is_value(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and not any(isinstance(node, ast.Call) for node in ast.walk(statement))


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Tag and content of every block that is closed: fences of ``` or ~~~, longer ones, in lists and quotes."""
    lines = [*re.split(r"\r\n|[\r\n]", textwrap.dedent(text)), ""]
    for token in _markdown().parse("\n".join(lines)):
        if token.type != "fence" or token.map is None:
            continue
        last = lines[token.map[1] - 1].strip().lstrip("> \t")
        if token.map[1] - token.map[0] < 2 or not (_FENCE.fullmatch(last) and last.startswith(token.markup)):
            continue  # cut off before its end
        words = re.findall(r"[\w+#-]+", token.info.split(",")[0].lower())
        yield words[0] if words else "", token.content


@cache
def _markdown() -> MarkdownIt:
    # tags such as <answer> would hide the blocks behind them, and nothing inside a line matters
    return MarkdownIt("commonmark").disable(["html_block", "inline", "reference"])
