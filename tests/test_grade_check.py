"""A task's own answers must earn full marks and rubbish none: by command, and before a training on files."""

import asyncio
import json

import pytest

from trimtab.environments.adapters.rows import MathsTask, RowsTask, row_reward
from trimtab.environments.base import Message
from trimtab.grpo.commands.cli import main
from trimtab.grpo.config import Config, Domain
from trimtab.grpo.setup.grading import check_grading, grade

SUMS = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(1, 31)]


def file_of(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def careless(message: Message, row) -> dict[str, float]:
    return {"outcome": float(row["answer"] in message.content)}


def broken(message: Message, row) -> dict[str, float]:
    return {"outcome": float(1 / (len(row["answer"]) - 1) > 0)}


def generous(message: Message, row) -> dict[str, float]:
    return {"outcome": 1.0}


def checked(path, *options: str) -> int:
    return main(["grade-check", str(path), "--rows", "30", "--canary-rows", "10", *options])


@pytest.mark.parametrize("kind", ["maths", "number", "exact"])
def test_a_file_whose_reward_is_right_passes(tmp_path, capsys, kind):
    assert checked(file_of(tmp_path, SUMS), "--reward", kind) == 0
    out = capsys.readouterr().out
    assert "30 of 30 earn full marks" in out and "canaries: 0 of " in out and "0 of 0" not in out


def test_letters_of_choices_pass(tmp_path):
    rows = [{"q": f"Which is {i}?", "key": "(ABCD)"[1 + i % 4]} for i in range(12)]
    assert checked(file_of(tmp_path, rows), "--reward", "choice", "--prompt", "q", "--answer", "key") == 0


def test_truths_that_cannot_be_read_are_listed_with_their_rows(tmp_path, capsys):
    path = file_of(tmp_path, [*SUMS, {"prompt": "n?", "answer": r"n\equiv 1 \pmod 3"}])
    assert checked(path) == 1
    assert "rows.jsonl:31: the truth" in capsys.readouterr().out


def test_a_reward_that_pays_the_answer_among_guesses_fails(tmp_path, capsys):
    assert checked(file_of(tmp_path, SUMS), "--reward", f"{__file__}:careless") == 1
    out = capsys.readouterr().out
    assert "30 of 30 earn full marks" in out and "canaries: 0 of" not in out and " or " in out


def test_a_reward_that_pays_anything_fails(tmp_path, capsys):
    assert checked(file_of(tmp_path, SUMS), "--reward", f"{__file__}:generous") == 1
    assert "banana" in capsys.readouterr().out


def test_a_reward_that_breaks_on_a_row_fails_and_names_it(tmp_path, capsys):
    assert checked(file_of(tmp_path, SUMS), "--reward", f"{__file__}:broken") == 1
    assert "rows.jsonl:1: " in capsys.readouterr().out


def test_a_recipe_and_one_domain_of_it_are_checked_and_judged_ones_are_named(capsys):
    assert main(["grade-check", "quickstart", "--rows", "8", "--canary-rows", "4"]) == 0
    out = capsys.readouterr().out
    assert "reasoning\n  own answers: 8 of 8" in out and "alignment\n  a model judges it" in out
    assert main(["grade-check", "quickstart:agent", "--rows", "8"]) == 0
    assert "may be wrong" in capsys.readouterr().out
    assert main(["grade-check", "quickstart:agents"]) == 2
    assert "no domain 'agents'" in capsys.readouterr().err
    assert main(["grade-check", "nowhere:Task"]) == 2


def config_of(**options) -> Config:
    return Config(domains={"sums": Domain(task="x:X", **options)})


def test_before_training_a_file_is_graded_and_refused_where_more_than_max_lost_fails(tmp_path, capsys):
    swapped = [row | {"answer": "banana"} if i % 4 == 0 else row for i, row in enumerate(SUMS)]
    path = file_of(tmp_path, swapped)
    numbers = RowsTask(path, row_reward("number"))
    check_grading(config_of(), {"sums": numbers})
    told = capsys.readouterr().err
    assert "22 of 30 earn full marks" in told and "rows.jsonl:1" in told
    with pytest.raises(ValueError, match="does not grade its own file"):
        check_grading(config_of(max_lost=0.1), {"sums": numbers})
    check_grading(config_of(max_lost=0.1, grade_check=False), {"sums": numbers})
    with pytest.raises(ValueError, match="trimtab grade-check"):
        check_grading(config_of(), {"sums": RowsTask(path, generous)})


def test_a_grading_ends_when_its_time_is_over(tmp_path):
    path = file_of(tmp_path, SUMS)

    async def slow(message: Message, row) -> dict[str, float]:
        await asyncio.sleep(0.2)
        return {"outcome": 1.0}

    grades = asyncio.run(grade(RowsTask(path, slow), "outcome", rows=30, canary_rows=30, seconds=0.3))
    assert 0 < grades.own < 30 and grades.canaries == 0


def test_rows_without_a_readable_truth_are_left_out_and_too_many_are_refused(tmp_path, capsys):
    odd = {"prompt": "n?", "answer": r"p\land q"}
    task = MathsTask(file_of(tmp_path, [*SUMS, odd]))
    assert list(task.left_out) == [f"{tmp_path}/rows.jsonl:31"]
    assert "1 of 31 rows cannot be graded" in capsys.readouterr().err
    assert len(list(task.known(100))) == 30
    with pytest.raises(ValueError, match=r"10 of 40 rows cannot be graded, more than max_unfit = 0\.1"):
        MathsTask(file_of(tmp_path, [*SUMS, *[odd] * 10]))


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("Answer: 4", 1.0),
        ("Answer: 4 or 5", 0.0),
        (r"\boxed{5} or \boxed{4}", 0.0),
        ("Answer: 5", 0.0),
        ("4", 0.0),
    ],
)
def test_the_rewards_of_rows_take_one_final_answer(said, outcome):
    for kind in ("maths", "number", "exact"):
        parts = asyncio.run(row_reward(kind)(Message("assistant", said), {"answer": 4}))
        assert parts["outcome"] == outcome
    with pytest.raises(ValueError, match="there are maths, exact, choice, number"):
        row_reward("sums")
