"""What a run has done survives kills, full disks, damage and second processes."""

import fcntl
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trimtab.environments.base import Message
from trimtab.environments.files import read_rows
from trimtab.environments.json_lines import json_line, read_json_lines
from trimtab.grpo.commands.cli import theirs
from trimtab.grpo.commands.demonstrations import load_episodes
from trimtab.grpo.config import Config, Lora
from trimtab.grpo.recipes import quickstart
from trimtab.grpo.runs.changes import changes
from trimtab.grpo.runs.checkpoints import step_of
from trimtab.grpo.runs.durable import append_text
from trimtab.grpo.runs.folder import RunFolder, remedy
from trimtab.grpo.runs.lock import locked
from trimtab.grpo.runs.record import record_start
from trimtab.grpo.runs.saving import Saving
from trimtab.grpo.runs.signals import TOGETHER, Stopped, stop_on_signals
from trimtab.rollout.types import Episode, Group, Lost

LOST = {"kind": "environment", "count": 2, "reason": "no judge"}
SEPARATORS = "a\u2028b\u2029c\u0085d\x1ce"


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", quickstart())


def write(path):
    (path / "weights").write_text("w")


def group(text="你好", name="g") -> Group:
    episode = Episode(
        name="e", domain="agent", messages=(Message("user", text), Message("assistant", "!")), segments=(),
        rewards={"outcome": 1.0}, reward=1.0, ended="done",
    )  # fmt: skip
    return Group(name=name, domain="agent", episodes=(episode, episode))


class Weights:
    """What Saving needs of a trainer, with weights of a given size."""

    def __init__(self, kib: int):
        self.config = replace(quickstart(), model="/nowhere")
        self.updates = 0
        self.kib = kib

    def save(self, path: Path) -> None:
        save_file({"w": torch.zeros(self.kib * 256)}, path / "model.safetensors")
        torch.save({"m": torch.zeros(self.kib * 256)}, path / "optimizer.pt")


# ---- folders


