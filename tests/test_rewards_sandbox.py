import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.rewards import sandbox
from trimtab.rewards.isolation import cgroups
from trimtab.rewards.sandbox import MECHANISMS, Limits, Mechanism, Result, isolation, mechanism, scratch, works

LIMITS = Limits(wall_seconds=20.0)


@pytest.fixture(params=MECHANISMS, ids=lambda candidate: candidate.name.split()[0])
def within(request) -> Mechanism:
    if not works(request.param):
        pytest.skip(f"{request.param.name} does not work here; this machine has {isolation()}")
    return request.param


@pytest.fixture
def enclosed(within) -> Mechanism:
    if not within.namespaces:
        pytest.skip(f"{within.name}: {within.statement}")
    return within


@pytest.fixture
def marker() -> str:
    """An argument by which the processes of a test are found."""
    return f"marker-{uuid.uuid4().hex}"


def python(code: str, within: Mechanism, *arguments: str, limits: Limits = LIMITS, stdin: str = "") -> Result:
    async def play() -> Result:
        async with scratch() as folder:
            argv = [sys.executable, "-c", code, *arguments]
            return await sandbox.run(argv, folder=folder, stdin=stdin, limits=limits, within=within)

    return asyncio.run(play())


def marked(marker: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def gone(marker: str) -> bool:
    """Whether the marked processes end within 5 seconds: a namespace is taken down after its first process."""
    deadline = time.monotonic() + 5
    while marked(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not marked(marker)


def test_the_isolation_of_this_machine_is_stated_and_is_the_strongest_that_works():
    assert isolation().startswith(f"{mechanism().name}: {mechanism().statement}")
    assert ("control group" in isolation()) == bool(cgroups.places())
    assert mechanism() is next(candidate for candidate in MECHANISMS if works(candidate))


def test_a_program_reads_its_input_writes_to_its_folder_and_reports_how_it_ended(within):
    code = (
        "import sys; open('out', 'w').write(input()); print(open('out').read()); print('no', file=sys.stderr); exit(7)"
    )
    assert python(code, within, stdin="yes\n") == Result(7, "yes\n", "no\n")


def test_what_the_program_leaves_in_its_folder_stays_until_the_folder_goes(within):
    async def play():
        async with scratch() as folder:
            await sandbox.run(["sh", "-c", "echo 1 > kept"], folder=folder, within=within)
            assert (folder / "kept").read_text() == "1\n"
        return folder

    assert not asyncio.run(play()).exists()


def test_libraries_and_subprocesses_work_inside(within):
    code = "import numpy, subprocess; subprocess.run(['echo', str(numpy.arange(3).sum())])"
    assert python(code, within).stdout == "3\n"


def test_a_program_that_does_not_read_its_input_ends_all_the_same(within):
    assert python("print(1)", within, stdin="x" * 10**6) == Result(0, "1\n", "")


def test_bytes_and_surrogates_that_are_no_text_do_no_harm(within):
    code = "import sys; sys.stdout.buffer.write(b'\\xff' + sys.stdin.buffer.read())"
    assert python(code, within, stdin="a\ud800").stdout == "\ufffda?"


def test_the_environment_of_the_parent_is_not_passed_on(within, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret-value")
    code = """
import os
print(dict(os.environ))
for pid in {1, os.getppid()} if os.getpid() < 100 else ():  # in a namespace, the programs that enclose this one
    try:
        print(open(f"/proc/{pid}/environ").read())
    except PermissionError:
        pass
"""
    result = python(code, within)
    assert result.returncode == 0 and "secret-value" not in result.stdout


def test_no_network_is_reached_not_even_the_own_machine(enclosed):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"\0trimtab-{uuid.uuid4().hex}"
        abstract.bind(name)
        abstract.listen()
        code = """
import socket, sys
port, name = int(sys.argv[1]), "\\0" + sys.argv[2]
for address in (("127.0.0.1", port), ("192.0.2.1", 53), name):
    try:
        socket.socket(socket.AF_UNIX if address == name else socket.AF_INET).connect(address)
        print("connected to", address)
    except OSError:
        print("refused")
"""
        result = python(code, enclosed, str(server.getsockname()[1]), name[1:])
    assert result.stdout.split() == ["refused"] * 3


def test_other_files_cannot_be_read(enclosed, tmp_path):
    (tmp_path / "secret").write_text("secret-value")
    code = """
import os, sys
home, *paths = sys.argv[1:]
print([entry.name for entry in os.scandir(home) if entry.is_file()] if os.path.isdir(home) else [])
for path in paths:
    try:
        print(open(path).read())
    except OSError as error:
        print(type(error).__name__)
"""
    result = python(code, enclosed, str(Path.home()), str(tmp_path / "secret"), __file__, "/etc/shadow")
    assert result.stdout.split() == ["[]"] + ["FileNotFoundError"] * 3


def test_nothing_outside_the_folder_can_be_written(enclosed, tmp_path):
    targets = [*map(str, (tmp_path, Path.home(), sys.prefix, sys.base_prefix)), "/", "/usr", "/usr/bin", "/tmp", "/dev"]
    targets += ["/etc", "/proc", "/proc/sys/kernel", "/old"]
    kernel = ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/kernel/hostname"]
    code = """
import os, sys
for path in sys.argv[1:]:
    for target, flags in ((path, os.O_WRONLY), (path + "/planted", os.O_WRONLY | os.O_CREAT)):
        try:
            os.close(os.open(target, flags))
            print("wrote", target)
        except OSError:
            pass
print("end")
"""
    assert python(code, enclosed, *targets, *kernel).stdout == "end\n"


def test_the_program_has_no_rights_over_the_system(enclosed):
    lines = python("print(open('/proc/self/status').read())", enclosed).stdout.splitlines()
    rights = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert (int(rights["CapEff"], 16), int(rights["CapBnd"], 16), rights["NoNewPrivs"]) == (0, 0, "1")


def test_a_fork_bomb_is_stopped(within, marker):
    bomb = "import os, time\nfor _ in range(9): os.fork()\ntime.sleep(60)"  # 512 processes: enough, and no more
    result = python(bomb, within, marker, limits=replace(LIMITS, processes=32))
    assert result.exceeded == "processes" or "BlockingIOError" in result.stderr
    assert gone(marker)


@pytest.mark.parametrize("files", [1, 40])
def test_the_disk_cannot_be_filled_by_one_file_or_by_many(within, files):
    code = """
import sys, time
for name in range(int(sys.argv[1])):
    with open(f"{name}", "wb") as file:
        for _ in range(80 // int(sys.argv[1])):
            file.write(bytes(2**20))
time.sleep(60)
"""
    result = python(code, within, str(files), limits=replace(LIMITS, file_mb=16))
    assert "File too large" in result.stderr if files == 1 else result.exceeded == "file_mb"


def test_files_without_content_are_counted_too():
    code = "import time\nfor name in range(12_000): open(f'{name}', 'w').close()\ntime.sleep(60)"
    assert python(code, mechanism()).exceeded == "file_mb"


def test_endless_output_is_cut_off(within):
    result = python("while True: print('x' * 1000)", within, limits=replace(LIMITS, output_bytes=10_000))
    assert (result.truncated, len(result.stdout), result.returncode) == (True, 10_000, 128 + signal.SIGKILL)


def test_one_process_gets_no_more_memory_than_the_limit(within):
    result = python("bytearray(600 * 2**20)", within, limits=replace(LIMITS, memory_mb=512))
    assert "MemoryError" in result.stderr and result.returncode == 1


def test_processes_together_get_no_more_memory_than_the_limit(within, marker):
    code = "import os, time\nfor _ in range(3): os.fork()\nheld = bytearray(b'x') * (50 * 2**20)\ntime.sleep(60)"
    result = python(code, within, marker, limits=replace(LIMITS, memory_mb=200))
    assert result.exceeded == "memory_mb" and gone(marker)


def test_sleeping_for_ever_ends_at_the_time_limit(within):
    start = time.monotonic()
    result = python(
        "import time\nprint('begun', flush=True)\ntime.sleep(1000)", within, limits=Limits(wall_seconds=1.5)
    )
    assert result.timed_out and result.stdout == "begun\n"
    assert time.monotonic() - start < 10


def test_computing_for_ever_ends_at_the_limit_of_cpu_time(within):
    result = python("while True: pass", within, limits=replace(LIMITS, cpu_seconds=1))
    assert (result.returncode, result.exceeded) == (128 + signal.SIGXCPU, "")


def test_signals_do_not_reach_the_parent_or_anything_else_outside(enclosed):
    victim = subprocess.Popen(["sleep", "60"])
    code = """
import os, signal, sys
for pid in map(int, sys.argv[1:]):
    try:
        os.kill(pid, 0)
        print("reached", pid)
    except OSError:
        print("nobody")
os.kill(-1, signal.SIGKILL)
"""
    try:
        result = python(code, enclosed, str(os.getpid()), str(victim.pid))
        assert result.stdout.split() in (["nobody", "nobody"], [])  # kill(-1) may take the program before its output
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


BACKGROUND = """
import subprocess, sys
child = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)", sys.argv[1]]
subprocess.Popen(child, start_new_session=sys.argv[2] == "session", stdout=None)
"""


def test_a_background_process_is_killed_with_its_group(within, marker):
    start = time.monotonic()
    assert python(BACKGROUND, within, marker, "group").returncode == 0
    assert time.monotonic() - start < 10, "the run waited for the background process"
    assert gone(marker)


def test_a_background_process_that_leaves_its_group_is_killed_too(enclosed, marker):
    assert python(BACKGROUND, enclosed, marker, "session").returncode == 0
    assert gone(marker)


def test_a_cancelled_run_leaves_nothing_behind(within, marker):
    async def play():
        async with scratch() as folder:
            argv = [sys.executable, "-c", "import time; time.sleep(60)", marker]
            task = asyncio.create_task(sandbox.run(argv, folder=folder, within=within))
            while not marked(marker):
                await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return folder

    assert not asyncio.run(play()).exists() and gone(marker)


def test_a_sandbox_dies_with_a_parent_that_is_killed(enclosed, marker, tmp_path):
    code = f"""
import asyncio, sys
from pathlib import Path
from trimtab.rewards import sandbox
within = next(candidate for candidate in sandbox.MECHANISMS if candidate.name == {enclosed.name!r})
argv = [sys.executable, "-c", "import time; open('up', 'w').close(); time.sleep(60)", {marker!r}]
asyncio.run(sandbox.run(argv, folder=Path({str(tmp_path)!r}), within=within))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "up").exists() and marked(marker)
    parent.kill()
    parent.wait()
    assert gone(marker)


def test_a_sandbox_whose_parent_is_gone_before_it_has_begun_does_not_begin(tmp_path):
    """A process cannot be killed with a parent that it no longer has; here, another process stands in its place."""
    within = next(candidate for candidate in MECHANISMS if candidate.name.startswith("namespaces"))
    if not works(within):
        pytest.skip(isolation())
    argv = sandbox.command(["echo", "begun"], tmp_path, LIMITS, within=within)
    assert subprocess.run(argv, capture_output=True, text=True).stdout == "begun\n"
    adopted = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *argv], capture_output=True, text=True)
    assert (adopted.returncode, adopted.stdout) == (1, "")


def test_a_scratch_folder_goes_however_deep_and_locked_it_is():
    async def play():
        async with scratch() as folder:
            deep = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\n"
            subprocess.run([sys.executable, "-c", deep], cwd=folder, check=True)
            (folder / "locked").mkdir()
            (folder / "locked" / "file").touch()
            (folder / "locked").chmod(0)
        return folder

    assert not asyncio.run(play()).exists()


@pytest.mark.parametrize("name", ["cpu_seconds", "memory_mb", "processes", "file_mb", "output_bytes", "wall_seconds"])
def test_a_limit_of_zero_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        Limits(**{name: 0})


@pytest.mark.parametrize("folder", [Path("relative"), Path("/no/such/folder")])
def test_a_folder_that_is_none_is_refused(folder):
    with pytest.raises(ValueError, match=str(folder)):
        sandbox.command(["true"], folder, LIMITS)
