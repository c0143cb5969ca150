import asyncio
import json
from pathlib import Path

import pytest
from judge_server import Act, judge_server
from tiny import save_tiny

from trimtab.grpo.commands.cli import main
from trimtab.grpo.commands.judge_eval import Generate, engine_config, evaluate, read_labelled, write_labelled
from trimtab.rewards.judging.rubric import JudgeError, Rubric, RubricScore
from trimtab.rollout.formats.template import load_format

GOOD = {"prompt": "Write.", "answer": "A boat.", "criteria": [{"text": "mention the boat", "label": True}]}
YES = json.dumps({"c1": {"rationale": "boat", "satisfied": True}})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def changed(**changes) -> str:
    return json.dumps(GOOD | changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "labelled.jsonl:2: not JSON"),
        ("[]", "line 2, the whole line: Input should be an object"),
        ("{}", "line 2, prompt: Field required"),
        (changed(answer=3), "line 2, answer: Input should be a valid string"),
        (changed(criteria=[]), "line 2, criteria: .* at least 1 item"),
        (changed(criteria=[{"text": "rhyme"}]), "line 2, criteria.0.label: Field required"),
        (changed(criteria=[{"text": "rhyme", "label": "yes"}]), "line 2, criteria.0.label: .* boolean"),
        (changed(criteria=[{"text": "rhyme", "label": True, "weight": 0}]), "line 2, criteria.0.weight: .* than 0"),
        (changed(criteria=[{"text": " ", "label": True}]), "line 2, criteria.0.text"),
        (changed(labels=[True]), "line 2, labels: Extra inputs"),
    ],
)
def test_a_bad_line_is_named_with_its_field_and_ends_in_code_2(line, message, tmp_path, capsys):
    file = write(tmp_path / "labelled.jsonl", json.dumps(GOOD), line)
    assert main(["judge-eval", str(file), "--model", "a-judge"]) == 2
    with pytest.raises(ValueError, match=message):
        read_labelled(file)
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.jsonl", "--model", "a-judge"], "nowhere.jsonl cannot be read"),
        (["{file}"], "either --model, of an endpoint, or --checkpoint"),
        (["{file}", "--model", "a-judge", "--checkpoint", "b"], "either --model, of an endpoint, or --checkpoint"),
        (["{file}", "--checkpoint", "nowhere"], "no checkpoint at nowhere"),
        (["{file}", "--model", "a-judge", "--cache", "{file}"], "cannot be used as a cache"),
        (["{empty}", "--model", "a-judge"], "has no labelled answers"),
        (["--generate", "{file}"], "cannot be written"),
        (["--generate", "new.jsonl", "--prompts", "0"], "prompts must be at least 1"),
    ],
)
def test_a_mistake_ends_in_a_sentence_and_code_2(words, message, tmp_path, capsys):
    names = {"file": write(tmp_path / "labelled.jsonl", json.dumps(GOOD)), "empty": write(tmp_path / "empty.jsonl")}
    assert main(["judge-eval", *(word.format(**names) for word in words)]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_engine_of_a_checkpoint_has_its_stops_and_a_cache_of_its_models_size(tmp_path):
    """A token's keys and values: 3 layers of 2 * 2 * 32 in fp32; four contexts of 512."""
    save_tiny(tmp_path, "LlamaForCausalLM")
    chat = load_format(tmp_path)
    config = engine_config(str(tmp_path), chat)
    assert (config.max_model_len, config.kv_cache_bytes) == (512, 4 * 512 * 3 * 2 * 2 * 32 * 4)
    assert config.stop_ids == tuple(chat.stop_ids) != ()


def test_generated_answers_are_labelled_by_the_checks_of_the_domain(tmp_path):
    file, again = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for path in (file, again):
        write_labelled(Generate(file=path, prompts=40, seed=3))
    answers = read_labelled(file)
    assert file.read_text() == again.read_text() and len(answers) == 80
    labels = [criterion.label for answer in answers for criterion in answer.criteria]
    assert 0.4 < sum(labels) / len(labels) < 0.8
    thanked = [
        (c.label, "hank" in a.answer or "谢" in a.answer) for a in answers for c in a.criteria if c.name == "thank"
    ]
    assert thanked and all(label <= thanks for label, thanks in thanked)


def test_the_report_compares_verdicts_with_labels_counts_failures_and_asks_pairs_both_ways(tmp_path):
    """Each prompt has two answers. The judge calls long answers good, fails on one, and prefers what stands first."""
    file = tmp_path / "labelled.jsonl"
    write_labelled(Generate(file=file, prompts=5))
    answers = read_labelled(file)

    async def likes_length(answer: str, rubric: Rubric, *, task: str = "") -> RubricScore:
        assert task.startswith("Write a note.")
        if answer == answers[0].answer:
            raise JudgeError("no verdict: too long")
        return RubricScore(rubric, (len(answer) > 30,) * len(rubric.criteria), ())

    async def first(task: str, one: str, other: str):
        return "first"

    report = asyncio.run(evaluate(answers, likes_length, first))
    assert report.failures == ("no verdict: too long",)
    assert report.flips == (True,) * 5
    assert len(report.rulings) == sum(len(answer.criteria) for answer in answers[1:])
    assert all(ruling.verdict == (ruling.length > 30) for ruling in report.rulings)


@pytest.mark.parametrize(
    ("form", "act", "code", "printed"),
    [
        ("json", Act(YES), 0, ("100.0%", "without a verdict: 0", "not asked", "calls 1", "prompt tokens 11")),
        ("yes-no", Act("Yes"), 0, ("100.0%", "completion tokens 7")),
        ("json", Act("yes"), 1, ("failed: no verdict: 3 replies could not be read", "without a verdict: 1", "calls 3")),
    ],
)
def test_judge_eval_prints_agreement_and_cost_and_fails_without_any_verdict(form, act, code, printed, tmp_path, capsys):
    file = write(tmp_path / "labelled.jsonl", json.dumps(GOOD))
    with judge_server([act]) as server:
        assert main(["judge-eval", str(file), "--model", "a-judge", "--base-url", server.url, "--form", form]) == code
    out = capsys.readouterr().out
    assert all(text in out for text in printed), out
