import asyncio
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from trimtab.rewards.judging.model import JudgeModel, Reply, VerdictCache, yes_no
from trimtab.rewards.judging.rubric import Criterion, JudgeError, Rubric, parse_verdict, rubric_score


class Replies:
    """A model that says one thing after the other, the last one for ever."""

    def __init__(self, *texts: str, identity: str = "a model") -> None:
        self.identity = identity
        self.prompts: list[str] = []
        self._texts = texts

    async def __call__(self, prompt: str, schema: Mapping[str, Any] | None, attempt: int) -> Reply:
        self.prompts.append(prompt)
        text = self._texts[min(len(self.prompts), len(self._texts)) - 1]
        await asyncio.sleep(0)
        return Reply(text, 10, 2)


def ask(model: JudgeModel, prompt: str, schema: Mapping[str, Any] | None = None) -> bool:
    return asyncio.run(model.ask(prompt, parse_verdict, schema=schema))


def test_equal_questions_are_asked_once():
    complete = Replies("yes")
    model = JudgeModel(complete)
    assert ask(model, "rhymes?") and ask(model, "rhymes?") and ask(model, "scans?")
    assert complete.prompts == ["rhymes?", "scans?"]
    assert (model.usage.calls, model.usage.cache_hits, model.usage.prompt_tokens) == (2, 1, 20)


def test_equal_questions_at_the_same_time_are_asked_once():
    complete = Replies("yes")
    model = JudgeModel(complete)

    async def sixteen() -> list[bool]:
        return await asyncio.gather(*(model.ask("rhymes?", parse_verdict) for _ in range(16)))

    assert asyncio.run(sixteen()) == [True] * 16
    assert len(complete.prompts) == 1


def test_equal_questions_at_the_same_time_share_a_failure():
    complete = Replies("perhaps")
    model = JudgeModel(complete, attempts=2)

    async def sixteen() -> list[bool | BaseException]:
        return await asyncio.gather(*(model.ask("rhymes?", parse_verdict) for _ in range(16)), return_exceptions=True)

    assert all(isinstance(result, JudgeError) for result in asyncio.run(sixteen()))
    assert len(complete.prompts) == 2


def test_one_who_gives_up_waiting_does_not_take_the_verdict_from_the_others():
    async def two() -> list[bool | BaseException]:
        model = JudgeModel(Replies("yes"))
        first, second = (asyncio.ensure_future(model.ask("rhymes?", parse_verdict)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        return await asyncio.gather(first, second, return_exceptions=True)

    given_up, verdict = asyncio.run(two())
    assert isinstance(given_up, asyncio.CancelledError) and verdict is True


def test_a_cache_in_a_file_serves_the_next_run_and_other_models_do_not_share_it(tmp_path):
    file = tmp_path / "verdicts.sqlite"
    asked = []
    for complete in (Replies("yes"), Replies("no"), Replies("no", identity="another")):
        cache = VerdictCache(file)
        asked.append((ask(JudgeModel(complete, cache=cache), "rhymes?"), len(complete.prompts)))
        cache.close()
    assert asked == [(True, 1), (True, 0), (False, 1)]


def test_another_schema_is_another_question():
    complete = Replies("yes", "no")
    model = JudgeModel(complete)
    assert ask(model, "rhymes?", {"type": "string"}) and not ask(model, "rhymes?", {"type": "object"})


def test_malformed_replies_are_never_remembered():
    complete = Replies("perhaps", "perhaps", "yes")
    model = JudgeModel(complete, attempts=2)
    with pytest.raises(JudgeError, match=r"2 replies could not be read.*perhaps"):
        ask(model, "rhymes?")
    assert ask(model, "rhymes?")
    assert (model.usage.calls, model.usage.retries, model.usage.failures) == (3, 1, 1)


WRITER = """
import sys
from trimtab.rewards.judging.model import VerdictCache
cache = VerdictCache(sys.argv[1])
for i in range(200):
    cache.put(f"{i}", "yes")
    cache.put(f"{sys.argv[2]}-{i}", "no")
"""


def test_several_processes_share_a_cache(tmp_path):
    file = tmp_path / "verdicts.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), name]) for name in "abc"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    cache = VerdictCache(file)
    assert all(cache.get(f"{name}-{i}") == "no" for name in "abc" for i in range(200))
    assert cache.get("199") == "yes" and cache.get("200") is None


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("not a database " * 100)
    with pytest.raises(ValueError, match=r"notes.txt cannot be used as a cache"):
        VerdictCache(file)


def test_a_model_that_cannot_be_reached_is_a_judge_error_and_is_asked_once():
    class Broken(Replies):
        async def __call__(self, prompt: str, schema: Mapping[str, Any] | None, attempt: int) -> Reply:
            self.prompts.append(prompt)
            raise ConnectionError("engine gone")

    complete = Broken()
    with pytest.raises(JudgeError, match="engine gone"):
        ask(JudgeModel(complete), "rhymes?")
    assert len(complete.prompts) == 1


def test_a_model_can_judge_criterion_by_criterion():
    complete = Replies("Yes ", "perhaps", "no")
    rubric = Rubric((Criterion("rhyme"), Criterion("scan")))
    score = asyncio.run(rubric_score("a poem", rubric, yes_no(JudgeModel(complete))))
    assert sorted(score.verdicts) == [False, True]
    assert len(complete.prompts) == 3


def test_no_attempt_at_all_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        JudgeModel(Replies("yes"), attempts=0)
