"""What code in the sandbox cannot do, in every mechanism of this machine, and what becomes of its leavings."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import uuid

import pytest
from attacks import ATTACKS, CALL, Attack

from trimtab.environments.tools import interpreter as interpreter_module
from trimtab.environments.tools.functions import tool
from trimtab.environments.tools.interpreter import Interpreter
from trimtab.environments.tools.tool import shorten
from trimtab.rewards import bounds, sandbox
from trimtab.rewards.code import CallTest, call_score
from trimtab.rewards.isolation import cgroups, seccomp
from trimtab.rewards.isolation.usage import Family
from trimtab.rewards.sandbox import MECHANISMS, Limits, Mechanism, SandboxError, mechanism, scratch, works

LIMITS = Limits(cpu_seconds=20, memory_mb=128, processes=32, file_mb=8, output_bytes=2**20, wall_seconds=5.0)


@pytest.fixture(params=MECHANISMS, ids=lambda candidate: candidate.name.split()[0])
def within(request) -> Mechanism:
    if not works(request.param):
        pytest.skip(f"{request.param.name} does not work here")
    return request.param


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_an_attack_does_not_get_through(attack: Attack, within, tmp_path, monkeypatch):
    if attack.enclosed and not within.namespaces:
        pytest.skip(f"{within.name} does not claim to withstand it")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"trimtab-{uuid.uuid4().hex}"
        abstract.bind(f"\0{name}")
        abstract.listen()

        async def play() -> sandbox.Result:
            async with scratch() as folder:
                words = [str(secret), str(server.getsockname()[1]), name, str(os.getpid())]
                argv = [sys.executable, "-I", "-c", CALL + attack.code, *words]
                return await sandbox.run(argv, folder=folder, limits=LIMITS, within=within)

        result = asyncio.run(play())
    assert "THROUGH" not in result.stdout, result
    assert "SyntaxError" not in result.stderr and "NameError" not in result.stderr, result.stderr
    if attack.name == "a process that outlives the run":
        time.sleep(4)
        assert not secret.with_suffix(".left").exists()


def test_outside_of_the_sandbox_attacks_get_through(tmp_path):
    """So the tests above can fail."""
    names = (
        "a further user namespace",
        "420 MiB in a memfd",
        "netfilter's netlink",
        "400 threads",
        "200 MiB of memory",
    )

    for attack in (attack for attack in ATTACKS if attack.name in names):
        done = subprocess.run(
            [sys.executable, "-I", "-c", CALL + attack.code], capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
        assert "THROUGH" in done.stdout, (attack.name, done)


def test_without_anything_that_encloses_code_is_refused_unless_limits_were_accepted(monkeypatch):
    monkeypatch.setattr(sandbox, "works", lambda candidate: not candidate.namespaces)
    assert mechanism().name == "limits only", "the tests accept it"
    sandbox.accept_limits_only(False)
    try:
        with pytest.raises(SandboxError, match=r"install bubblewrap or allow user namespaces; .* --sandbox limits"):
            mechanism()
        assert sandbox.isolation().startswith("none: nothing encloses")

        async def play() -> None:
            async with Interpreter() as interpreter:
                await interpreter.execute("1")

        with pytest.raises(SandboxError):
            asyncio.run(play())
        with pytest.raises(Exception, match="--sandbox limits"):
            asyncio.run(call_score("def f(): return 1", "f", [CallTest((), 1)]))
    finally:
        sandbox.accept_limits_only()


needs_groups = pytest.mark.skipif(not cgroups.places(), reason="this process may make no control groups here")
BURST = "import os, time\nfor _ in range(3): os.fork()\nx = bytearray(40 * 2**20)\ntime.sleep(2)\nprint('THROUGH')"
BOMB = """
import os, time
count = 0
while count < 400:
    try:
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        count += 1
    except OSError:
        break
