import asyncio

import pytest

from trimtab.rewards.judging.rubric import (
    Criterion,
    JudgeError,
    Rubric,
    RubricScore,
    judge_prompt,
    parse_verdict,
    rubric_score,
)

BOAT = Criterion("mention the boat", 3.0, lambda text: "boat" in text)
SHORT = Criterion("have at most 9 letters", 1.0, lambda text: len(text) <= 9)
KIND = Criterion("sound kind", 4.0)


def judge_that_says(verdicts: dict[str, str]):
    """A judge with a fixed verdict for each criterion."""

    async def judge(prompt: str) -> str:
        return next(verdict for text, verdict in verdicts.items() if text in prompt)

    return judge


def score(answer: str, criteria: tuple[Criterion, ...], verdicts: dict[str, str]) -> RubricScore:
    return asyncio.run(rubric_score(answer, Rubric(criteria), judge_that_says(verdicts)))


@pytest.mark.parametrize(
    ("text", "verdict"), [("yes", True), (" No\n", False), ("YES", True), ("<think>no?</think>yes", True)]
)
def test_a_verdict_is_yes_or_no(text, verdict):
    assert parse_verdict(text) is verdict


@pytest.mark.parametrize("text", ["", "yes and no", "maybe", "1", "yesyes", "ye s"])
def test_any_other_verdict_is_refused(text):
    with pytest.raises(ValueError, match="begins with yes or no"):
        parse_verdict(text)


def test_the_score_is_the_weighted_share_of_criteria_the_judge_found_satisfied():
    result = score("a boat", (BOAT, SHORT, KIND), {"boat?": "yes", "letters?": "no", "kind?": "yes"})
    assert result.verdicts == (True, False, True)
    assert result.score == pytest.approx((3 + 4) / 8)


def test_truth_and_agreement_cover_the_criteria_with_a_check():
    # truths: BOAT yes, SHORT yes, KIND unknown; verdicts: yes, no, yes. Agreement 1 of 2, truth (3 + 1) / 4.
    result = score("a boat", (BOAT, SHORT, KIND), {"boat?": "yes", "letters?": "no", "kind?": "yes"})
    assert result.truths == (True, True, None)
    assert result.truth == 1.0
    assert result.agreement == 0.5


def test_without_checks_there_is_no_truth_and_no_agreement():
    result = score("hello", (KIND,), {"kind?": "no"})
    assert (result.score, result.truth, result.agreement) == (0.0, None, None)


def test_the_judge_reads_the_answer_one_criterion_and_the_task_when_there_is_one():
    assert judge_prompt("A boat.", BOAT) == "Text: A boat.\nDoes it mention the boat? yes or no"
    assert judge_prompt("A boat.", BOAT, task="Write.").startswith("Task: Write.\nText: A boat.\n")


def test_a_verdict_that_cannot_be_parsed_is_a_judge_error():
    with pytest.raises(JudgeError, match="perhaps"):
        score("a boat", (BOAT, KIND), {"boat?": "yes", "kind?": "perhaps"})


def test_a_judge_that_breaks_is_a_judge_error():
    async def broken(prompt: str) -> str:
        raise TimeoutError("engine gone")

    with pytest.raises(JudgeError, match="engine gone"):
        asyncio.run(rubric_score("a boat", Rubric((BOAT,)), broken))


def test_all_criteria_are_asked_at_the_same_time():
    waiting: list[str] = []

    async def judge(prompt: str) -> str:
        waiting.append(prompt)
        while len(waiting) < 3:
            await asyncio.sleep(0)
        return "yes"

    score_of_all = rubric_score("a boat", Rubric((BOAT, SHORT, KIND)), judge)
    assert asyncio.run(asyncio.wait_for(score_of_all, timeout=5)).score == 1.0


def test_a_rubric_without_criteria_and_a_weight_of_zero_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        Rubric(())
    with pytest.raises(ValueError, match="above 0, or below for a fault, got 0"):
        Criterion("rhyme", 0)


def test_a_fault_takes_its_weight_off_and_nothing_falls_below_0():
    fault = Criterion("insult the reader", -2.0, lambda text: "fool" in text)
    verdicts = {"boat?": "yes", "kind?": "no", "reader?": "yes"}
    assert score("a boat, fool", (BOAT, KIND, fault), verdicts).score == pytest.approx((3 - 2) / 7)
    assert score("a boat", (BOAT, KIND, fault), verdicts | {"reader?": "no"}).score == pytest.approx(3 / 7)
    worst = score("fool", (BOAT, KIND, fault), {"boat?": "no", "kind?": "no", "reader?": "yes"})
    assert (worst.score, worst.truth) == (0.0, 0.0)
    with pytest.raises(ValueError, match="nothing to earn"):
        Rubric((fault,))


def test_what_an_answer_holds_is_no_markup_of_the_judges_prompt():
    assert judge_prompt("</text> <b>", BOAT, task="<c>").startswith("Task: &lt;c&gt;\nText: &lt;/text&gt; &lt;b&gt;\n")
