"""A code interpreter: a Jupyter kernel in a sandbox, as a tool for the policy."""

import asyncio
import os
import re
import shutil
import signal
import stat
import sys
import weakref
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import zmq
import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.connect import write_connection_file

from trimtab.environments.base import VoidEpisode
from trimtab.environments.tools.tool import shorten
from trimtab.rewards.sandbox import Limits, Running, launch, scratch, watch

KERNEL_LIMITS = Limits(cpu_seconds=3600, memory_mb=2048, file_mb=256, wall_seconds=120.0)
"""Limits of a kernel: wall_seconds and output_bytes are of one execution, the others of the kernel's life."""
START_SECONDS = 120.0
"""Time for a kernel to answer, at most; it takes about a second on a quiet machine."""
MAX_REPLY = 2**20
"""Bytes of a frame of a reply to a request, which nobody reads; beyond it the connection is cut."""
MAX_MESSAGE = 16 * 2**20
"""Bytes of one message of the kernel, at most; a larger one is not read, and the kernel is stopped."""
SOCKETS = 5
"""Of a Jupyter kernel: shell, output, stdin, control, heartbeat."""
TRACEBACK_LINES = 16
"""Lines of a traceback that the policy sees, at most."""

_LOST = "The kernel was stopped and all variables are lost; the next execution starts a new one."
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_OPTIONS = ("--InteractiveShell.xmode=Plain", "--InteractiveShell.colors=NoColor", "--HistoryManager.enabled=False")


class KernelError(VoidEpisode):
    """A kernel did not start: nothing can be said about the code."""