print(count)
"""


@needs_groups
def test_a_control_group_bounds_what_is_between_two_looks_of_the_watcher(monkeypatch, within):
    monkeypatch.setattr(sandbox, "family_of", lambda pid: Family(0, 0, 0))  # the watcher never sees it
    assert asyncio.run(_run(BURST, within)).exceeded == "memory_mb"
    # outside of a namespace nothing else counts the processes of a run
    assert int(asyncio.run(_run(BOMB, within)).stdout.split()[0]) <= LIMITS.processes + sandbox.ENCLOSING


@needs_groups
def test_a_control_group_ends_what_left_its_session_and_leaves_nothing(within, tmp_path):
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)"
    before = _groups()
    began = time.monotonic()
    asyncio.run(_run(code, within))
    assert time.monotonic() - began < 30
    assert _groups() == before


@needs_groups
def test_groups_that_a_killed_process_left_are_removed():
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    place = cgroups.places()[0]
    left = place.make(f"trimtab-{int(gone.stdout)}-0", 2**26, 8)
    cgroups.places.cache_clear()
    assert cgroups.places() and not left.exists()


def test_without_control_groups_a_run_is_limited_by_the_watcher(monkeypatch, within):
    monkeypatch.setattr(cgroups, "places", lambda: ())
    assert cgroups.make(64, 8).enter() == []
    assert asyncio.run(_run(BURST, within)).exceeded == "memory_mb"
    assert "control group" not in sandbox.isolation()


async def _run(code: str, within: Mechanism) -> sandbox.Result:
    async with scratch() as folder:
        return await sandbox.run([sys.executable, "-I", "-c", code], folder=folder, limits=LIMITS, within=within)


def _groups() -> set[str]:
    return {folder.name for place in cgroups.places() for folder in place.parent.glob(f"trimtab-{os.getpid()}-*")}


def test_one_probe_that_fails_demotes_no_mechanism(monkeypatch):
    tried = []

    def once(argv, **options):
        tried.append(argv)
        if len(tried) == 1:
            raise sandbox.subprocess.TimeoutExpired(argv, 30)
        return sandbox.subprocess.CompletedProcess(argv, 0)

    monkeypatch.setattr(sandbox.subprocess, "run", once)
    assert sandbox.works.__wrapped__(MECHANISMS[0]) and len(tried) == 2


def test_a_machine_without_a_table_has_no_filter_and_says_so(monkeypatch):
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="no seccomp filter for riscv64; there are x86_64, aarch64"):
        seccomp.program(network=True)


# ---- leavings


def test_a_program_with_1500_nested_folders_is_scored_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    code = "import os\ndef f():\n    for _ in range(1500):\n        os.mkdir('d'); os.chdir('d')\n    return 1"
    assert asyncio.run(call_score(code, "f", [CallTest((), 1)])).checks
    assert os.listdir(tmp_path) == []


def kernel(*codes: str) -> list[str]:
    async def play() -> list[str]:
        async with Interpreter() as interpreter:
            return [await interpreter.execute(code) for code in codes]

    return asyncio.run(play())


def test_a_message_of_the_kernel_nested_200000_deep_is_an_error_text():
    forged = """
import json
from ipykernel.kernelapp import IPKernelApp
kernel = IPKernelApp.instance().kernel
parent = kernel.get_parent()
parts = kernel.session.serialize(kernel.session.msg("stream", content={}, parent=parent), ident=b"stream")
parts[-1] = b"[" * 200000 + b"]" * 200000
at = parts.index(b"<IDS|MSG>")
parts[at + 1] = kernel.session.sign(parts[at + 2 : at + 6])
kernel.iopub_socket.send_multipart(parts)
"""
    (text, after) = kernel(forged, "1 + 1")
    assert "cannot be read" in text and after == "2"


def test_replies_that_nobody_asked_for_do_not_grow_the_trainer():
    flood = """
from ipykernel.kernelapp import IPKernelApp
kernel = IPKernelApp.instance().kernel
ident, *_ = kernel._parent_ident["shell"] if isinstance(kernel._parent_ident, dict) else kernel._parent_ident
for _ in range(25):
    kernel.session.send(kernel.shell_stream, "execute_reply", {"x": "y" * 12_000_000}, ident=ident)
"""
    before = _resident()
    texts = kernel(flood, "import time; time.sleep(1)", "3")
    assert _resident() - before < 64 * 2**20, texts


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_sockets_of_the_kernel_that_become_links_lead_nowhere(tmp_path):
    """The trainer is connected once; links in the place of sockets would lead it to any socket of this machine."""
    path = str(tmp_path / "outside")
    with socket.socket(socket.AF_UNIX) as outside:
        outside.bind(path)
        outside.listen()
        outside.settimeout(2.0)
        replace = f"""
import os
for name in [name for name in os.listdir() if name.startswith("k-")]:
    os.remove(name)
    os.symlink({path!r}, name)
os._exit(0)
"""
        kernel(replace, "1")
        with pytest.raises(TimeoutError):
            outside.accept()


def test_output_over_its_limit_keeps_its_beginning_and_the_error_at_its_end():
    (text,) = kernel("print('begin'); print('x' * 50_000); raise KeyError('the error')")
    assert text.startswith("begin") and text.endswith("KeyError: 'the error'") and "left out" in text
    assert len(text) < 8_200


def test_results_of_functions_are_shortened_too_and_counted():
    def long() -> str:
        "Says much."
        return "a" * 30_000 + "end"

    before = bounds.counts().get("tool_output", 0)
    text = asyncio.run(tool(long, characters=300).call({}))
    assert len(text) < 400 and text.endswith("end") and bounds.counts()["tool_output"] == before + 1
    assert shorten("abc", 3) == "abc" and json.dumps(shorten("abcdefgh", 3))
    assert interpreter_module.MAX_REPLY < interpreter_module.MAX_MESSAGE
