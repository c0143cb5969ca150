"""Writes that a power cut, a kill or a full disk leaves whole or undone."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole: readers see the old text or the new one, also after a power cut.

    Raises:
        OSError: it could not be written, and is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append_text(path: Path, text: str) -> None:
    """Add whole lines to a file.

    Raises:
        OSError: they could not be written, and the file is as it was.
    """
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            data = memoryview(text.encode())
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            os.truncate(path, size)
            raise


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path there."""
    return {file.relative_to(folder).as_posix(): _digest(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Owed:
    """Writes that are made up for: one that fails is kept, told, and tried again before the next."""

    MOST = 1000
    """Writes that are kept in memory; beyond them the run ends, as nothing is being written any more."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._writes: list[Callable[[], None]] = []

    def write(self, write: Callable[[], None]) -> None:
        """Make all writes that are owed, then this one, in order.

        Raises:
            OSError: too many are owed.
        """
        self._writes.append(write)
        if (error := self.settle()) is None:
            return
        if len(self._writes) > self.MOST:
            raise error
        if len(self._writes) == 1:
            self._tell(f"the run's folder could not be written ({error}); what is to be written waits in memory")

    def settle(self) -> OSError | None:
        """Try what is owed; what still fails, if anything."""
        while self._writes:
            try:
                self._writes[0]()
            except OSError as error:
                return error
            self._writes.pop(0)
        return None
