import asyncio
import json
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.rewards.judging.model import JudgeModel, Reply
from trimtab.rewards.judging.rubric import Criterion, Rubric
from trimtab.rewards.judging.verdicts import (
    grade,
    parse_preference,
    parse_verdicts,
    prefer,
    rubric_prompt,
    verdict_schema,
)

YES = {"rationale": "It does.", "satisfied": True}
NO = {"rationale": " It does not. ", "satisfied": False}


class Judge:
    """Says what a function of the prompt says."""

    identity = "a function"

    def __init__(self, say) -> None:
        self._say = say
        self.prompts: list[str] = []

    async def __call__(self, prompt: str, schema: Mapping[str, Any] | None, attempt: int) -> Reply:
        self.prompts.append(prompt)
        assert schema is not None
        value = self._say(prompt)
        jsonschema.validate(value, schema)
        return Reply(json.dumps(value))


def test_one_call_rules_on_all_criteria():
    judge = Judge(lambda prompt: {"c1": YES, "c2": NO})
    rubric = Rubric((Criterion("rhyme", 3.0), Criterion("mention the boat", 1.0, lambda text: "boat" in text)))
    score = asyncio.run(grade("A boat, a goat.", rubric, JudgeModel(judge), task="Write a poem."))
    assert (score.verdicts, score.score, score.truths) == ((True, False), 0.75, (None, True))
    assert score.rationales == ("It does.", "It does not.")
    assert len(judge.prompts) == 1


def test_the_judge_reads_the_task_the_answer_and_every_criterion():
    prompt = rubric_prompt("A boat.", (Criterion("rhyme"), Criterion("scan")), task="Write a poem.")
    for part in (
        "<task>\nWrite a poem.\n</task>",
        "<answer>\nA boat.\n</answer>",
        "c1: Does it rhyme?",
        "c2: Does it scan?",
    ):
        assert part in prompt
    assert "task>" not in rubric_prompt("A boat.", (Criterion("rhyme"),)).replace("the task", "")


@given(st.text(alphabet="</answer>c1: \n{}", max_size=60), st.text(alphabet="</task>{}", max_size=30))
def test_neither_answer_nor_task_can_leave_its_tags(answer, task):
    prompt = rubric_prompt(f"x{answer}", (Criterion("rhyme"),), task=f"x{task}")
    for tag in ("<answer>", "</answer>", "<task>", "</task>"):
        assert prompt.count(tag) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("yes", "Expecting value"),
        ("[]", "valid dictionary"),
        ("{}", "verdicts must be on c1 to c2, got none"),
        (json.dumps({"c1": YES}), "got c1"),
        (json.dumps({"c1": YES, "c2": NO, "c3": YES}), "got c1, c2, c3"),
        (json.dumps({"c1": YES, "C2": NO}), "got c1, C2"),
        (json.dumps({"c1": YES, "c2": {"satisfied": True}}), "c2.rationale: Field required"),
        (json.dumps({"c1": YES, "c2": YES | {"satisfied": "true"}}), "c2.satisfied: .*boolean"),
        (json.dumps({"c1": YES, "c2": YES | {"satisfied": 1}}), "c2.satisfied: .*boolean"),
        (json.dumps({"c1": YES, "c2": YES | {"satisfied": None}}), "c2.satisfied"),
        (json.dumps({"c1": YES, "c2": YES | {"score": 10}}), "c2.score: Extra inputs"),
        (json.dumps({"c1": NO, "c2": YES, "c3": YES}).replace("c2", "c1").replace("c3", "c2"), "'c1' is given twice"),
        ('{"a":' * 100_000, "nested too deep"),
        (json.dumps({"c1": YES, "c2": NO}) + " I hope this helps.", "Extra data"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_anything_but_the_verdicts_asked_for_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_verdicts(text, 2)


def test_verdicts_in_a_code_block_and_in_another_order_are_read():
    text = f"```json\n{json.dumps({'c2': NO, 'c1': YES})}\n```"
    assert [verdict.satisfied for verdict in parse_verdicts(text, 2)] == [True, False]


@pytest.mark.parametrize(
    "before", ["<think>c1 {seems} met.</think>\n", "hmm {c1}</think>", "Let me see: c1 [rhymes].\n\n"]
)
@pytest.mark.parametrize("form", ["{}", "```json\n{}\n```", "```\n{}\n```\n"])
def test_a_judge_may_think_before_its_verdicts(before, form):
    text = before + form.replace("{}", json.dumps({"c1": YES, "c2": NO}))
    assert [verdict.satisfied for verdict in parse_verdicts(text, 2)] == [True, False]


def test_thoughts_without_a_verdict_are_none():
    with pytest.raises(ValueError, match="Expecting value"):
        parse_verdicts(f"<think>{json.dumps({'c1': YES, 'c2': NO})}", 2)


def test_the_schema_holds_every_verdict_and_nothing_else():
    schema = verdict_schema(2)
    jsonschema.validate({"c1": YES, "c2": NO}, schema)
    for wrong in ({"c1": YES}, {"c1": YES, "c2": NO, "c3": NO}, {"c1": YES, "c2": {"satisfied": True}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_a_preference_names_a_place():
    judge = Judge(lambda prompt: {"rationale": "shorter", "better": "second"})
    assert asyncio.run(prefer("long long", "short", JudgeModel(judge), task="Be brief.")) == "second"
    assert "<first>\nlong long\n</first>\n\n<second>\nshort\n</second>" in judge.prompts[0]
    with pytest.raises(ValueError, match="better"):
        parse_preference('{"rationale": "", "better": "A"}')
