import asyncio
from dataclasses import replace

import numpy as np
import pytest
from judge_server import Act, judge_server
from test_rollout_template_forms import TABLE, TEMPLATES, chat_of

from trimtab.environments.base import Message
from trimtab.environments.rubric import RubricEnv
from trimtab.grpo.config import Config, Domain, Judge
from trimtab.grpo.recipes import quickstart
from trimtab.grpo.sampling import services
from trimtab.rewards.judging.rubric import Criterion, Grader, JudgeError, Rubric
from trimtab.rollout.judge import RETRY_TOP_K
from trimtab.rollout.scripted import byte_chat
from trimtab.rollout.types import Completion, Request


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
        ({"verdict_tokens": 0}, r"judge\.verdict_tokens must be at least 1, got 0"),
        ({"attempts": 0}, r"judge\.attempts must be at least 1, got 0"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Judge(**values)


class Instructed:
    """Engines of an instruct model with a template of its own, which says these replies one after the other."""

    def __init__(self, name: str, *replies: str, reasoning: str = "") -> None:
        self.chat, self.requests = chat_of(name), []
        self._replies, self._reasoning = replies, reasoning

    async def __call__(self, request: Request) -> list[Completion]:
        said = Message("assistant", self._replies[len(self.requests)], self._reasoning)
        self.requests.append(request)
        ids = self.chat.encode_assistant(said, thinking=bool(self._reasoning))[: request.sampling.max_tokens]
        return [
            Completion(
                token_ids=np.array(ids, np.int32),
                logp=np.zeros(len(ids), np.float32),
                kept_ids=np.array(ids, np.int32),
                kept_offsets=np.arange(len(ids) + 1),
                routes=np.zeros((len(request.prompt_ids) + len(ids) - 1, 0, 0), np.uint8),
                weight_version=0,
                finish="stop" if ids[-1] in self.chat.ends else "length",
            )
        ]

    def judged_by(self, judge: Judge, window: int = 8192) -> services.Judging:
        services.check_format(judge, self.chat)
        return services.judging(judge, self, self.chat, model="a model", window=window)


def test_an_instruct_model_without_a_thinking_mode_judges_with_the_defaults_and_is_asked_again():
    engine = Instructed("smollm2", "It rhymes, so yes.", "Yes")
    judges = engine.judged_by(Judge())
    assert asyncio.run(judges.services["judge"]("Does it rhyme?")) == "yes"
    assert "<think>" not in engine.chat.decode(engine.requests[0].prompt_ids)
    assert [(r.sampling.max_tokens, r.sampling.top_k, r.seed) for r in engine.requests] == [
        (512, 1, 0),
        (512, RETRY_TOP_K, 1),
    ]
    assert (judges.metrics()["judge_retries"], judges.metrics()["judge_failures"]) == (1, 0)


def test_one_attempt_is_one_question():
    engine = Instructed("smollm2", "It rhymes, so yes.", "Yes")
    with pytest.raises(JudgeError, match="1 replies could not be read"):
        asyncio.run(engine.judged_by(Judge(attempts=1)).services["judge"]("Does it rhyme?"))
    assert len(engine.requests) == 1


def test_a_judge_that_reasons_has_room_for_it_in_a_verdict():
    """The template is one of bytes: the reasoning alone has 300 tokens."""
    thought = Instructed("qwen3_5", "no", reasoning="Boat and goat do. " * 17)
    assert asyncio.run(thought.judged_by(Judge(thinking=True)).services["judge"]("Does it rhyme?")) == "no"
    cut = Instructed("qwen3_5", "no", reasoning="Boat and goat do. " * 17)
    with pytest.raises(JudgeError, match="could not be read"):
        judges = cut.judged_by(Judge(thinking=True, verdict_tokens=32, attempts=1))
        asyncio.run(judges.services["judge"]("Does it rhyme?"))


def test_replies_leave_half_of_a_short_window_to_the_question():
    engine = Instructed("smollm2", "yes", '{"c1": {"rationale": "It does.", "satisfied": true}}')
    judges = engine.judged_by(Judge(), window=300)
    asyncio.run(judges.services["judge"]("Does it rhyme?"))
    asyncio.run(judges.services["grade"]("a letter", Rubric((Criterion("rhyme"),))))
    assert [request.sampling.max_tokens for request in engine.requests] == [150, 150]


@pytest.mark.parametrize(
    ("name", "thinking", "message"),
    [
        ("smollm2", True, r"with thinking: set judge\.thinking to False \(the template shows no reasoning"),
        ("deepseek_r1", False, r"without thinking: set judge\.thinking to True \(the template opens reasoning"),
    ],
)
def test_a_template_that_cannot_play_what_the_judge_is_asked_is_refused_with_the_mode_that_it_has(
    name, thinking, message
):
    with pytest.raises(ValueError, match=message):
        services.check_format(Judge(thinking=thinking), chat_of(name))
    services.check_format(Judge(thinking=not thinking), chat_of(name))


def test_a_judges_template_is_tried_before_the_run_and_only_where_one_judges(tmp_path):
    TABLE.stand_in(TEMPLATES["smollm2"]).save_pretrained(tmp_path)
    judge = Judge(checkpoint=str(tmp_path), thinking=True)
    with pytest.raises(ValueError, match=r"set judge\.thinking to False"):
        services.check(replace(JUDGED, judge=judge))
    with pytest.raises(ValueError, match=r"set judge\.thinking to False"):
        services.check(replace(JUDGED, model=str(tmp_path), judge=Judge(thinking=True)))
    services.check(replace(PLAIN, judge=judge))
    services.check(replace(JUDGED, judge=replace(judge, thinking=False)))


@pytest.mark.parametrize("thinking", [False, True])
def test_the_format_of_deepseek_judges_in_both_modes(thinking):
    services.check_format(Judge(thinking=thinking), byte_chat())


def test_the_judge_of_the_quickstart_is_asked_as_its_cold_start_taught_it():
    """Once, with thinking, in 32 tokens: what its verdicts were measured with."""
    judge = quickstart().judge
    assert (judge.thinking, judge.verdict_tokens, judge.attempts) == (True, 32, 1)
