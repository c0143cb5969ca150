import asyncio
import contextlib
import json

import pytest
from judge_server import Act, judge_server

from trimtab.rewards.judging.endpoint import RETRY_TEMPERATURE, Endpoint
from trimtab.rewards.judging.model import JudgeModel
from trimtab.rewards.judging.rubric import Criterion, JudgeError, Rubric, RubricScore
from trimtab.rewards.judging.verdicts import grade, verdict_schema

RUBRIC = Rubric((Criterion("rhyme", 3.0), Criterion("mention the boat")))
GOOD = json.dumps(
    {"c1": {"rationale": "boat, goat", "satisfied": True}, "c2": {"rationale": "none", "satisfied": False}}
)


def graded(url: str, **options) -> tuple[RubricScore, JudgeModel]:
    model = JudgeModel(Endpoint("a-model", url, seconds=options.pop("seconds", 5.0), **options))
    return asyncio.run(grade("A boat, a goat.", RUBRIC, model, task="Write.")), model


def test_verdicts_come_back_with_their_reasons_and_their_cost():
    with judge_server([Act(GOOD)]) as server:
        score, model = graded(server.url)
    assert (score.verdicts, score.score) == ((True, False), 0.75)
    assert score.rationales == ("boat, goat", "none")
    assert (model.usage.calls, model.usage.prompt_tokens, model.usage.completion_tokens) == (1, 11, 7)


def test_the_request_asks_for_the_schema_greedily_and_sends_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    with judge_server([Act(GOOD)]) as server:
        graded(server.url, key_variable="A_KEY")
    (request,) = server.requests
    assert request["temperature"] == 0.0 and "seed" not in request
    assert request["response_format"]["json_schema"] == {"name": "verdict", "schema": verdict_schema(2), "strict": True}
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    "bad",
    [
        Act(status=500),
        Act(status=429),
        Act(status=503),
        Act(GOOD, seconds=1.0),  # longer than the time limit
        Act("no JSON"),
        Act(GOOD[:-1]),
        Act(GOOD, finish="length"),
        Act(None),
        Act(GOOD.replace("c2", "c3")),
        Act(json.dumps({"c1": {"rationale": "", "satisfied": True}})),
        Act(GOOD.replace("true", '"yes"')),
        Act(GOOD.replace("true", "1")),
    ],
    ids=lambda act: f"{act.status} {act.content} {act.finish} {act.seconds}",
)
def test_a_request_that_fails_or_brings_no_verdict_is_repeated(bad):
    with judge_server([bad, Act(GOOD)]) as server:
        score, model = graded(server.url, seconds=0.5)
    assert score.score == 0.75
    assert (len(server.requests), model.usage.retries, model.usage.failures) == (2, 1, 0)


def test_a_malformed_verdict_is_asked_for_again_warmer_and_with_another_seed():
    with judge_server([Act("no JSON"), Act("[]"), Act(GOOD)]) as server:
        graded(server.url)
    assert [(request["temperature"], request.get("seed")) for request in server.requests] == [
        (0.0, None),
        (RETRY_TEMPERATURE, 1),
        (RETRY_TEMPERATURE, 2),
    ]


@pytest.mark.parametrize(
    ("bad", "requests", "reason"),
    [
        (Act(status=500), 2, "500"),
        (Act(GOOD, seconds=1.0), 2, r"imed out|TimeoutError"),
        (Act("no JSON"), 3, "3 replies could not be read"),
        (Act(GOOD.replace("c2", "rhyme")), 3, "verdicts must be on c1 to c2, got c1, rhyme"),
        (Act(GOOD.replace("true", "null")), 3, "c1.satisfied"),
        (Act(status=401), 1, "401"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_judge_that_never_rules_is_a_judge_error_and_never_a_score(bad, requests, reason):
    with judge_server([bad]) as server, pytest.raises(JudgeError, match=reason):
        graded(server.url, seconds=0.5, retries=1)
    assert len(server.requests) == requests


def test_a_server_that_is_not_there_is_a_judge_error():
    with pytest.raises(JudgeError, match=r"[Cc]onnection"):
        graded("http://127.0.0.1:9/v1", retries=0)


def test_no_more_requests_are_under_way_than_allowed_and_the_endpoint_outlives_an_event_loop():
    with judge_server([Act(GOOD, seconds=0.1)]) as server:
        model = JudgeModel(Endpoint("a-model", server.url, at_once=3))

        async def many(start: int) -> list[RubricScore]:
            return await asyncio.gather(*(grade(f"poem {start + i}", RUBRIC, model) for i in range(9)))

        scores = asyncio.run(many(0)) + asyncio.run(many(9))
    assert {score.score for score in scores} == {0.75}
    assert (len(server.requests), server.most_at_once) == (18, 3)


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"seconds": 0}, {"retries": -1}, {"at_once": 0}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Endpoint("a-model", "http://localhost/v1", **wrong)


def test_a_reply_that_drips_is_given_up():
    """Each byte comes in time, the whole never: the limit on all tries together ends it."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()

    async def asked() -> None:
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        model = JudgeModel(Endpoint("a-model", f"http://127.0.0.1:{port}/v1", seconds=0.5, retries=0))
        with pytest.raises(JudgeError, match="TimeoutError"):
            await grade("A boat.", RUBRIC, model)
        server.close()

    asyncio.run(asyncio.wait_for(asked(), timeout=20))
