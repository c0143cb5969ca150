"""Rows of JSONL and Parquet files, and documents from them or from text files. Errors name the file and the line."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.environments.json_lines import read_json_lines

_TEXT = (".md", ".txt")


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus; ids are unique."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file. where: the file and the line, or the row of a Parquet file, counted from 1."""

    where: str
    values: Mapping[str, Any]

    def value(self, field: str) -> Any:
        """What a field holds.

        Raises:
            ValueError: no such field, or null in it.
        """
        if self.values.get(field) is None:
            fields = ", ".join(map(repr, self.values)) or "none"
            raise ValueError(f"{self.where}: field {field!r} is missing or null; the fields are {fields}")
        return self.values[field]

    def text(self, field: str) -> str:
        """The text of a field.

        Raises:
            ValueError: no such field, or no text in it.
        """
        value = self.value(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.where}: field {field!r} must be a text, got {value!r}")
        return value


def read_rows(path: Path | str) -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file; empty lines are passed over.

    Raises:
        ValueError: another kind of file, a line that is no JSON object, pyarrow missing for a Parquet file.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    match path.suffix:
        case ".jsonl":
            return _jsonl(path)
        case ".parquet":
            return _parquet(path)
        case _:
            raise ValueError(f"{path}: rows are read from .jsonl and .parquet files")


def read_documents(path: Path | str) -> list[Document]:
    """The documents of a .jsonl or .parquet file with fields id, title and text, or of text files.

    A .txt or .md file is one document; a folder holds any number of them, at any depth. Their id is the path below the
    folder (of a single file, its name), their title the name without its ending.

    Raises:
        ValueError: a missing or wrong field, an id that comes twice, no documents, a file that is not UTF-8.
        FileNotFoundError: no such file or folder.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _TEXT and file.is_file())
        found = [(str(file), _text_document(file, path)) for file in files]
    elif path.suffix in _TEXT:
        found = [(str(path), _text_document(path, path.parent))]
    else:
        rows = read_rows(path)
        found = [(row.where, Document(row.text("id"), row.text("title"), row.text("text"))) for row in rows]
    if not found:
        raise ValueError(f"{path}: no documents; a folder needs .txt or .md files, a file at least one row")
    seen: dict[str, str] = {}
    for where, document in found:
        if document.id in seen:
            raise ValueError(f"{where}: id {document.id!r} was already used at {seen[document.id]}")
        seen[document.id] = where
    return [document for _, document in found]


def _jsonl(path: Path) -> Iterator[Row]:
    for number, values in read_json_lines(path):
        where = f"{path}:{number}"
        if not isinstance(values, dict):
            raise ValueError(f"{where}: a line holds a JSON object, got {type(values).__name__}")
        yield Row(where, values)


def _parquet(path: Path) -> Iterator[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow, or convert the file to JSONL")
    from pyarrow.lib import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}:{number}", values)
    except ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error


def _text_document(file: Path, folder: Path) -> Document:
    try:
        return Document(file.relative_to(folder).as_posix(), file.stem, file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from error
