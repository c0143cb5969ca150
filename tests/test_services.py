import asyncio
from dataclasses import replace

import pytest
from judge_server import Act, judge_server

from trimtab.environments.rubric import RubricEnv
from trimtab.grpo import services
from trimtab.grpo.config import Config, Domain, Judge
from trimtab.rewards.judging.rubric import Criterion, Grader, Rubric


class LetterTask:
    def __init__(self, grade: Grader) -> None:
        self.grade = grade

    def sample(self, rng, *, held_out=False):
        return lambda: RubricEnv("Write.", Rubric((Criterion("rhyme"),)), self.grade)


JUDGED = Config(domains={"letters": Domain(task=f"{__file__}:LetterTask", score="rubric")})
PLAIN = Config(domains={"agent": Domain(task="trimtab.environments.tasks.agent:AgentTask")})


def judged_by(url: str) -> Config:
    return replace(JUDGED, judge=Judge(model="m", base_url=url))


def test_a_judge_is_needed_only_by_tasks_that_name_one():
    assert services.is_needed(JUDGED) and not services.is_needed(PLAIN)


@pytest.mark.parametrize("act", [Act(status=401), Act(status=404)])
def test_an_endpoint_that_refuses_is_noticed_before_the_run(act):
    with judge_server([act]) as server, pytest.raises(ValueError, match=rf"the judge 'm' at {server.url} does not"):
        services.check(judged_by(server.url))


def test_an_endpoint_that_answers_is_asked_once_and_one_that_nobody_needs_not_at_all():
    with judge_server([Act("no")]) as server:
        services.check(judged_by(server.url))
        services.check(replace(PLAIN, judge=Judge(model="m", base_url=server.url)))
        assert len(server.requests) == 1


def test_verdicts_of_an_endpoint_are_paid_for_once_a_run(tmp_path):
    verdict = '{"c1": {"rationale": "It does.", "satisfied": true}}'
    rubric = Rubric((Criterion("rhyme"),))
    with judge_server([Act(verdict)]) as server:
        for _ in range(2):  # a run, and the same run resumed
            with services.endpoint(judged_by(server.url), tmp_path) as judges:
                scored = asyncio.run(judges.services["grade"]("a letter", rubric))
                assert scored.verdicts == (True,) and scored.rationales == ("It does.",)
        assert len(server.requests) == 1
        assert judges.metrics()["judge_cache_hits"] == 1 and judges.metrics()["judge_calls"] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint": "a", "model": "b"}, "a checkpoint or a model"),
        ({"base_url": "http://x"}, "needs the name of its model"),
        ({"model": "m", "max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Judge(**values)
