"""A sandbox for code that a model wrote: no network, a read-only system, one writable folder, and limits.

What encloses the code is the strongest that works on the machine: bubblewrap, else namespaces through util-linux, else
nothing but limits. isolation() says which it is and what it leaves open.
"""

import asyncio
import math
import os
import signal
import subprocess
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path

from trimtab.rewards.isolation import cgroups, seccomp
from trimtab.rewards.isolation.enclosure import MECHANISMS, Mechanism
from trimtab.rewards.isolation.usage import family_of, fits
from trimtab.rewards.threads import Threads

WATCH_SECONDS = 0.1
"""Time between two looks at the memory, the processes and the folder of a run."""
PROBES = 3
"""Tries of a mechanism before it counts as not working: one that a busy machine spoils demotes nobody."""
WATCH = Threads("the sandbox's watch", 256)
ENCLOSING = 16
"""Threads that a control group leaves to what encloses a run and starts it."""

_LIMIT = (
    seccomp.LOADER
    + """
import os, resource, select, sys
cpu, memory, file, processes, lifeline = map(int, sys.argv[1:6])
if lifeline >= 0:  # bubblewrap gets no signal if we died before it asked for one
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):
        sys.exit(1)
    os.close(lifeline)
resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if processes:
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
load(sys.argv[6])
os.execvp(sys.argv[7], sys.argv[7:])
"""
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use; beyond it, the run is killed or the system call fails.

    cpu_seconds is of each process. memory_mb (MiB) is the address space of each process and the resident memory of all
    together, where a page that several share counts for each. processes counts those of the run, each thread as one.
    file_mb (MiB) is the size of a file and of all files together, of which there may be MAX_ENTRIES; those that have no
    name any more and are held open count. output_bytes is of stdout and of stderr, each. What holds for all together is
    looked at every WATCH_SECONDS, so a run can be beyond it for that long; where this process may make control groups
    (isolation() says so), never beyond ENCLOSING threads more, and memory_mb and file_mb together.
    """

    cpu_seconds: int = 10
    memory_mb: int = 1024
    processes: int = 64
    file_mb: int = 64
    output_bytes: int = 2**20
    wall_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"limit {field.name} must be above 0, got {getattr(self, field.name)}")


CONTROL_GROUPS = "; each run in a control group of its own, which bounds its memory and processes and ends what is left"


@dataclass(frozen=True, slots=True)
class Running:
    """A launched program, which may write to folder alone, its limits and its control group."""

    process: Process
    folder: Path
    limits: Limits
    group: cgroups.Group

    def kill(self) -> None:
        """Kill the program with its group, and with its namespace where it has one."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended. returncode is 128 + the signal where one ended it; exceeded names the limit that the run was
    killed for, or is empty (a limit that makes a system call fail is not named).
    """

    returncode: int
    stdout: str
    stderr: str
    exceeded: str = ""

    @property
    def timed_out(self) -> bool:
        """Whether the run was killed for wall_seconds."""
        return self.exceeded == "wall_seconds"

    @property
    def truncated(self) -> bool:
        """Whether the run was killed for output_bytes; the texts hold that much and no more."""
        return self.exceeded == "output_bytes"


def isolation() -> str:
    """What this machine enforces on a sandboxed program, and what it does not, in words."""
    try:
        chosen = mechanism()
    except SandboxError as error:
        return f"none: {error}"
    return f"{chosen.name}: {chosen.statement}{CONTROL_GROUPS if cgroups.places() else ''}"


class SandboxError(RuntimeError):
    """Nothing on this machine encloses code, and nobody has said that limits alone will do."""


_limits_will_do = False


def accept_limits_only(accept: bool = True) -> None:
    """Say whether code may run with limits alone where nothing encloses it; what that leaves open, isolation() says."""
    global _limits_will_do
    _limits_will_do = accept


def mechanism() -> Mechanism:
    """The strongest mechanism that works here.

    Raises:
        SandboxError: nothing encloses code here, and limits alone were not accepted.
    """
    found = next(candidate for candidate in MECHANISMS if candidate is MECHANISMS[-1] or works(candidate))
    if not found.namespaces and not _limits_will_do:
        raise SandboxError(
            "nothing encloses the code of a model on this machine: install bubblewrap or allow user namespaces; to run "
            f"it with limits alone, say so with --sandbox limits ({found.statement})"
        )
    return found


@cache
def works(candidate: Mechanism) -> bool:
    """Whether a program runs in the mechanism on this machine; tried, not guessed, and tried again if it fails."""
    return any(_runs(candidate) for _ in range(PROBES))


def _runs(candidate: Mechanism) -> bool:
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        try:
            argv = command([sys.executable, "-I", "-c", "pass"], Path(folder).resolve(), Limits(), within=candidate)
            return subprocess.run(argv, capture_output=True, timeout=30).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


def command(
    argv: Sequence[str], folder: Path, limits: Limits, *, within: Mechanism | None = None, lifeline: int = -1
) -> list[str]:
    """The command that runs argv with folder as its working directory and only writable place.

    The program sees a fresh environment, the system's programs and libraries, this Python with its packages, and
    folder under its own path. The limits that a watcher enforces are not part of the command: launch has them.

    Args:
        lifeline: descriptor of a pipe whose other end this process alone holds: if that is closed when the program
            would start, it does not.

    Raises:
        ValueError: folder is not an absolute path of a directory.
    """
    if not (folder.is_absolute() and folder.is_dir()):
        raise ValueError(f"a sandbox needs the absolute path of an existing folder, got {str(folder)!r}")
    within = within or mechanism()
    paths = [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    environment = {"PATH": ":".join(paths), "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8"}
    # threads and malloc's arenas are address space, which is limited
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    # outside a namespace the system counts all processes of the user, not those of the run
    processes = limits.processes if within.namespaces else 0
    numbers = (math.ceil(limits.cpu_seconds), limits.memory_mb * 2**20, limits.file_mb * 2**20, processes, lifeline)
    filter_ = seccomp.program(network=within.namespaces)
    limited = [sys.executable, "-I", "-S", "-c", _LIMIT, *map(str, numbers), filter_, *argv]
    # outermost, because the environment of the enclosing program can be read from within
    return ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), *within.enclose(limited, folder)]


async def run(
    argv: Sequence[str],
    *,
    folder: Path,
    stdin: str = "",
    limits: Limits = Limits(),
    within: Mechanism | None = None,
) -> Result:
    """Run a program to its end or to a limit; nothing is left running, but for what isolation() says of limits alone.

    Raises:
        ValueError: folder is not a directory.
    """
    stdout, stderr = bytearray(), bytearray()
    async with launch(argv, folder=folder, limits=limits, pipes=True, within=within) as running:
        process = running.process
        assert process.stdin and process.stdout and process.stderr
        ended = asyncio.create_task(_ended(process))
        readers = {
            asyncio.create_task(_read(process.stdout, stdout, limits.output_bytes)),
            asyncio.create_task(_read(process.stderr, stderr, limits.output_bytes)),
        }
        watcher = asyncio.create_task(watch(running))
        feeder = asyncio.create_task(_feed(process.stdin, stdin.encode(errors="replace")))
        try:
            exceeded = await _first_limit(ended, {*readers, watcher}, limits.wall_seconds)
            running.kill()
            await _ended(process)
            exceeded = exceeded or _out_of_memory(running)
            await asyncio.wait(readers, timeout=1.0)  # a process that left its group may hold the pipes open
        finally:
            for task in (ended, *readers, watcher, feeder):
                task.cancel()
    code = process.returncode
    assert code is not None
    out, err = (bytes(output[: limits.output_bytes]).decode(errors="replace") for output in (stdout, stderr))
    return Result(128 - code if code < 0 else code, out, err, exceeded)


@asynccontextmanager
async def launch(
    argv: Sequence[str], *, folder: Path, limits: Limits, pipes: bool = False, within: Mechanism | None = None
) -> AsyncIterator[Running]:
    """The program running in the sandbox, with pipes to it or cut off; killed with all its children at the end.

    Pair it with watch, which has the limits on all processes together.
    """
    stream = PIPE if pipes else DEVNULL
    lifeline, ours = os.pipe()
    group = cgroups.make(limits.memory_mb + limits.file_mb, limits.processes + ENCLOSING)
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                *group.enter(),
                *command(argv, folder.resolve(), limits, within=within, lifeline=lifeline),
                stdin=stream,
                stdout=stream,
                stderr=stream,
                cwd=folder,
                start_new_session=True,
                pass_fds=(lifeline,),
            )
        finally:
            os.close(lifeline)
        running = Running(process, folder, limits, group)
        try:
            yield running
        finally:
            running.kill()
            await asyncio.shield(_ended(process))
    finally:
        os.close(ours)
        if group.folders:
            await asyncio.shield(WATCH.run(group.remove))


async def watch(running: Running) -> str:
    """Look at the run until it goes beyond a limit that holds for all its processes together; return the limit."""
    folder, limits = running.folder, running.limits
    while True:
        if exceeded := _out_of_memory(running):
            return exceeded
        family = family_of(running.process.pid)
        if family.threads > limits.processes:
            return "processes"
        if family.memory > limits.memory_mb * 2**20:
            return "memory_mb"
        if not await WATCH.run(partial(fits, folder, limits.file_mb * 2**20 - family.unlinked)):
            return "file_mb"
        await asyncio.sleep(WATCH_SECONDS)


def _out_of_memory(running: Running) -> str:
    return "memory_mb" if running.group.out_of_memory() else ""


@asynccontextmanager
async def scratch() -> AsyncIterator[Path]:
    """A new folder for one run or kernel, removed at the end whatever was made of it."""
    folder = Path(tempfile.mkdtemp(prefix="trimtab-")).resolve()
    try:
        yield folder
    finally:
        await asyncio.shield(WATCH.run(partial(_remove, folder)))


def _remove(folder: Path) -> None:
    """Remove folders of any depth and mode, which shutil.rmtree does not."""
    subprocess.run(["rm", "-rf", "--", str(folder)], capture_output=True)
    if folder.exists():
        subprocess.run(["chmod", "-R", "u+rwx", "--", str(folder)], capture_output=True)
        subprocess.run(["rm", "-rf", "--", str(folder)], capture_output=True, check=True)


async def _first_limit(ended: asyncio.Task[str], watchers: set[asyncio.Task[str]], seconds: float) -> str:
    """The name of the first limit that is exceeded, or "" when the program ends before."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    pending = {ended, *watchers}
    while True:
        left = deadline - loop.time()
        done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return "wall_seconds"
        exceeded = next((name for name in (task.result() for task in done) if name), "")
        if exceeded or ended in done:
            return exceeded


async def _ended(process: Process) -> str:
    while process.returncode is None:  # Process.wait also waits for the pipes, which a background process may hold
        await asyncio.sleep(0.02)
    return ""


async def _read(stream: asyncio.StreamReader, into: bytearray, most: int) -> str:
    while chunk := await stream.read(65536):
        into += chunk
        if len(into) > most:
            return "output_bytes"
    return ""


async def _feed(stream: asyncio.StreamWriter, data: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # the program need not read its input
        stream.write(data)
        await stream.drain()
        stream.close()
