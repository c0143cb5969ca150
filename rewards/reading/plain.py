"""Answers as plain text: without the marks around them, folded for comparison, split where they leave a choice open."""

import re
import unicodedata

_OR = re.compile(
    r"\\(?:text|mathrm)\s*\{\s*(?:or|或者?)\s*\}|\\(?:lor|vee)\b"
    r"|\b(?:or|alternatively|maybe|perhaps)\b|或者?|[;\uff1b]",
    re.IGNORECASE,
)
_PAIRS = tuple(
    pair.split()
    for pair in (
        "** **",
        "__ __",
        "* *",
        "_ _",
        "$$ $$",
        "$ $",
        r"\( \)",
        r"\[ \]",
        '" "',
        "' '",
        "` `",
        "\u201c \u201d",
        "\u2018 \u2019",
    )
)
_IN_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([a-z])\)|\[([a-z])\]")


def bare(text: str) -> str:
    r"""The text without emphasis, quotation marks, signs of formulas, \text{} or a final full stop around it."""
    before = None
    while text != before:
        before, text = text, text.strip().rstrip("\u3002")
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for left, right in _PAIRS:
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)]
        if text.endswith("}") and (wrapped := _IN_WORDS.fullmatch(text)):
            text = wrapped[1]
    return text


def normalised(text: str) -> str:
    """The text that exact() compares: compatibility characters and case folded, runs of spaces as one, bare; the
    letter of a choice, such as "(C)" or "c)", alone."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    plain = " ".join(bare(folded).split())
    letter = _CHOICE.fullmatch(plain)
    return (letter[1] or letter[2]) if letter else plain


def alternatives(answer: str) -> tuple[str, ...]:
    """The different answers that an answer leaves open, such as "3" and "5" of "3 or 5"; one for a plain answer.

    A comma does not separate alternatives: it joins the parts of one answer.
    """
    different = {normalised(part): part.strip() for part in reversed(_OR.split(answer)) if normalised(part)}
    return tuple(reversed(different.values())) or ("",)
