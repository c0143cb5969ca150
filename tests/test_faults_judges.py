"""A judge behind an endpoint that goes away: the run waits, goes on, or loses what needs it."""

import asyncio
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from judge_server import Act, judge_server

from trimtab.grpo.config import Judge
from trimtab.grpo.sampling import services
from trimtab.rewards.judging.endpoint import Endpoint
from trimtab.rewards.judging.model import JudgeModel
from trimtab.rewards.judging.rubric import JudgeError, parse_verdict

TESTS = Path(__file__).parent


def asked(endpoint: Endpoint, *prompts: str) -> list[object]:
    async def ask() -> list[object]:
        return await asyncio.gather(*(endpoint(prompt, None, 0) for prompt in prompts), return_exceptions=True)

    return asyncio.run(ask())


@contextmanager
def server_process(port: int) -> Iterator[subprocess.Popen[str]]:
    """A judge in a process of its own, which can be killed."""
    program = f"""
        import http.server, sys, time
        sys.path.insert(0, {str(TESTS)!r})
        import judge_server
        bind = judge_server.ThreadingHTTPServer
        judge_server.ThreadingHTTPServer = lambda address, handler: bind(("127.0.0.1", {port}), handler)
        with judge_server.judge_server([judge_server.Act("yes")]) as server:
            print(server.url, flush=True)
            time.sleep(100)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_judge_that_is_killed_and_comes_back_is_waited_for_and_both_are_told(capsys):
    with server_process(0) as first:
        url = first.stdout.readline().strip()
        endpoint = Endpoint("m", url, seconds=5, retries=0, patience=30)
        assert asked(endpoint, "a")[0].text == "yes"
        first.kill()
    port = int(url.split(":")[2].split("/")[0])

    async def outage() -> list[object]:
        waiting = asyncio.gather(*(endpoint(prompt, None, 0) for prompt in "bcd"))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        with server_process(port) as second:
            await asyncio.to_thread(second.stdout.readline)
            return await asyncio.wait_for(waiting, 30)

    assert [reply.text for reply in asyncio.run(outage())] == ["yes"] * 3
    told = capsys.readouterr().err
    assert told.count("the judge answers again") == 1


def test_when_patience_is_over_requests_fail_at_once_until_one_is_answered():
    with judge_server([Act(status=503)]) as server:
        endpoint = Endpoint("m", server.url, retries=0, patience=1.0)
        assert all(isinstance(error, openai.InternalServerError) for error in asked(endpoint, "a", "b"))
        started = time.monotonic()
        assert isinstance(asked(endpoint, "c")[0], openai.InternalServerError)
        assert time.monotonic() - started < 0.9, "nobody waits a second time"


@pytest.mark.parametrize(
    ("status", "waits"), [(429, True), (500, True), (503, True), (400, False), (401, False), (404, False)]
)
def test_what_is_down_is_waited_for_and_what_is_refused_is_not(status, waits):
    with judge_server([Act(status=status), Act("yes")]) as server:
        (answer,) = asked(Endpoint("m", server.url, retries=0, patience=20), "a")
        assert (getattr(answer, "text", None) == "yes") is waits and len(server.requests) == 1 + waits


def test_a_judge_that_says_nothing_in_time_is_down():
    with judge_server([Act("yes", seconds=3.0), Act("yes")]) as server:
        (answer,) = asked(Endpoint("m", server.url, seconds=0.5, retries=0, patience=20), "a")
        assert answer.text == "yes" and len(server.requests) == 2


def test_without_patience_an_outage_is_no_verdict_with_its_reason():
    model = JudgeModel(Endpoint("m", "http://127.0.0.1:9/v1", retries=0))
    with pytest.raises(JudgeError, match="no verdict: Connection error"):
        asyncio.run(model.ask("?", parse_verdict))


def test_at_the_start_of_a_run_nobody_waits(monkeypatch):
    from test_services import judged_by

    started = time.monotonic()
    with pytest.raises(ValueError, match="does not answer"):
        services.check(judged_by("http://127.0.0.1:9/v1"))
    assert time.monotonic() - started < 30


def test_settings_of_the_judge_reach_its_endpoint():
    with judge_server([Act("yes")]) as server:
        for temperature, sent in ((None, None), (0.0, 0.0), (0.3, 0.3)):
            asked(services._endpoint(Judge(model="m", base_url=server.url, temperature=temperature)), "a")
            assert server.requests[-1].get("temperature") == sent
    for wrong in ({"seconds": 0}, {"patience_s": -1}, {"temperature": 3.0}):
        with pytest.raises(ValueError, match=r"judge\."):
            Judge(**wrong)


@pytest.mark.parametrize(
    "text", ["yes", " Yes.", "**Yes**", "YES!", "Yes, because it rhymes.", "*yes* - it does", "Yes: it greets."]
)
def test_a_verdict_may_be_emphasised_and_give_its_reason(text):
    assert parse_verdict(text) is True
    assert parse_verdict(text.replace("Yes", "No").replace("yes", "no").replace("YES", "NO")) is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        "maybe",
        "yes and no",
        "Yes or no?",
        "no, wait, yes",
        "yesterday",
        "I say yes",
        "Yes it might",
        "north",
        "yes no",
    ],
)
def test_a_judge_that_hesitates_has_given_no_verdict(text):
    with pytest.raises(ValueError, match="a verdict begins with yes or no"):
        parse_verdict(text)