def test_a_folder_is_never_overwritten_and_only_a_run_is_opened(folder, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        RunFolder.create(folder.path, quickstart())
    with pytest.raises(ValueError, match="is not a run"):
        RunFolder.open(tmp_path)
    assert Config.load(RunFolder.open(folder.path).config) == quickstart()


def test_a_second_process_on_one_folder_is_refused_until_the_first_has_ended(folder):
    program = f"""
        import time
        from pathlib import Path
        from trimtab.grpo.runs.folder import RunFolder
        with RunFolder(Path({str(folder.path)!r})).lock():
            print("held", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another process \(pid {first.pid}\)"), folder.lock():
            pass
        first.kill()
    with folder.lock():
        pass


def _is_held(lock: Path) -> bool:
    """As another process sees it."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
        return False


def test_a_lock_is_let_go_when_what_it_guards_fails(tmp_path):
    lock = tmp_path / "lock"
    with pytest.raises(ZeroDivisionError), locked(lock, "it"):
        assert _is_held(lock)
        1 / 0  # noqa: B018
    assert not _is_held(lock)


# ---- JSON Lines


def test_separators_of_other_standards_do_not_cut_a_line(folder, tmp_path):
    folder.save_episodes(0, [group(SEPARATORS)])
    folder.log_lost(0, [Lost(name="g#0", domain="d", kind="reward", reason=SEPARATORS)])
    folder.log({"step": 0})
    folder.rewind(1)
    assert [row["reason"] for _, row in read_json_lines(folder.path / "lost.jsonl")] == [SEPARATORS]
    assert [episode.messages[0].content for episode in load_episodes(folder.path)] == [SEPARATORS] * 2
    (tmp_path / "rows.jsonl").write_text(json_line({"prompt": SEPARATORS}))
    assert [row.text("prompt") for row in read_rows(tmp_path / "rows.jsonl")] == [SEPARATORS]


@pytest.mark.parametrize(("line", "said"), [(b'{"a": 1', "2: not JSON"), (b"\xff", "2: not JSON"), (b"[" * 10**5, "2")])
def test_a_line_that_is_no_json_is_named(line, said, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:{said}"):
        list(read_json_lines(tmp_path / "rows.jsonl"))


def test_half_a_line_at_the_end_is_dropped_and_told(folder, capsys):
    for step in range(3):
        folder.log({"step": step})
    file = folder.path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    folder.go_on(quickstart(), 2)
    assert [row["step"] for row in folder.metrics()] == [0, 1]
    assert "metrics.jsonl ended in half a line, which is dropped" in capsys.readouterr().err


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    """In a process of its own, whose files may have 100 bytes: the system writes the first part of the line."""
    file = tmp_path / "lines"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    program = f"""
        from pathlib import Path
        from trimtab.grpo.runs.durable import append_text
        append_text(Path({str(file)!r}), "short\\n")
        try:
            append_text(Path({str(file)!r}), "x" * 200 + "\\n")
        except OSError as error:
            print(error.strerror)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], preexec_fn=limited, capture_output=True, text=True
    )
    assert done.stdout == "File too large\n", done.stderr
    assert file.read_text() == "short\n"


# ---- checkpoints


def test_the_two_newest_checkpoints_are_kept_by_number(folder):
    for step in (9, 99_999, 100_000, 100_001):
        folder.checkpoints.save(step, write)
    assert [step_of(path) for path in folder.checkpoints.all()] == [100_000, 100_001]
    assert step_of(folder.checkpoints.latest()) == 100_001


@pytest.mark.parametrize("damage", ["cut", "flipped", "removed", "state"])
def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(damage, folder, capsys):
    for step in (1, 2):
        folder.checkpoints.save(step, write)
    newest = folder.checkpoints.all()[-1]
    file = newest / ("state.json" if damage == "state" else "weights")
    match damage:
        case "cut" | "state":
            os.truncate(file, 0)
        case "flipped":
            file.write_text("v")
        case "removed":
            file.unlink()
    assert step_of(folder.checkpoints.latest()) == 1
    assert f"{newest} is damaged" in capsys.readouterr().err
    shutil.rmtree(folder.checkpoints.all()[0])
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        folder.checkpoints.latest()


def test_a_checkpoint_cut_off_by_a_kill_is_not_resumed_from(folder):
    program = f"""
        import os, signal
        from pathlib import Path
        from trimtab.grpo.runs.folder import RunFolder
        def write(path):
            (path / "weights").write_text("w")
            if path.name.startswith("step-00002"):
                os.kill(os.getpid(), signal.SIGKILL)
        folder = RunFolder(Path({str(folder.path)!r}))
        folder.checkpoints.save(1, write)
        folder.checkpoints.save(2, write)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
    assert done.returncode == -signal.SIGKILL
    assert step_of(folder.checkpoints.latest()) == 1
    folder.checkpoints.save(2, write)
    assert sorted(path.name for path in folder.checkpoints.folder.iterdir()) == ["step-00001", "step-00002"]


def test_a_run_without_a_checkpoint_begins_again_from_its_model(folder, tmp_path):
    assert folder.checkpoints.latest() is None
    assert "begin again with" in remedy(folder.path) and "--resume" in remedy(folder.path)
    folder.checkpoints.save(1, write)
    assert "checkpoints are whole" in remedy(folder.path)
    assert remedy(tmp_path / "none") == "nothing had begun: start it anew"


def test_a_full_disk_costs_a_checkpoint_which_is_tried_again_after_the_next_step(small_disk, capsys):
    folder = RunFolder.create(small_disk / "run", quickstart())
    trainer = Weights(kib=32)
    saving = Saving(folder, trainer, 0, model=folder.path)
    saving.trained(1)
    saving.after_step(due=True)
    assert saving.saved == 1
    trainer.kib = 200
    saving.trained(2)
    saving.after_step(due=True)
    assert (saving.saved, saving.failures) == (1, 1)
    assert "checkpoint of step 2 could not be written" in capsys.readouterr().err
    assert [step_of(path) for path in folder.checkpoints.all()] == [1] and step_of(folder.checkpoints.latest()) == 1
    trainer.kib = 32
    saving.trained(3)
    saving.after_step(due=False)
    assert saving.saved == 3 and step_of(folder.checkpoints.latest()) == 3


def test_lines_for_a_full_disk_wait_and_come_in_order(small_disk, capsys):
    folder = RunFolder.create(small_disk / "run", quickstart())
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    for step in range(300):
        folder.log({"step": step, "text": "y" * 30})
    folder.save_episodes(0, [group("z" * 5000)])
    assert isinstance(folder.owing(), OSError)
    assert capsys.readouterr().err.count("could not be written (") == 1
    assert [row["step"] for row in folder.metrics()] == list(range(len(folder.metrics()))), "nothing torn"
    filler.unlink()
    assert folder.owing() is None
    assert [row["step"] for row in folder.metrics()] == list(range(300))
    assert len(list(load_episodes(folder.path))) == 2


def test_in_the_middle_of_a_step_nothing_is_saved_and_after_a_whole_one_it_is(folder):
    trainer = Weights(kib=1)
    saving = Saving(folder, trainer, 0, model=folder.path)
    trainer.updates = 2
    saving.trained(1)
    trainer.updates = 3  # the first of the next step's
    with pytest.raises(KeyError), saving.on_failure():
        raise KeyError
    assert folder.checkpoints.all() == []
    trainer.updates = 4
    saving.trained(2)
    with pytest.raises(KeyError), saving.on_failure():
        raise KeyError
    assert step_of(folder.checkpoints.latest()) == 2


def test_the_oldest_episodes_make_room_where_a_run_may_hold_so_much(folder):
    for step in range(4):
        folder.save_episodes(step, [group("x" * 100_000)])
    folder.keep_within(0.5 * 2**20 / 2**30)
    assert sorted(path.stem for path in (folder.path / "episodes").iterdir()) == ["step-00002", "step-00003"]
    folder.keep_within(1e-9)
    assert [path.stem for path in (folder.path / "episodes").iterdir()] == ["step-00003"], "the newest stays"


# ---- going on


def test_rewinding_forgets_the_steps_that_will_be_repeated(folder):
    for step in range(4):
        folder.log({"step": step})
        folder.log_ledger({"step": step, "prompts": []})
        folder.save_episodes(step, [group()])
        folder.log_lost(step, [Lost(name="g#0", domain="d", kind="environment", reason="no judge")] * 2)
    folder.rewind(2)
    assert [row["step"] for row in folder.metrics()] == [row["step"] for row in folder.ledger()] == [0, 1]
    lost = [row for _, row in read_json_lines(folder.path / "lost.jsonl")]
    assert lost == [{"step": step, "domain": "d"} | LOST for step in (0, 1)]
    assert sorted(path.stem for path in (folder.path / "episodes").iterdir()) == ["step-00000", "step-00001"]
    assert "你好" in (folder.path / "episodes" / "step-00001.jsonl").read_text()


def test_settings_changed_on_the_way_are_what_the_folder_says_and_its_history(folder):
    longer = replace(quickstart(), steps=99, lr=1e-5)
    folder.go_on(longer, 0)
    record_start(folder.path, 7, changes(quickstart(), longer))
    assert Config.load(folder.config) == longer and not list(folder.path.glob("*.partial"))
    (row,) = [row for _, row in read_json_lines(folder.path / "history.jsonl")]
    assert row["step"] == 7 and row["changed"] == {"steps": [24, 99], "lr": [quickstart().lr, 1e-5]}
    assert row["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert row["command"] == shlex.join(sys.argv)


@pytest.mark.parametrize(
    ("now", "name"),
    [
        (replace(quickstart(), seed=5), "seed"),
        (replace(quickstart(), model="other"), "model"),
        (replace(quickstart(), lora=Lora(rank=8)), "lora.rank"),
        (replace(quickstart(), domains={"agent": quickstart().domains["agent"]}), r"domains\.\w+"),
    ],
)
def test_what_earlier_steps_were_trained_with_cannot_change(now, name):
    with pytest.raises(ValueError, match=rf"{name}\S* was .* when a run goes on"):
        changes(quickstart(), now)


def test_the_sources_of_a_run_are_kept_as_they_were_at_each_start(folder, tmp_path):
    from trimtab.grpo.config import load

    recipe = tmp_path / "recipe.py"
    recipe.write_text("def recipe(): return 1\n")
    assert load(f"{recipe}:recipe")() == 1
    record_start(folder.path, 0, {})
    recipe.write_text("def recipe(): return 2\n")
    record_start(folder.path, 4, {})
    rows = [row for _, row in read_json_lines(folder.path / "history.jsonl")]
    first, second = (folder.path / "sources" / row["sources"][str(recipe)] for row in rows)
    assert "return 1" in first.read_text() and "return 2" in second.read_text()


# ---- ways out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_a_step_and_the_second_does_not(number):
    told = []
    before = signal.getsignal(number)
    with stop_on_signals(told.append) as stop:
        with stop.after_the_step():
            os.kill(os.getpid(), number)
            assert stop.asked() and stop.exit_code == 128 + number and len(told) == 1
            os.kill(os.getpid(), number)  # by whoever stops a group of processes, of which one hands it on: no second
            signal.sigtimedwait([], 0.1)
            assert len(told) == 1
            time.sleep(TOGETHER)
            with pytest.raises(Stopped):
                os.kill(os.getpid(), number)
                signal.sigtimedwait([], 0.1)
        with pytest.raises(Stopped), stop.after_the_step():
            pytest.fail("a step began after a stop was asked for")
    assert signal.getsignal(number) == before


def test_a_signal_ends_at_once_what_has_nothing_to_lose():
    with stop_on_signals(print), pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 0.1)
    assert stopped.value.exit_code == 143


def test_the_traceback_of_the_users_code_is_shown_from_its_first_line(tmp_path):
    file = tmp_path / "reward.py"
    file.write_text("import json\ndef reward(text):\n    return json.loads(text)\n")
    from trimtab.grpo.config import load

    reward = load(f"{file}:reward")
    try:
        try:
            append_text(tmp_path / "file", reward("nonsense"))
        except ValueError as error:
            raise RuntimeError("no group could be scored") from error
    except RuntimeError as error:
        error.__cause__.__traceback__ = error.__cause__.__traceback__.tb_next  # without this test's own frame
        shown = theirs(error)
    assert shown.index("reward.py") < shown.index("json/decoder.py") and "JSONDecodeError" in shown
    assert theirs(OSError(28, "No space left on device")) == ""


def test_what_fails_inside_trimtab_alone_is_not_shown_as_the_users(tmp_path):
    try:
        append_text(tmp_path / "none" / "file", "text")
    except OSError as error:
        error.__traceback__ = error.__traceback__.tb_next
        assert theirs(error) == ""