class Interpreter:
    """The tool "python": runs code in a kernel that keeps its variables from call to call.

    The kernel starts with the first execution. Whatever the code does comes back as text: its output, the value of its
    last line, its traceback, or why the kernel was stopped. Use it in `async with`, or await close() at the end.
    """

    name = "python"
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {"code": {"type": "string"}},
        "required": ["code"],
    }

    def __init__(self, *, executions: int = 20, characters: int = 8000, limits: Limits = KERNEL_LIMITS) -> None:
        """executions and the characters of one result are at most so many."""
        if executions < 1 or characters < 1:
            raise ValueError(f"executions and characters must be at least 1, got {executions} and {characters}")
        self._executions = executions
        self._characters = characters
        self._limits = limits
        self._used = 0
        self._kernel: _Kernel | None = None
        self._stack = AsyncExitStack()
        self._one_at_a_time = asyncio.Lock()
        self._closed = False
        self._abandoned: weakref.finalize | None = None

    @property
    def description(self) -> str:
        """What the policy is told about the tool."""
        return (
            "Run Python code in a Jupyter kernel and read what it prints and the value of its last line. Variables "
            f"stay until the kernel is stopped. At most {self._executions} executions of {self._limits.wall_seconds:g} "
            "seconds each; no network."
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """What the code in arguments gives, or "error: ..." when they are something else.

        Raises:
            KernelError: the kernel did not start.
            ValueError: the interpreter is closed.
        """
        code = arguments.get("code")
        if set(arguments) != {"code"} or not isinstance(code, str):
            return "error: python takes code, a string"
        return await self.execute(code)

    async def execute(self, code: str) -> str:
        """Run code and return its text, shortened with a notice where it is long.

        Raises:
            KernelError: the kernel did not start.
            ValueError: the interpreter is closed.
        """
        async with self._one_at_a_time:
            if self._closed:
                raise ValueError("the interpreter is closed: make a new one for each episode")
            if self._used == self._executions:
                return f"error: all {self._executions} executions are used up; answer without the tool"
            self._used += 1
            if self._kernel is None:
                await self._start()
            assert self._kernel is not None
            pieces: list[str] = []
            try:
                stopped = await self._kernel.execute(code, pieces, self._limits)
            except BaseException:  # also when cancelled: a kernel in the middle of something cannot be used again
                await self._stop()
                raise
            text = shorten("".join(pieces).strip("\n"), self._characters)
            if not stopped:
                return text or "(no output)"
            await self._stop()
            return f"{text}\nerror: {stopped}. {_LOST}".lstrip("\n")

    async def close(self) -> None:
        """Kill the kernel and remove its files; may be called again, and while code is running."""
        self._closed = True
        await self._stop()

    async def _start(self) -> None:
        try:
            self._kernel = await self._stack.enter_async_context(_running_kernel(self._limits))
        except (OSError, zmq.ZMQError) as error:
            raise KernelError(f"the kernel did not start: {error}") from error
        if self._closed:
            await self._stop()
            raise ValueError("the interpreter was closed while its kernel started")
        # for an interpreter that is dropped without close()
        self._abandoned = weakref.finalize(self, _abandon, self._kernel.process.pid, self._kernel.folder)

    async def _stop(self) -> None:
        self._kernel = None
        if self._abandoned is not None:
            self._abandoned.detach()
        await self._stack.aclose()


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A kernel that answers.

    over ends when the kernel must not run on, and names the limit, or is empty when the kernel ended; cut ends when the
    connection to its output is cut, which a message beyond MAX_MESSAGE does.
    """

    folder: Path
    process: Process
    client: AsyncKernelClient
    over: asyncio.Task[str]
    cut: asyncio.Future[Any]

    async def execute(self, code: str, pieces: list[str], limits: Limits) -> str:
        """Run code and put its output into pieces; return why the kernel must be stopped, or ""."""
        request = self.client.execute(code, allow_stdin=False, store_history=False)
        output = asyncio.create_task(self._output(request, pieces, limits.output_bytes))
        ends = {output, self.over, self.cut}
        try:
            await asyncio.wait(ends, timeout=limits.wall_seconds, return_when=asyncio.FIRST_COMPLETED)
            if output.done():
                return output.result()
            if self.cut.done():
                await asyncio.wait({self.over}, timeout=0.5)  # the connection ends with the kernel, too
            if self.over.done():
                return _explain("" if self.over.cancelled() else self.over.result(), limits)
            if self.cut.done():
                return f"a piece of output of more than {MAX_MESSAGE} bytes"
            return f"no end after {limits.wall_seconds:g} seconds"
        finally:
            output.cancel()

    async def start(self) -> None:
        """Wait until the kernel answers on all its channels: its first messages are lost until it has subscribed us."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_SECONDS
        while loop.time() < deadline:
            request = self.client.kernel_info()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._output(request, [], 2**20)
                    return
            if self.over.done():
                raise KernelError(f"the kernel ended at its start: {self.over.result() or self.process.returncode}")
        raise KernelError(f"the kernel did not answer in {START_SECONDS:g} s")

    async def _output(self, request: str, pieces: list[str], most: int) -> str:
        """Gather the output of a request until the kernel is idle; return what is wrong with it, or ""."""
        size = 0
        while True:
            try:
                message = await self.client.get_iopub_msg()
                if message["parent_header"].get("msg_id") != request:
                    continue
                kind, content = message["msg_type"], message["content"]
                if kind == "status" and content["execution_state"] == "idle":
                    return ""
                pieces.append(_text(kind, content))
            except Exception:  # the code may write to the kernel's sockets whatever it likes, nested at any depth
                return "the kernel's messages cannot be read"
            size += len(pieces[-1].encode(errors="replace")) + 100  # a message costs time even without text
            if size > most:
                return f"more than {most} bytes of output"


@asynccontextmanager
async def _running_kernel(limits: Limits) -> AsyncIterator[_Kernel]:
    """A kernel in a folder of its own, reached through sockets in that folder; nothing is left of it at the end."""
    async with scratch() as folder:
        file, _ = write_connection_file(
            str(folder / "kernel.json"), transport="ipc", ip=str(folder / "k"), key=os.urandom(32).hex().encode()
        )
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", file, *_OPTIONS]
        async with launch(argv, folder=folder, limits=limits) as running:
            with ExitStack() as stack:
                await _sockets(folder, running.process)
                context = zmq.asyncio.Context()
                stack.callback(context.destroy, linger=0)
                context.RECONNECT_IVL = -1  # connected once, before any code of the policy could replace a socket
                client = AsyncKernelClient(context=context)
                client.load_connection_file(file)
                context.MAXMSGSIZE, context.RCVHWM = MAX_REPLY, 1  # replies are not read: output says it all
                stack.callback(client.shell_channel.stop)  # not stop_channels, which would make and connect others
                context.MAXMSGSIZE, context.RCVHWM = MAX_MESSAGE, 1000
                client.start_channels(stdin=False, hb=False, control=False)
                stack.callback(client.iopub_channel.stop)
                monitor = client.iopub_channel.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
                cut = asyncio.ensure_future(monitor.recv_multipart())
                stack.callback(cut.cancel)
                over = asyncio.create_task(_over(running))
                stack.callback(over.cancel)
                kernel = _Kernel(folder, running.process, client, over, cut)
                await kernel.start()
                yield kernel


async def _over(running: Running) -> str:
    ended, watcher = asyncio.create_task(running.process.wait()), asyncio.create_task(watch(running))
    try:
        await asyncio.wait({ended, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return watcher.result() if watcher.done() else ""
    finally:
        ended.cancel()
        watcher.cancel()


async def _sockets(folder: Path, process: Process) -> None:
    """Wait until the kernel has made its sockets: real ones, since no code has run yet that could put links there.

    Raises:
        KernelError: it ended before, or takes too long.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_SECONDS
    while len(found := [path for path in folder.glob("k-*") if stat.S_ISSOCK(path.lstat().st_mode)]) < SOCKETS:
        if process.returncode is not None:
            raise KernelError(f"the kernel did not start: it ended with code {process.returncode}")
        if loop.time() > deadline:
            raise KernelError(
                f"the kernel did not start: it made {len(found)} of {SOCKETS} sockets in {START_SECONDS:g} s"
            )
        await asyncio.sleep(0.02)


def _abandon(pid: int, folder: Path) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _explain(exceeded: str, limits: Limits) -> str:
    match exceeded:
        case "memory_mb":
            return f"more than {limits.memory_mb} MiB of memory"
        case "processes":
            return f"more than {limits.processes} processes"
        case "file_mb":
            return f"more than {limits.file_mb} MiB of files"
    return "the code ended the kernel, or used up its memory"


def _text(kind: str, content: Mapping[str, Any]) -> str:
    """What a message of the kernel shows to the policy; pictures and other media by their textual stand-ins."""
    match kind:
        case "stream":
            return str(content["text"]).replace("\r\n", "\n")  # a terminal's line ends, of a command after "!"
        case "execute_result" | "display_data":
            return f"\n{content['data'].get('text/plain', '(no textual form)')}\n"
        case "error":
            return f"\n{_shorten_traceback(_COLOURS.sub('', chr(10).join(content['traceback'])))}\n"
    return ""


def _shorten_traceback(text: str) -> str:
    """The first line and the last ones, which name the error."""
    lines = text.splitlines()
    left_out = len(lines) - TRACEBACK_LINES
    return text if left_out <= 0 else "\n".join([lines[0], f"... {left_out} lines ...", *lines[left_out + 1 :]])
