import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.rewards.format import fits_pattern, fits_schema, has_sections, has_tags, is_json, json_value

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


@pytest.mark.parametrize(
    ("text", "value"), [('{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}), ("```json\n[1]\n```", [1]), (" 7\n", 7)]
)
def test_json_stands_alone_or_in_one_block(text, value):
    assert json_value(text) == value
    assert is_json(text).score == 1.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ('Here: {"a": 1}', "Expecting value"),
        ('{"a": 1} done', "Extra data"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ("NaN", "NaN is not JSON"),
        ("[" * 200_000, "nested too deep"),
        ("{'a': 1}", "Expecting property name"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_anything_else_is_not_json_and_the_reason_is_said(text, reason):
    check = is_json(text)
    assert (check.score, reason in check.reason) == (0.0, True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "Ann", "age": 3}', ""),
        ('{"age": 3}', "'name' is a required property"),
        ('{"name": "Ann", "age": -1}', "$.age: -1 is less than"),
        ('{"name": "Ann", "job": 1}', "Additional properties"),
        ("Ann", "not JSON"),
    ],
)
def test_a_schema_decides_and_says_where_a_value_fails(text, reason):
    check = fits_schema(text, PERSON)
    assert check.passed is (reason == "")
    assert reason in check.reason


def test_a_wrong_schema_and_a_reference_out_of_it_are_the_users_mistakes():
    with pytest.raises(ValueError, match=r"the schema is wrong at \$\.type"):
        fits_schema("1", {"type": "number or so"})
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/x\.json"):
        fits_schema("1", {"$ref": "http://127.0.0.1:9/x.json"})


def test_a_pattern_matches_the_whole_text():
    assert fits_pattern(" yes\n", "yes|no").passed
    assert fits_pattern("yes, I think", "yes|no").reason == "does not match yes|no"
    with pytest.raises(ValueError, match=r"the pattern '\('"):
        fits_pattern("x", "(")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("# Plan\nfirst\n\n## Other\nx\n\n## Result:\ndone", ""),
        ("**Plan**\nfirst\n**Result:**\ndone", ""),
        ("# Result\ndone\n# Plan\nfirst", "must be Plan, Result, found result, plan"),
        ("# Plan\nfirst\n# Plan\nagain\n# Result\nx", "must be"),
        ("# Plan\n\n# Result\ndone", "the section plan is empty"),
        ("Plan and Result", "found none"),
    ],
)
def test_sections_stand_once_in_order_and_are_not_empty(text, reason):
    check = has_sections(text, ["Plan", "Result"])
    assert check.passed is (reason == "")
    assert reason in check.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>a</think>\n<answer>b</answer>", ""),
        ("<think>a</think> so <answer>b</answer>", "<answer> does not stand where it should"),
        ("<think>a</think><answer>b</answer> bye", "text after </answer>"),
        ("<think> </think><answer>b</answer>", "<think> is empty"),
        ("<answer>b</answer><think>a</think>", "<think> does not stand"),
        ("<think>a</think><answer>b</answer><answer>c</answer>", "must each stand once"),
        ("</think>a<think><answer>b</answer>", "<think> does not stand"),
        ("<think>a", "must each stand once"),
    ],
)
def test_tags_enclose_everything_in_order(text, reason):
    check = has_tags(text, ["think", "answer"])
    assert check.passed is (reason == "")
    assert reason in check.reason


def test_titles_and_tags_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="different titles"):
        has_sections("x", ["A", "a"])
    with pytest.raises(ValueError, match="tags must be words"):
        has_tags("x", ["a b"])


@given(st.text(alphabet="#*<>{}[]\"'` \nathink/nswer:1", max_size=80))
def test_no_text_breaks_a_check(text):
    checks = is_json(text), fits_schema(text, PERSON), has_sections(text, ["a"]), has_tags(text, ["think"])
    assert all(check.passed is (check.reason == "") for check in checks)
    assert checks[0].passed or not checks[1].passed, "what fits a schema is JSON"


@pytest.mark.parametrize("part", ["# ", "**", "<think>", "#", "\n# a", "```\n"])
def test_long_answers_are_checked_in_little_time(part):
    start = time.monotonic()
    is_json(part * 50_000), has_sections(part * 50_000, ["a"]), has_tags(part * 50_000, ["think"])
    assert time.monotonic() - start < 5
