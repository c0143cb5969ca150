import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.environments.base import Message, Step, ToolCall, VoidEpisode
from trimtab.environments.tools.functions import ToolEnv
from trimtab.environments.tools.interpreter import KERNEL_LIMITS, Interpreter
from trimtab.environments.tools.tool import CALCULATE, call, offered
from trimtab.rewards.sandbox import isolation, mechanism


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def execute(runner):
    """Executes code in one kernel for the whole file."""
    interpreter = Interpreter(executions=100, characters=500)
    yield lambda code: runner.run(interpreter.execute(code))
    runner.run(interpreter.close())


@pytest.fixture
def folders(monkeypatch) -> Iterator[Path]:
    """Where the kernels of a test have their folders."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def running_in(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def no_process_left_in(folder: Path) -> bool:
    """Whether the processes of kernels are gone within 30 seconds: a busy machine takes namespaces down slowly, and one
    that is left would idle for ever."""
    deadline = time.monotonic() + 30
    while running_in(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running_in(folder)


def nothing_left_in(folder: Path) -> bool:
    """Whether processes and files of kernels are gone within 5 seconds each."""
    deadline = time.monotonic() + 5
    while list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return no_process_left_in(folder) and not list(folder.iterdir())


def python(code: str) -> Message:
    return Message("assistant", tool_calls=(ToolCall("python", {"code": code}),))


def test_variables_stay_from_one_execution_to_the_next(execute):
    assert execute("total = 6\ndef double(x): return 2 * x") == "(no output)"
    assert execute("double(total)") == "12"


def test_what_is_printed_and_the_last_value_are_shown_in_their_order(execute):
    assert execute("print('one')\nimport sys; print('two', file=sys.stderr)\n3").split() == ["one", "two", "3"]


def test_a_traceback_is_short_and_ends_with_the_error(execute):
    assert execute("1 / 0").endswith("ZeroDivisionError: division by zero")
    deep = execute("def down(n): return down(n + 1)\ndown(0)")
    assert re.search(r"^\.\.\. \d+ lines \.\.\.$", deep, re.MULTILINE)
    assert deep.endswith("RecursionError: maximum recursion depth exceeded")


def test_syntax_that_is_none_is_an_error_too(execute):
    assert "SyntaxError" in execute("def")


def test_long_output_is_cut_with_a_notice(execute):
    notice = "\n... (output truncated: 734 characters left out) ...\n"
    assert execute("print('x' * 1234)") == "x" * 334 + notice + "x" * 166


def test_asking_the_user_is_an_error_and_not_a_wait(execute):
    assert "StdinNotImplementedError" in execute("input()")


def test_a_shell_command_works_in_the_kernels_folder(execute):
    assert execute("!echo one > file; cat file") == "one"


def test_pictures_are_named(execute):
    assert execute("%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()").startswith(
        "<Fig"
    )


def test_output_of_an_earlier_execution_is_not_shown_as_that_of_a_later_one(execute):
    execute("import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), display('late'))).start()")
    assert execute("time.sleep(0.5)\nprint('now')").splitlines()[-1] == "now"


def test_the_kernel_is_in_the_sandbox(execute):
    if not mechanism().namespaces:
        pytest.skip(isolation())
    assert "OSError" in execute("import socket; socket.create_connection(('192.0.2.1', 53), 1)")
    assert "FileNotFoundError" in execute(f"open({__file__!r})")


@pytest.mark.parametrize(
    ("called", "answer"),
    [
        (ToolCall("calculate", {"code": "1"}), "error: no tool calculate; there are python"),
        (ToolCall("python", {}), "error: python takes code, a string"),
        (ToolCall("python", {"code": 1}), "error: python takes code, a string"),
        (ToolCall("python", {"code": "1", "time": 2}), "error: python takes code, a string"),
    ],
)
def test_a_wrong_call_is_answered_without_a_kernel(called, answer, folders):
    async def play():
        async with Interpreter(executions=1) as interpreter:
            return await call([interpreter], called), list(folders.iterdir())

    assert asyncio.run(play()) == (answer, [])


def test_a_stopped_kernel_says_so_and_the_next_one_starts_afresh(folders):
    limits = replace(KERNEL_LIMITS, wall_seconds=4.0)

    async def play():
        async with Interpreter(executions=4, limits=limits) as interpreter:
            codes = ["kept = 1\nprint('begun')\nimport time; time.sleep(60)", "kept", "import os; os._exit(3)"]
            texts = [await interpreter.execute(code) for code in codes]
            assert nothing_left_in(folders)
            return *texts, await interpreter.execute("while True: display('x' * 1000)"), await interpreter.execute("1")

    late, afresh, gone, flood, over = asyncio.run(play())
    lost = "The kernel was stopped and all variables are lost; the next execution starts a new one."
    assert late == f"begun\nerror: no end after 4 seconds. {lost}"
    assert afresh.endswith("NameError: name 'kept' is not defined")
    assert gone == f"error: the code ended the kernel, or used up its memory. {lost}"
    assert "output truncated" in flood and flood.endswith(f"error: more than {2**20} bytes of output. {lost}")
    assert over == "error: all 4 executions are used up; answer without the tool"


@pytest.mark.parametrize("code", ["print('x' * 10**8)", "while True: print('x' * 10**6)"])
def test_output_in_large_pieces_stops_the_kernel_at_once(code, folders):
    async def play():
        async with Interpreter() as interpreter:
            return await interpreter.execute(code)

    start = time.monotonic()
    # a kernel whose output is not read any more may run out of memory before it is killed
    assert re.search(r"error: .*(more than \d+ bytes|used up its memory)", asyncio.run(play()))
    assert time.monotonic() - start < 20
    assert nothing_left_in(folders)


async def play_and_close(env: ToolEnv, *messages: Message) -> list[Step]:
    try:
        return [await env.step(message) for message in messages]
    finally:
        await env.close()
        await env.close()


def outcome(answer: str):
    return lambda message: {"outcome": float(message.content == answer)}


def test_the_interpreter_is_lent_beside_other_tools_and_runs_its_calls_in_order():
    interpreter = Interpreter()
    env = ToolEnv("?", [interpreter, CALCULATE], outcome("7"))
    calls = [ToolCall("python", {"code": code}) for code in ("import time; time.sleep(0.5); x = 3", "x += 4", "x")]
    calls.append(ToolCall("calculate", {"expression": "3+4"}))
    called, answered = asyncio.run(
        play_and_close(env, Message("assistant", tool_calls=tuple(calls)), Message("assistant", "7"))
    )
    assert [reply.content for reply in called.replies] == ["(no output)", "(no output)", "7", "7"]
    assert answered.done and answered.rewards == {"outcome": 1.0}
    assert "At most 20 executions of 120 seconds" in offered([interpreter])[0]["description"]


def test_many_at_once_leave_no_process_file_or_descriptor_behind(folders):
    async def play(number: int) -> tuple[str, float]:
        env = ToolEnv(f"What is {number} squared?", [Interpreter()], outcome(str(number**2)))
        called, answered = await play_and_close(env, python(f"{number} ** 2"), Message("assistant", str(number**2)))
        return called.replies[0].content, answered.rewards["outcome"]

    async def all_of_them() -> list[tuple[str, float]]:
        return await asyncio.gather(*(play(number) for number in range(3)))

    before = len(os.listdir("/proc/self/fd"))
    assert asyncio.run(all_of_them()) == [("0", 1.0), ("1", 1.0), ("4", 1.0)]
    gc.collect()
    assert nothing_left_in(folders)
    assert len(os.listdir("/proc/self/fd")) <= before


BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "interpreter.py"


def test_the_benchmark_finds_nothing_left_behind(folders):
    if not mechanism().namespaces:
        pytest.skip(isolation())
    argv = [sys.executable, BENCHMARK, "--episodes", "2", "--concurrency", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folders)})
    assert (done.returncode, done.stderr) == (0, "") and "| processes before and after | 0, 0 |" in done.stdout


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_program_that_is_interrupted_or_killed_leaves_no_kernel_behind(signal_number, folders):
    """One that is killed cannot remove its folders; a kernel without namespaces would outlive it."""
    if not mechanism().namespaces:
        pytest.skip(isolation())
    program = subprocess.Popen(
        [sys.executable, BENCHMARK], env={**os.environ, "TMPDIR": str(folders)}, stdout=-1, stderr=-1
    )
    try:
        while len(list(folders.glob("*/trimtab-*"))) < 4:  # it plays one episode before it plays several at a time
            assert program.poll() is None
            time.sleep(0.05)
        program.send_signal(signal_number)
        program.communicate(timeout=120)  # of a busy machine
    finally:
        program.kill()
    assert nothing_left_in(folders) if signal_number == signal.SIGINT else no_process_left_in(folders)


def test_an_execution_that_is_cancelled_takes_its_kernel_with_it(folders):
    async def play():
        interpreter = Interpreter()
        await interpreter.execute("1")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(interpreter.execute("import time; time.sleep(60)"), 0.5)
        assert nothing_left_in(folders)

    asyncio.run(play())


def test_an_interpreter_that_is_dropped_takes_its_kernel_with_it(folders):
    async def play():
        await Interpreter().execute("1")
        gc.collect()
        assert nothing_left_in(folders)

    asyncio.run(play())


def test_a_kernel_that_cannot_start_voids_the_episode(folders):
    limits = replace(KERNEL_LIMITS, memory_mb=40)
    env = ToolEnv("?", [Interpreter(limits=limits)], outcome("1"))
    with pytest.raises(VoidEpisode, match="kernel did not start"):
        asyncio.run(play_and_close(env, python("1")))
    assert nothing_left_in(folders)


def test_a_temporary_folder_with_too_long_a_path_for_sockets_voids_the_episode(folders, monkeypatch):
    long = folders / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    env = ToolEnv("?", [Interpreter()], outcome("1"))
    with pytest.raises(VoidEpisode, match="did not start"):
        asyncio.run(env.step(python("1")))
    assert nothing_left_in(long)


def test_closing_while_code_runs_ends_both(folders):
    async def play():
        interpreter = Interpreter()
        execution = asyncio.create_task(interpreter.execute("import time; open('begun', 'w'); time.sleep(60)"))
        while not list(folders.glob("*/begun")):
            await asyncio.sleep(0.05)
        await interpreter.close()
        assert "The kernel was stopped" in await execution
        assert nothing_left_in(folders)

    asyncio.run(play())


def test_a_closed_interpreter_is_not_used_again():
    async def play():
        interpreter = Interpreter()
        await interpreter.close()
        await interpreter.close()
        await interpreter.execute("1")

    with pytest.raises(ValueError, match="make a new one"):
        asyncio.run(play())


@pytest.mark.parametrize("bad", [{"executions": 0}, {"characters": 0}])
def test_an_interpreter_without_executions_or_characters_is_refused(bad):
    with pytest.raises(ValueError, match="at least 1"):
        Interpreter(**bad)
