import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.rewards.constraints import (
    KINDS,
    constraint,
    constraint_score,
    count_bullets,
    count_paragraphs,
    count_sentences,
    count_words,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("don't stop, well-known 3.5!", 4),
        ("我有two books", 4),
        ("**bold** - dash", 2),
        ("a\n\nb", 2),
        ("हिन्दी बहुत सुंदर भाषा है", 5),  # vowel signs are no letters to Python's \\w
        ("கணினி அறிவியல்", 2),
        ("cafe\u0301 au lait", 3),
        ("می\u200cروم تند", 2),
    ],
)
def test_words_are_counted(text, words):
    assert count_words(text) == words


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("One.", 1),
        ("One. Two! Three?", 3),
        ("One... Two", 2),
        ("It costs 3.5 euros, e.g. today. Dr. Who left.", 2),
        ('He said "no." Then he left.', 2),
        ("好。真的吗\uff1f是", 3),
        ("...", 0),
        ("1. Buy milk.", 1),
        ("1. Buy milk.\n2) Go home.\n", 2),
        ("- One. Two.\n- Three", 3),
        ("(a) First. (b) second", 2),
        ("* * *\nOne.", 1),
        ("We left at 3 p.m. by train. It was late.", 2),
        ("So do I. You too. No. See No. 5 there.", 4),
        ("यह एक वाक्य है। यह दूसरा है।", 2),
    ],
)
def test_sentences_are_counted(text, sentences):
    assert count_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "paragraphs"), [("", 0), ("a\nb", 1), ("a\n\nb", 2), ("a\n \n\nb\n", 2), ("a\n***\nb", 2)]
)
def test_paragraphs_are_counted(text, paragraphs):
    assert count_paragraphs(text) == paragraphs


@pytest.mark.parametrize(
    ("text", "bullets"),
    [("* * *", 0), ("- - -\n- a", 1), ("***\n\u2022 a\n  * b", 2), ("**bold** x", 0), ("-5 degrees", 0)],
)
def test_bullets_are_counted_and_rules_are_none(text, bullets):
    assert count_bullets(text) == bullets


@pytest.mark.parametrize(
    ("phrase", "text", "there"),
    [
        ("кот", "Котлета готова", False),
        ("кот", "Спит Кот.", True),
        ("बहु", "यह बहुत है", False),
        ("बहुत", "यह बहुत है", True),
        ("él", "élève", False),
        ("caf\u00e9", "un cafe\u0301!", True),
        ("stra\u00dfe", "HAUPTSTRASSE", False),
        ("stra\u00dfe", "DIE STRASSE", True),
        ("cat", "我有cat食", True),
        ("C++", "C++ it is", True),
    ],
)
def test_phrases_are_whole_words_in_any_script(phrase, text, there):
    assert constraint("includes", phrases=[phrase]).check(text).passed is there
    assert constraint("excludes", phrases=[phrase]).check(text).passed is not there


FOLLOWED = [  # kind, options, an answer that follows, one that does not, why it does not
    ("words", {"at_most": 3}, "one two three", "one two three four", "4 words"),
    ("words", {"at_least": 2, "at_most": 2}, "one two", "one", "1 words"),
    ("sentences", {"at_least": 2}, "One. Two.", "One", "1 sentences"),
    ("paragraphs", {"at_least": 2}, "a\n\nb", "a\nb", "1 paragraphs"),
    ("bullets", {"at_least": 2, "at_most": 2}, "- a\n* b", "- a\n- b\n- c", "3 bullet"),
    ("numbered", {"at_least": 2}, "1. a\n2) b", "1.5 a\n2 b", "0 numbered"),
    ("placeholders", {"at_least": 1}, "Dear [name]", "Dear []", "0 placeholders"),
    ("includes", {"phrases": ["boat", "red"]}, "A Boat, red.", "boats are red", "too few of boat"),
    ("includes", {"phrases": ["船"], "times": 2}, "船和船", "一只船", "too few"),
    ("excludes", {"phrases": ["cat"]}, "concatenate", "The CAT.", "holds cat"),
    ("starts_with", {"text": "Dear"}, " Dear Ann", "dear Ann", "begins else"),
    ("ends_with", {"text": "Bye."}, "x Bye.\n", "Bye. x", "ends otherwise"),
    ("upper_case", {}, "ALL 3", "All 3", "small"),
    ("lower_case", {}, "all 3", "All 3", "capital"),
    ("language", {"language": "zh"}, "今天天气很好", "the weather is fine today", "0% of the words"),
    ("json", {}, "[1]", "Sure: [1]", "not JSON"),
    ("json", {"schema": {"type": "array"}}, "[1]", "1", "is not of type"),
    ("sections", {"titles": ["A", "B"]}, "# A\nx\n# B\ny", "# B\nx\n# A\ny", "must be A, B"),
    ("no_commas", {}, "a and b", "a, b", "comma"),
    ("title", {}, "<<Boats>>\ntext", "<Boats>", "no <<title>>"),
]


