"""JSON Lines, read as a file is: a line ends at a line feed and nowhere else, whatever its text holds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path | str) -> Iterator[tuple[int, Any]]:
    """The number of each line, counted from 1, and what it holds; empty lines are passed over.

    Raises:
        ValueError: a line that is no JSON in UTF-8; names the file and the line.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # of the decoder of UTF-8 or of JSON
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error


def json_line(value: Any) -> str:
    """One line for value, its line feed included; beyond ASCII as it is, where it can be written so."""
    text = json.dumps(value, ensure_ascii=False) + "\n"
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # half a surrogate pair, in what a judge or a tool wrote
        return json.dumps(value) + "\n"
