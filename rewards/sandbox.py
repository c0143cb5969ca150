"""A sandbox for code that a model wrote: no network, a read-only system, one writable folder, and limits.

What encloses the code is the strongest that works on the machine: bubblewrap, else namespaces through util-linux, else
nothing but limits. isolation() says which it is and what it leaves open.
"""

import asyncio
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

WATCH_SECONDS = 0.1
"""Time between two looks at the memory, the processes and the folder of a run."""
MAX_ENTRIES = 10_000
"""Files and folders in the folder of a run, at most."""

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/fonts", "/etc/group")
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd")
_SHM = 16 * 2**20

# As root of its own namespaces: build a read-only tree on /sys (which is not needed), move into it, give up all rights.
_ENTER = """
set -e
parent=$1 folder=$2; shift 2
while read -r key value; do
    [ "$key" != PPid: ] || [ "$value" = "$parent" ] || exit 1
done < /proc/self/status
mount -t tmpfs -o size=4m tmpfs /sys
mkdir /sys/sandbox
mount -t tmpfs -o mode=755,size=4m tmpfs /sys/sandbox
cd /sys/sandbox
while [ "$1" != -- ]; do
    case $1 in */*) mkdir -p ".${1%/*}" ;; esac
    if [ -L "$1" ]; then ln -s "$(readlink "$1")" ".$1"
    elif [ -d "$1" ]; then mkdir -p ".$1"; mount --rbind "$1" ".$1"
    else touch ".$1"; mount --bind "$1" ".$1"
    fi
    shift
done
shift
while read -r _ _ _ _ point options _; do
    case $point in
        /sys/sandbox/*) mount -o "remount,bind,ro,nosuid,nodev,${options#r[ow],}" "$(printf %b "$point")" ;;
    esac
done < /proc/self/mountinfo
mkdir -p dev proc ".$folder" old
for device in null zero full random urandom; do touch dev/$device; mount --bind /dev/$device dev/$device; done
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,nosuid,noexec devpts dev/pts
mount -t tmpfs -o nosuid,nodev,size=@SHM@ tmpfs dev/shm
mount -t proc -o ro,nosuid,nodev,noexec proc proc
mount --bind "$folder" ".$folder"
pivot_root . old
umount -l old
mount -o remount,bind,ro,nosuid,nodev /
cd "$folder"
setpriv --no-new-privs --bounding-set=-all --inh-caps=-all --ambient-caps=-all "$@" && exit 0 || exit $?
""".replace("@SHM@", str(_SHM))

_LIMIT = """
import os, resource, sys
cpu, memory, file, processes = map(int, sys.argv[1:5])
resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if processes:
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
os.execvp(sys.argv[5], sys.argv[5:])
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use; beyond it, the run is killed or the system call fails.

    cpu_seconds is of each process. memory_mb (MiB) is the address space of each process and the resident memory of all
    together, where a page that several share counts for each. processes counts those of the run, with their threads
    where the system counts them. file_mb (MiB) is the size of a file and of all files together, of which there may be
    MAX_ENTRIES. output_bytes is of stdout and of stderr, each. What holds for all together is looked at every
    WATCH_SECONDS, so a run can be beyond it for that long.
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


@dataclass(frozen=True, slots=True)
class Mechanism:
    """A way to enclose a program: namespaces tells whether it has its own network, files and processes."""

    name: str
    statement: str
    namespaces: bool
    enclose: Callable[[Sequence[str], Path], list[str]]


def isolation() -> str:
    """What this machine enforces on a sandboxed program, and what it does not, in words."""
    chosen = mechanism()
    return f"{chosen.name}: {chosen.statement}"


@cache
def mechanism() -> Mechanism:
    """The strongest mechanism that works here."""
    return next(candidate for candidate in MECHANISMS if works(candidate))


@cache
def works(candidate: Mechanism) -> bool:
    """Whether a program runs in the mechanism on this machine; tried, not guessed."""
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        argv = candidate.enclose([sys.executable, "-I", "-c", "pass"], Path(folder).resolve())
        try:
            return subprocess.run(argv, capture_output=True, timeout=30).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


def command(argv: Sequence[str], folder: Path, limits: Limits, *, within: Mechanism | None = None) -> list[str]:
    """The command that runs argv with folder as its working directory and only writable place.

    The program sees a fresh environment, the system's programs and libraries, this Python with its packages, and
    folder under its own path. The limits that a watcher enforces are not part of the command: launch has them.

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
    numbers = (math.ceil(limits.cpu_seconds), limits.memory_mb * 2**20, limits.file_mb * 2**20, processes)
    limited = [sys.executable, "-I", "-S", "-c", _LIMIT, *map(str, numbers), *argv]
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
    async with launch(argv, folder=folder, limits=limits, pipes=True, within=within) as process:
        assert process.stdin and process.stdout and process.stderr
        ended = asyncio.create_task(_ended(process))
        readers = {
            asyncio.create_task(_read(process.stdout, stdout, limits.output_bytes)),
            asyncio.create_task(_read(process.stderr, stderr, limits.output_bytes)),
        }
        watcher = asyncio.create_task(watch(process, folder, limits))
        feeder = asyncio.create_task(_feed(process.stdin, stdin.encode(errors="replace")))
        try:
            exceeded = await _first_limit(ended, {*readers, watcher}, limits.wall_seconds)
            kill(process)
            await _ended(process)
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
) -> AsyncIterator[Process]:
    """The program running in the sandbox, with pipes to it or cut off; killed with all its children at the end.

    Pair it with watch, which has the limits on all processes together.
    """
    stream = PIPE if pipes else DEVNULL
    process = await asyncio.create_subprocess_exec(
        *command(argv, folder.resolve(), limits, within=within),
        stdin=stream,
        stdout=stream,
        stderr=stream,
        cwd=folder,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)
        await asyncio.shield(_ended(process))