@pytest.mark.parametrize(("kind", "options", "good", "bad", "reason"), FOLLOWED)
def test_a_constraint_passes_what_follows_it_and_says_why_else(kind, options, good, bad, reason):
    rule = constraint(kind, **options)
    assert rule.check(good).passed
    assert not rule.check(bad).passed
    assert reason in rule.check(bad).reason


def test_every_kind_is_tested_and_is_put_in_a_sentence():
    assert {kind for kind, *_ in FOLLOWED} == set(KINDS)
    assert all(constraint(kind, **options).text.endswith(".") for kind, options, *_ in FOLLOWED)


def test_the_policy_reads_what_is_checked():
    assert constraint("words", at_least=5, at_most=9).text == "Write at least 5 and at most 9 words."
    assert constraint("bullets", at_least=3, at_most=3).text == "Write exactly 3 bullet points."
    assert constraint("excludes", phrases=["a", "b", "c"]).text == 'Do not use "a", "b" or "c".'


def test_the_score_is_the_share_of_constraints_followed():
    rules = [constraint("words", at_most=3), constraint("lower_case"), constraint("includes", phrases=["sea"])]
    score = constraint_score("The sea rises", rules)
    assert (score.share, score.all_followed) == (pytest.approx(2 / 3), False)
    assert constraint_score("the sea", rules).all_followed


@pytest.mark.parametrize("answer", ["", "  ", "...", "***"])
def test_an_empty_answer_follows_nothing_even_where_less_is_asked_for(answer):
    rules = [constraint("words", at_most=3), constraint("excludes", phrases=["sea"]), constraint("no_commas")]
    assert constraint_score(answer, rules).share == 0.0


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("rhyme", {}, "unknown constraint 'rhyme'; there are words"),
        ("words", {}, "needs a bound"),
        ("words", {"at_least": 5, "at_most": 4}, "got 4 words and 5"),
        ("words", {"at_most": 2.5}, "got 2.5"),
        ("words", {"most": 2}, "wrong options for the constraint 'words'"),
        ("includes", {"phrases": "sea"}, "a list of texts"),
        ("includes", {"phrases": ["sea"], "times": 0}, "got 0"),
        ("starts_with", {"text": " "}, "must not be empty"),
        ("language", {"language": "zh", "share": 2}, "got 2"),
        ("language", {"language": "klingon"}, "'klingon'"),
        ("json", {"schema": {"type": 3}}, "the schema is wrong"),
        ("sections", {"titles": []}, "different titles"),
    ],
)
def test_constraints_that_make_no_sense_are_refused_before_any_answer(kind, options, said):
    with pytest.raises(ValueError, match=said):
        constraint(kind, **options)


def test_no_constraints_are_no_score():
    with pytest.raises(ValueError, match="at least one constraint"):
        constraint_score("x", [])


RULES = [constraint(kind, **options) for kind, options, *_ in FOLLOWED if kind != "language"]


@given(st.text(max_size=100))
def test_no_text_breaks_a_constraint(text):
    checks = constraint_score(text, RULES).checks
    assert len(checks) == len(RULES)
    assert all(check.passed is (check.reason == "") for check in checks)


@pytest.mark.parametrize("part", [".", "a.", "a. ", "\n", " \n", "- ", "[", "<<", "x.y-", "...)", "# "])
def test_long_answers_are_checked_in_little_time(part):
    start = time.monotonic()
    constraint_score("x" + part * 50_000 + "x", RULES)
    assert time.monotonic() - start < 5
