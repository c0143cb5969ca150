"""What a program and its descendants use: threads, memory, files."""

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MAX_ENTRIES = 10_000
"""Files and folders in the folder of a run, at most."""


@dataclass(frozen=True, slots=True)
class Family:
    """A process and its descendants: threads, resident bytes, and bytes of files without a name that they hold."""

    threads: int
    memory: int
    unlinked: int


def family_of(pid: int) -> Family:
    threads, pages, queue = 0, 0, [pid]
    unlinked: dict[tuple[int, int], int] = {}
    while queue:
        current = queue.pop()
        with suppress(OSError, IndexError):  # it ended meanwhile
            pages += int(Path(f"/proc/{current}/statm").read_text().split()[1])
            tasks = os.listdir(f"/proc/{current}/task")
            threads += len(tasks)
            for task in tasks:
                queue += map(int, Path(f"/proc/{current}/task/{task}/children").read_text().split())
            unlinked |= _unlinked(current)
    return Family(threads, pages * os.sysconf("SC_PAGE_SIZE"), sum(unlinked.values()))


def _unlinked(pid: int) -> dict[tuple[int, int], int]:
    """Bytes of the files that a process holds open and that have no name, by device and inode."""
    found = {}
    for descriptor in os.scandir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            status = os.stat(descriptor.path)
            if stat.S_ISREG(status.st_mode) and not status.st_nlink:
                found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return found


def fits(folder: Path, most: int) -> bool:
    """Whether the files of a folder, as far as they can be looked at, take at most so many bytes."""
    size, entries, queue = 0, 0, [str(folder)]
    if most < 0:
        return False
    while queue:
        try:
            with os.scandir(queue.pop()) as found:
                for entry in found:
                    entries += 1
                    if entry.is_dir(follow_symlinks=False):
                        queue.append(entry.path)
                    with suppress(FileNotFoundError):
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if size > most or entries > MAX_ENTRIES:
                        return False
        except FileNotFoundError:
            continue
        except OSError:  # locked or nested too deep to be looked at: whatever it hides does not fit
            return False
    return True
