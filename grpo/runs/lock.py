"""One process for one folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file at path; the system lets go of it however the process ends.

    Args:
        what: what is locked, for the error.

    Raises:
        ValueError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ValueError(f"{what} is in use by another process (pid {owner}); wait for it or stop it") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
