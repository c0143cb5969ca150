"""A control group for each run, where this process may make one: its limits hold at every moment, for all together.

In version 2 a group is made beside the own one, because a group that has processes can have none below it that are
limited; systemd gives a user's services such a place, and root has it. In version 1 it is made below the own one, once
for memory and once for the number of processes.
"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

ENTER = 'while [ "$1" != -- ]; do echo $$ > "$1/cgroup.procs" || exit 1; shift; done; shift; exec "$@"'
REMOVE_SECONDS = 5.0
MIB = 2**20
_numbers = count()


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of the control groups' file system in which groups can be made, and what limits one there.

    limits holds (file, value) pairs, where {memory} stands for bytes and {processes} for a number; what a kernel has no
    file for is left out, but for the first.
    """

    parent: Path
    limits: tuple[tuple[str, str], ...]
    events: str = ""  # the file that counts what was killed for memory

    def make(self, name: str, memory: int, processes: int) -> Path:
        """A group with its limits; OSError if it cannot be made."""
        folder = self.parent / name
        folder.mkdir()
        try:
            for number, (file, value) in enumerate(self.limits):
                if number == 0 or (folder / file).exists():
                    (folder / file).write_text(value.format(memory=memory, processes=processes))
        except OSError:
            folder.rmdir()
            raise
        return folder


_UNIFIED = (
    ("memory.max", "{memory}"),
    ("memory.swap.max", "0"),
    ("memory.oom.group", "1"),
    ("pids.max", "{processes}"),
)
_MEMORY = (("memory.limit_in_bytes", "{memory}"), ("memory.memsw.limit_in_bytes", "{memory}"))
_PIDS = (("pids.max", "{processes}"),)


@dataclass(frozen=True, slots=True)
class Group:
    """The group of a run: its folders, of which the files in `events` count what was killed for memory."""

    folders: tuple[Path, ...] = ()
    events: tuple[Path, ...] = ()

    def enter(self) -> list[str]:
        """What a command begins with that is to run in the group; nothing where there is none."""
        return ["sh", "-c", ENTER, "sh", *map(str, self.folders), "--"] if self.folders else []

    def out_of_memory(self) -> bool:
        """Whether a process of the group was killed for memory."""
        lines = [line.split() for path in self.events for line in path.read_text().splitlines()]
        return any(line[0] == "oom_kill" and line[1] != "0" for line in lines)

    def remove(self) -> None:
        """Kill what is left in the group, whatever session or process group it has fled to, and remove it."""
        deadline = time.monotonic() + REMOVE_SECONDS
        while any(folder.exists() for folder in self.folders) and time.monotonic() < deadline:
            for folder in self.folders:
                with suppress(OSError):
                    for pid in (folder / "cgroup.procs").read_text().split():
                        with suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)
                    folder.rmdir()
                    continue
                time.sleep(0.01)


def make(memory_mb: int, processes: int) -> Group:
    """A group for a run of at most so much memory (MiB, with what its files take of it) and so many threads.

    One without folders, which limits nothing, where this process may make none.
    """
    name = f"trimtab-{os.getpid()}-{next(_numbers)}"
    made: list[Path] = []
    try:
        for place in places():
            made.append(place.make(name, memory_mb * MIB, processes))
    except OSError:  # too many groups, or none allowed any more: the watcher goes on
        Group(tuple(made)).remove()
        return Group()
    return Group(tuple(made), tuple(f / p.events for f, p in zip(made, places(), strict=True) if p.events))


@cache
def places() -> tuple[Place, ...]:
    """Where groups can be made that limit memory and number together; tried, not guessed. Empty if nowhere."""
    for candidate in (_unified(), _separate()):
        made: list[Path] = []
        try:
            for place in candidate:
                _sweep(place.parent)
                made.append(place.make(f"trimtab-{os.getpid()}-probe", 64 * MIB, 8))
            entered = _enters(made)
        except OSError:
            entered = False
        Group(tuple(made)).remove()
        if candidate and entered:
            return candidate
    return ()


def _enters(folders: list[Path]) -> bool:
    command = [*Group(tuple(folders)).enter(), "true"]
    return bool(folders) and subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def _sweep(parent: Path) -> None:
    """Remove the groups that killed processes have left."""
    for folder in parent.glob("trimtab-*"):
        pid = folder.name.split("-")[1]
        if not os.path.exists(f"/proc/{pid}"):
            Group((folder,)).remove()


def _unified() -> tuple[Place, ...]:
    own = _own("")
    if own is None or own == _mounts().get(""):
        return ()
    try:
        controllers = (own.parent / "cgroup.subtree_control").read_text().split()
    except OSError:
        return ()
    if not {"memory", "pids"} <= set(controllers):
        return ()
    return (Place(own.parent, _UNIFIED, "memory.events"),)


def _separate() -> tuple[Place, ...]:
    memory, pids = _own("memory"), _own("pids")
    if memory is None or pids is None:
        return ()
    return Place(memory, _MEMORY, "memory.oom_control"), Place(pids, _PIDS)


def _own(controller: str) -> Path | None:
    """The folder of this process's own group: of a controller of version 1, or "" for version 2."""
    mount = _mounts().get(controller)
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if mount and controller in controllers.split(","):
            return mount / path.lstrip("/")
    return None


def _mounts() -> dict[str, Path]:
    """Where each controller of version 1 is mounted, and "", which is version 2."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mounted, _, of = line.partition(" - ")
        kind, _, options = of.split(" ", 2)
        point = Path(mounted.split()[4])
        if kind == "cgroup2":
            found[""] = point
        elif kind == "cgroup":
            found |= dict.fromkeys(options.split(","), point)
    return found
