import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.rewards.language import language_consistency


@pytest.mark.parametrize(
    ("text", "en", "zh"),
    [
        ("two plus two", 1.0, 0.0),
        ("二加二", 0.0, 1.0),
        ("7 plus 8 得 15", 1 / 2, 1 / 2),
        ("the river 很大", 1 / 2, 1 / 2),  # two words, two characters
        ("naïve café", 1.0, 0.0),
        ("привет hello", 1 / 2, 0.0),  # a word of a third script is of neither
        ("", 1.0, 1.0),
        ("12 + 30 = 42!", 1.0, 1.0),
        ("好 `x = y` 好", 0.0, 1.0),
        ("好\n```python\nreturn x\n```", 0.0, 1.0),
        ("好 ```return x", 0.0, 1.0),  # an unclosed block is code to its end
        (r"设 $x = \text{two}$ 则 $$\frac{a}{b}$$ 得 \(y\)", 0.0, 1.0),
        ("The price is $5 and not $6 here", 1.0, 0.0),
        (r"\[ \sum_{i} x_i \] 很大", 0.0, 1.0),
        ("看 https://example.org/a_page?q=two 吧", 0.0, 1.0),
        ("我用 Python 和DeepSeek-V3.2写", 3 / 7, 1.0),  # in Chinese, names do not count
        ("这是 New York City 的地图", 3 / 8, 1.0),
        ("The Old Boat Is Red. 很好", 5 / 7, 2 / 7),  # a sentence in capitals is no name
        ("我 Think the boat is red", 5 / 6, 1 / 6),
    ],
)
def test_consistency_is_the_share_of_words_in_the_language(text, en, zh):
    assert language_consistency(text, "en") == pytest.approx(en)
    assert language_consistency(text, "zh") == pytest.approx(zh)


GERMAN = "Der Zug nach Hamburg verlässt den Bahnhof um neun Uhr am Morgen."
FRENCH = "Le train pour Paris quitte la gare à neuf heures du matin."
ENGLISH = "The train to London leaves the station at nine in the morning."


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        (ENGLISH, "en", 1.0),
        (GERMAN, "de", 1.0),
        (FRENCH, "en", 0.0),
        (ENGLISH, "fr", 0.0),
        (f"{ENGLISH} {GERMAN}", "en", 12 / 24),
        (f"{ENGLISH}火车九点开。", "en", 12 / 17),
        ("Oui. Non. Je ne sais pas. Peut-être que oui, peut-être que non.", "en", 0.0),  # short sentences are joined
        ("Non.", "en", 1.0),  # too short to tell
        ("Поезд отправляется в девять часов утра.", "ru", 1.0),
        ("Поезд отправляется в девять часов утра.", "en", 0.0),
        ("今日は天気がいいですね", "zh", 4 / 6),
        ("今日は天気がいいですね", "ja", 1.0),
    ],
)
def test_languages_of_one_script_are_told_apart_where_there_is_enough_to_read(text, language, share):
    assert language_consistency(text, language) == pytest.approx(share)


@pytest.mark.parametrize("part", ["$", "\\(", "\\[", "$$", "Ab ", "我 Ab ", "`", "a. ", "https://", "\\"])
def test_long_texts_are_read_in_little_time(part):
    start = time.monotonic()
    language_consistency(part * 30_000, "en"), language_consistency(part * 30_000, "zh")
    assert time.monotonic() - start < 10


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="got 'xx'"):
        language_consistency("bonjour", "xx")


@given(st.text())
def test_shares_of_two_languages_never_exceed_one_unless_there_are_no_words(text):
    """Capitals aside, which can be names in one language and words in the other."""
    en, zh = (language_consistency(text.casefold(), language) for language in ("en", "zh"))
    assert (en == zh == 1.0) or 0.0 <= en + zh <= 1.0 + 1e-12
