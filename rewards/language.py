"""Language consistency: the share of words that are in the language asked for."""

import re
from typing import Literal

Language = Literal["en", "zh"]

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_WORD = re.compile(r"(?P<zh>[\u3400-\u4dbf\u4e00-\u9fff])|(?P<en>[A-Za-z\u00c0-\u024f]+)|(?P<other>[^\W\d_])")


def language_consistency(text: str, language: Language) -> float:
    """Share of the words of text that are in language, in [0, 1]; 1.0 for a text without words.

    A run of Latin letters is one English word, each Han character is one Chinese word, each letter of another
    script is a word of neither. Digits, punctuation and code (in backquotes) do not count.
    Source: DeepSeek-R1, section 2.3.2 (arXiv 2501.12948).

    Raises:
        ValueError: language is not "en" or "zh".

    >>> language_consistency("7 plus 8 得 15", "en")
    0.5
    """
    if language not in ("en", "zh"):
        raise ValueError(f"language must be 'en' or 'zh', got {language!r}")
    words = [match.lastgroup for match in _WORD.finditer(_CODE.sub(" ", text))]
    return words.count(language) / len(words) if words else 1.0