def kill(process: Process) -> None:
    """Kill a launched program with its group, and with its namespace where it has one."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def watch(process: Process, folder: Path, limits: Limits) -> str:
    """Look at the run until it goes beyond a limit that holds for all its processes together; return the limit."""
    while True:
        processes, memory = _family(process.pid)
        if processes > limits.processes:
            return "processes"
        if memory > limits.memory_mb * 2**20:
            return "memory_mb"
        if not await asyncio.to_thread(_fits, folder, limits.file_mb * 2**20):
            return "file_mb"
        await asyncio.sleep(WATCH_SECONDS)


@asynccontextmanager
async def scratch() -> AsyncIterator[Path]:
    """A new folder for one run or kernel, removed at the end whatever was made of it."""
    folder = Path(tempfile.mkdtemp(prefix="trimtab-")).resolve()
    try:
        yield folder
    finally:
        await asyncio.shield(asyncio.to_thread(_remove, folder))


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


def _family(pid: int) -> tuple[int, int]:
    """Number and resident bytes of a process's descendants; the launched one itself is counted with them."""
    count, pages, queue = 0, 0, [pid]
    while queue:
        current = queue.pop()
        with suppress(OSError, IndexError):  # it ended meanwhile
            pages += int(Path(f"/proc/{current}/statm").read_text().split()[1])
            count += 1
            for task in os.listdir(f"/proc/{current}/task"):
                queue += map(int, Path(f"/proc/{current}/task/{task}/children").read_text().split())
    return count, pages * os.sysconf("SC_PAGE_SIZE")


def _fits(folder: Path, most: int) -> bool:
    """Whether the files of a folder, as far as they can be looked at, take at most so many bytes."""
    size, entries, queue = 0, 0, [str(folder)]
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


def _readable() -> list[str]:
    """What a sandboxed program may read: the system's programs, this Python and its packages."""
    prefixes = (sys.prefix, sys.base_prefix)
    paths = dict.fromkeys([*_SYSTEM, *_SYSTEM_FILES, *prefixes, *map(os.path.realpath, prefixes)])
    return [path for path in paths if os.path.lexists(path) and (path == "/usr" or not path.startswith("/usr"))]


def _bubblewrap(argv: Sequence[str], folder: Path) -> list[str]:
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    for path in _readable():
        options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    options += ["--dev", "/dev", "--size", str(_SHM), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    options += ["--proc", "/proc", "--remount-ro", "/proc", "--bind", str(folder), str(folder)]
    return [shutil.which("bwrap") or "bwrap", *options, "--remount-ro", "/", "--chdir", str(folder), "--", *argv]


def _namespaces(argv: Sequence[str], folder: Path) -> list[str]:
    # a process whose parent died before it asked for the signal gets none: each looks whether its parent is still there
    flags = "--user --map-root-user --mount --pid --fork --kill-child --net --ipc --uts"
    check = f'[ "$PPID" = "$1" ] && shift && exec unshare {flags} sh -c "$0" sh $$ "$@"'
    enter = ["sh", "-c", check, _ENTER, str(os.getpid()), str(folder), *_readable(), "--", *argv]
    return ["setpriv", "--pdeathsig", "KILL", *enter]


def _nothing(argv: Sequence[str], folder: Path) -> list[str]:
    return list(argv)


_ENCLOSED = (
    "no network, no files but the system's, Python's and its own folder, all but the folder read-only, "
    "no sight of other processes, nothing left running"
)
MECHANISMS = (
    Mechanism("bubblewrap", _ENCLOSED, True, _bubblewrap),
    Mechanism("namespaces (util-linux)", _ENCLOSED, True, _namespaces),
    Mechanism(
        "limits only",
        "CPU time, memory, processes, file size, output and time are limited, but the network is open, all files of "
        "this user can be read and changed, its processes can be signalled, and a process that leaves its group "
        "outlives the run; install bubblewrap, or allow user namespaces",
        False,
        _nothing,
    ),
)
"""From the strongest to the weakest, which always works."""
