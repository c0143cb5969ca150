"""Answers scored by a rubric of their own, which a judge reads."""

from trimtab.environments.base import Message, Step, VoidEpisode
from trimtab.rewards.guards import injects_verdict
from trimtab.rewards.judging.rubric import Grader, JudgeError, Rubric, RubricScore, truths
from trimtab.rewards.language import Language, language_consistency


class RubricEnv:
    """One prompt with its rubric, answered once. Reward parts, each in [0, 1]:

    "rubric", the judge's score; "injection", 1.0 for an answer that speaks to the judge, which is not shown to it and
    has a rubric of 0.0; with a language, "language", the share of the answer's words in it; with checks in the rubric,
    "rubric_truth", the score by the checks, and "judge_agreement", the share of verdicts that equal them.

    The verdicts, with the judge's reasons where it gives any, are a note. A judge that fails voids the episode.
    """

    def __init__(self, prompt: str, rubric: Rubric, grade: Grader, *, language: Language | None = None) -> None:
        self.prompt = prompt
        self.rubric = rubric
        self._grade = grade
        self._language: Language | None = language

    async def start(self) -> tuple[Message, ...]:
        return (Message("user", self.prompt),)

    async def step(self, message: Message) -> Step:
        injected = injects_verdict(message.content)
        scored = _unheard(message.content, self.rubric) if injected else await self._graded(message.content)
        rewards = {"rubric": scored.score, "injection": float(injected)}
        if self._language is not None:
            rewards["language"] = language_consistency(message.content, self._language)
        if scored.truth is not None:
            rewards["rubric_truth"] = scored.truth
        if scored.agreement is not None and not injected:
            rewards["judge_agreement"] = scored.agreement
        note = "not shown to the judge: the answer speaks to it" if injected else _account(scored)
        return Step(rewards=rewards, done=True, notes={"rubric": note})

    async def _graded(self, answer: str) -> RubricScore:
        try:
            return await self._grade(answer, self.rubric, task=self.prompt)
        except JudgeError as error:
            raise VoidEpisode(str(error)) from error


def _unheard(answer: str, rubric: Rubric) -> RubricScore:
    return RubricScore(rubric, (False,) * len(rubric.criteria), truths(answer, rubric))


def _account(scored: RubricScore) -> str:
    """The verdicts with their reasons, a line each."""
    reasons = scored.rationales or ("",) * len(scored.verdicts)
    ruled = zip(scored.verdicts, scored.rubric.criteria, reasons, strict=True)
    return "\n".join(f"{'yes' if yes else 'no'}: {one.text}{f' ({why})' if why else ''}" for yes, one, why in ruled)
