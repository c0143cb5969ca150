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
        ("привет hello", 1 / 7, 0.0),  # each letter of a third script is a word of neither
        ("", 1.0, 1.0),
        ("12 + 30 = 42!", 1.0, 1.0),
        ("好 `x = y` 好", 0.0, 1.0),
        ("好\n```python\nreturn x\n```", 0.0, 1.0),
        ("好 ```return x", 0.0, 1.0),  # an unclosed block is code to its end
    ],
)
def test_consistency_is_the_share_of_words_in_the_language(text, en, zh):
    assert language_consistency(text, "en") == pytest.approx(en)
    assert language_consistency(text, "zh") == pytest.approx(zh)


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="'fr'"):
        language_consistency("bonjour", "fr")


@given(st.text())
def test_shares_of_the_two_languages_never_exceed_one_unless_there_are_no_words(text):
    en, zh = language_consistency(text, "en"), language_consistency(text, "zh")
    assert (en == zh == 1.0) or 0.0 <= en + zh <= 1.0 + 1e-12
