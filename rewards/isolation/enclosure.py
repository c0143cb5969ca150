"""What encloses a program: bubblewrap, namespaces through util-linux, or nothing."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, slots=True)
class Mechanism:
    """A way to enclose a program: namespaces tells whether it has its own network, files and processes."""

    name: str
    statement: str
    namespaces: bool
    enclose: Callable[[Sequence[str], Path], list[str]]


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
    "no sight of other processes, no further namespaces, mounts or keyrings, nothing left running"
)
MECHANISMS = (
    Mechanism("bubblewrap", _ENCLOSED, True, _bubblewrap),
    Mechanism("namespaces (util-linux)", _ENCLOSED, True, _namespaces),
    Mechanism(
        "limits only",
        "CPU time, memory, processes, file size, output and time are limited, and sockets but those of files are "
        "closed, but all files of this user can be read and changed, its processes can be signalled, and a process "
        "that leaves its group outlives the run; install bubblewrap, or allow user namespaces",
        False,
        _nothing,
    ),
)
"""From the strongest to the weakest, which always works."""
