"""Numbers with units, as people and LaTeX write them."""

import re
from fractions import Fraction

from trimtab.rewards.reading.plain import bare

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_VULGAR = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_PART = r"(?:\{\s*(-?(?:\d+(?:\.\d+)?|\.\d+))\s*\}|\s*(\d))"
_FRACTION = re.compile(rf"\\[dtc]?frac\s*{_PART}\s*{_PART}")
_OVER = re.compile(r"\{\s*(-?\d+)\s*\\over\s*(\d+)\s*\}")
_REPEATING = re.compile(
    r"(?P<whole>\d*)\.(?P<start>\d*)"
    r"(?:\\(?:overline|bar|dot)\s*\{(?P<block>\d+)\}|\\(?:overline|bar|dot)\s*(?P<digit>\d)|\((?P<brackets>\d+)\)"
    r"|(?P<shown>(?P<unit>\d{1,6}?)(?P=unit){2,})(?:\.\.\.|\u2026|\\[lc]?dots\b))"
)
_PLAIN = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname|boxed)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\!|\\(?:left|right)\b", ""),
        (r"(?<=\d)\{,\}(?=\d{3})", ","),
        (r"(?<=\d)(?:\\[,;: ]|[\u00a0\u2009\u202f~ ])(?=\d{3}(?!\d))", "\u2009"),  # groups of three
        (r"\\[,;: ]|~|\\q?quad\b|\\(?:thin)?space\b|[\u00a0\u202f]", " "),
        (r"\\([%$])", r"\1"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "°"),
        (r"[\u2212\u2012\u2013\u2010\u2011\ufe63\uff0d]", "-"),
        (r"\\times\b|\\cdot\b|[\u00d7\u00b7\u22c5]|(?<=\d)\s*x(?=\s*10\s*(?:\^|\*\*))", "*"),
        (r"\*\*\s*(?=[-+]?\d)", "^"),
        (r"\^\s*\{\s*([-+]?\d+)\s*\}", r"^\1"),
        (r"\bper\s?cent\b", "%"),
    )
)
_LEADING = re.compile(r"(?:[A-Za-z]\w*\s*)?(?:=|\\approx\b|\\simeq\b|\u2248)\s*")
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_QUANTITY = re.compile(
    r"(?P<currency>[$€£¥]?)\s*(?P<sign>[-+]?)\s*(?P<currency_after>[$€£¥]?)\s*"
    r"(?:(?P<whole>\d+)\s+(?=\d+\s*/))?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:\u2009\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
    r"(?:\s*/\s*(?P<divisor>-?\d+(?:\.\d+)?))?"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})|\s*\*\s*10\s*\^\s*(?P<power>[-+]?\d{1,3})|\s*\^\s*(?P<raised>[-+]?\d{1,3}))?"
    r"(?!\s*[\d.,/^*+(:-])(?![_'\u2019x]\d)\s*(?P<scale>(?:thousand|million|billion|trillion)\b)?\s*(?P<unit>.*)",
    re.DOTALL,
)
_LONGEST = 4000
"""Digits of a power, and characters that are read."""


def repeating(text: str) -> str:
    r"""The text with every decimal fraction that repeats, as in 0.1\overline{6}, 0.(3) or 0.333..., as a \frac."""
    return _REPEATING.sub(_as_fraction, text)


def quantity(text: str) -> tuple[float, str] | None:
    r"""A number and the unit behind it ("" without one); None where the text does not begin with a number.

    Reads 1,234.5, 1{,}234, 12 345, 7/2, \frac{7}{2}, \frac72, 3 1/2, 3\frac{1}{2}, 2.5e-3, 2.5 \times 10^{-3}, 10^6,
    0.\overline{3}, 3 million, 12%, $3.50, whose unit is the sign, and x = 5. Ranges, sums and lists are no quantity.

    >>> quantity("1,250.5 km.")
    (1250.5, 'km')
    """
    plain = bare(text)
    if len(plain) > _LONGEST:
        return None
    found = _QUANTITY.fullmatch(_plain(plain))
    if found is None:
        return None
    unit = " ".join(f"{found['currency']}{found['currency_after']} {found['unit']}".split())
    try:
        return float(_value(found)), unit
    except (ValueError, ZeroDivisionError, OverflowError):  # model output: too large, or no number at all
        return None


def _plain(text: str) -> str:
    text = re.sub(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda power: "^" + power[0].translate(_SUPERSCRIPTS), text)
    text = "".join(f" {_VULGAR[letter]}" if letter in _VULGAR else letter for letter in text)
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    text = repeating(text)
    text = _OVER.sub(r" \1/\2", text)
    text = _FRACTION.sub(lambda part: f" {part[1] or part[2]}/{part[3] or part[4]}", text).strip()
    return _LEADING.sub("", text, count=1).strip() if _LEADING.match(text) else text


def _value(found: re.Match[str]) -> Fraction:
    """What the groups of _QUANTITY say, exactly.

    Raises:
        ValueError: a mixed number whose second part is no proper fraction, or a power too large to work out.
        ZeroDivisionError: a fraction over 0.
    """
    digits, raised = found["digits"].replace(",", "").replace("\u2009", ""), int(found["raised"] or 1)
    if found["raised"] and (found["divisor"] or len(digits) * abs(raised) > _LONGEST):
        raise ValueError("a power of a fraction, or too large")
    value = Fraction(digits) ** raised / Fraction(found["divisor"] or 1)
    value *= Fraction(10) ** (int(found["exponent"] or found["power"] or 0) + _SCALES.get(found["scale"], 0))
    if found["whole"]:
        if not 0 < value < 1 or "." in digits or found["exponent"] or found["power"]:
            raise ValueError("no mixed number")
        value += int(found["whole"])
    return -value if found["sign"] == "-" else value


def _as_fraction(found: re.Match[str]) -> str:
    start = found["start"] or ""
    block = found["block"] or found["digit"] or found["brackets"] or found["unit"]
    whole = int((found["whole"] or "") + start or 0)
    value = (whole + Fraction(int(block), 10 ** len(block) - 1)) / 10 ** len(start)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
