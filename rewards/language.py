"""Language consistency: the share of words that are in the language asked for.

The script of a word says most: no detector is asked whether a Han character is English. Languages that share a script
are told apart by the detector py3langid, whose model lies in its package, on stretches long enough to tell.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

Language = str
"""A code of ISO 639-1, one of SCRIPTS."""

SCRIPTS: Mapping[Language, tuple[str, ...]] = {
    **dict.fromkeys(("de", "en", "es", "fr", "id", "it", "nl", "pl", "pt", "sv", "tr", "vi"), ("LATIN",)),
    **dict.fromkeys(("ru", "uk"), ("CYRILLIC",)),
    **dict.fromkeys(("ar", "fa"), ("ARABIC",)),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "th": ("THAI",),
    "zh": ("CJK",),
}
"""The scripts of each language, as Unicode names them."""

NAMES: Mapping[Language, str] = {
    "ar": "Arabic", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "fa": "Persian", "fr": "French",
    "he": "Hebrew", "hi": "Hindi", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ru": "Russian", "sv": "Swedish", "th": "Thai",
    "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
"""Their names in English."""

_SHARED = {"LATIN", "CYRILLIC", "ARABIC"}
_ENOUGH_LETTERS = 20
_SURE = 0.9

_LATIN = r"A-Za-z\u00c0-\u024f"
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
_FOREIGN = rf"[^\W\d_{_LATIN}]"
_NOT_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"  # code
    r"|\$\$[^$]*\$\$|\$(?! )[^$\n]*(?<! )\$(?!\d)|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]|\\[A-Za-z]+"  # LaTeX
    r"|https?://[\w./?&=%#~+:@-]+",
    re.DOTALL,
)
_NAME = r"[A-Z][\w+-]*(?:\.\d+)*(?: [A-Z][\w+-]*(?:\.\d+)*){0,2}"
_FOREIGN_NAME = re.compile(  # up to three capitalised Latin words that stand next to a word of another script
    rf"(?:(?<={_FOREIGN})|(?<={_FOREIGN} )){_NAME}(?![{_LATIN}]| [{_LATIN}])"
    rf"|(?<![{_LATIN}])(?<![{_LATIN}] ){_NAME}(?= ?{_FOREIGN})"
)
_WORD = re.compile(rf"[{_HAN}]|[{_LATIN}]+|[^\W\d_{_LATIN}{_HAN}]+")
_SENTENCE = re.compile(r"[^.!?\n。\uff01\uff1f]+")


def language_consistency(text: str, language: Language) -> float:
    """Share of the words of text that are in language, in [0, 1]; 1.0 for a text without words.

    A Han character is a word, as is a run of letters of another script. Digits, punctuation, code (in backquotes),
    formulas (LaTeX), links and, in a language of another script, Latin names of up to three words do not count. Short
    texts are taken for any language of their script. Source: DeepSeek-R1, section 2.3.2 (arXiv 2501.12948).

    Raises:
        ValueError: language is not one of SCRIPTS.

    >>> language_consistency("7 plus 8 得 15", "en")
    0.5
    """
    if language not in SCRIPTS:
        raise ValueError(f"language must be one of {', '.join(sorted(SCRIPTS))}, got {language!r}")
    own = SCRIPTS[language]
    plain = _NOT_WORDS.sub(" ", text)
    if "LATIN" not in own:
        plain = _FOREIGN_NAME.sub(" ", plain)
    words = right = 0
    for stretch in _stretches(plain, own):
        mine = [word for word in stretch if _script(word) in own]
        words += len(stretch)
        right += len(mine) if _may_be(" ".join(mine), language) else 0
    return right / words if words else 1.0


def _stretches(text: str, own: tuple[str, ...]) -> Iterator[list[str]]:
    """The words of one sentence, or of as many as it takes to tell a language."""
    stretch, letters = list[str](), 0
    for sentence in _SENTENCE.findall(text):
        words = _WORD.findall(sentence)
        stretch += words
        letters += sum(len(word) for word in words if _script(word) in own)
        if letters >= _ENOUGH_LETTERS:
            yield stretch
            stretch, letters = [], 0
    yield stretch


def _script(word: str) -> str:
    return unicodedata.name(word[0], "").partition(" ")[0]


def _may_be(text: str, language: Language) -> bool:
    """Whether a text in the script of a language is not surely in another language."""
    if _SHARED.isdisjoint(SCRIPTS[language]) or len(text) < _ENOUGH_LETTERS:
        return True
    found, probability = _detector().classify(text)
    return found == language or probability < _SURE


@cache
def _detector() -> Any:
    # reads its model: a second, and only where it is asked
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    detector = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    detector.set_languages(list(SCRIPTS))
    return detector
