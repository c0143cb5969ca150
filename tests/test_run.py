import json
from dataclasses import replace

import pytest

from trimtab.environments.base import Message
from trimtab.grpo.config import Lora
from trimtab.grpo.recipes import quickstart
from trimtab.grpo.run import RunFolder, step_of_checkpoint
from trimtab.grpo.train import check_resumed
from trimtab.rollout.types import Episode, Group


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", quickstart())


def write(path):
    (path / "weights").write_text("w")


def test_a_folder_is_never_overwritten_and_only_a_run_is_opened(folder, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        RunFolder.create(folder.path, quickstart())
    with pytest.raises(ValueError, match="is not a run"):
        RunFolder.open(tmp_path)
    assert RunFolder.open(folder.path).load_config() == quickstart()


def test_the_two_newest_checkpoints_are_kept(folder):
    for step in (1, 2, 10):
        folder.save_checkpoint(step, write)
    assert [step_of_checkpoint(path) for path in folder.checkpoints()] == [2, 10]
    assert step_of_checkpoint(folder.latest_checkpoint()) == 10


def test_a_failed_checkpoint_leaves_the_last_one_and_no_rubbish(folder):
    folder.save_checkpoint(1, write)

    def fail(path):
        write(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        folder.save_checkpoint(2, fail)
    assert [path.name for path in (folder.path / "checkpoints").iterdir()] == ["step-00001"]
    assert (folder.latest_checkpoint() / "weights").read_text() == "w"


def test_a_checkpoint_cut_off_by_a_kill_is_not_resumed_from(folder):
    folder.save_checkpoint(1, write)
    partial = folder.path / "checkpoints" / "step-00002.partial"
    partial.mkdir()
    (partial / "state.json").write_text('{"step": 2}')
    assert step_of_checkpoint(folder.latest_checkpoint()) == 1


def test_no_checkpoint_is_said(folder):
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        folder.latest_checkpoint()


def test_rewinding_forgets_the_steps_that_will_be_repeated(folder):
    episode = Episode(
        name="e", domain="agent", messages=(Message("user", "你好"),), segments=(), rewards={"outcome": 1.0},
        reward=1.0, ended="done",
    )  # fmt: skip
    for step in range(4):
        folder.log({"step": step})
        folder.save_episodes(step, [Group(name="g", domain="agent", episodes=(episode, episode))])
        folder.log_lost(step, voided=["no judge", "no judge"], refused=[])
    folder.rewind(2)
    assert [row["step"] for row in folder.metrics()] == [0, 1]
    lost = [json.loads(line) for line in (folder.path / "lost.jsonl").read_text().splitlines()]
    assert lost == [{"step": step, "kind": "voided", "count": 2, "reason": "no judge"} for step in (0, 1)]
    assert sorted(path.stem for path in (folder.path / "episodes").iterdir()) == ["step-00000", "step-00001"]
    assert "你好" in (folder.path / "episodes" / "step-00001.jsonl").read_text()


def test_settings_changed_on_the_way_are_what_the_folder_says(folder):
    longer = replace(quickstart(), steps=99)
    assert RunFolder.reopen(folder.path, longer).load_config() == longer
    assert not list(folder.path.glob("*.partial"))


@pytest.mark.parametrize("lora", [Lora(rank=8), Lora(rank=4, targets=("q_proj",))])
def test_adapters_cannot_change_when_a_run_goes_on(tmp_path, lora):
    trained = replace(quickstart(), lora=Lora(rank=4))
    folder = RunFolder.create(tmp_path / "adapted", trained)
    folder.save_checkpoint(1, write)
    check_resumed(folder, replace(trained, steps=99))
    with pytest.raises(ValueError, match=r"made with lora\.rank 4 and lora\.targets all-linear, which cannot change"):
        check_resumed(folder, replace(trained, lora=lora))
