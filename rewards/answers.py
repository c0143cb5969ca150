"""Answers that a program can check: exact, numeric and mathematical. Each takes the answer alone, see final_answer."""

import math
import re
import unicodedata
from collections.abc import Collection, Mapping
from fractions import Fraction

from trimtab.rewards.equivalence import compare_expressions

_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_MARKER = re.compile(
    r"\banswer\b(?:\s+is)?\**\s*[:\uff1a]\**"
    r"|\banswer\s+is\b"
    r"|答案\s*(?:[是为]\**\s*[:\uff1a]?|\**\s*[:\uff1a])\**",
    re.IGNORECASE,
)
_OR = re.compile(
    r"\\(?:text|mathrm)\s*\{\s*(?:or|或者?)\s*\}|\\(?:lor|vee)\b"
    r"|\b(?:or|alternatively|maybe|perhaps)\b|或者?|[;\uff1b]",
    re.IGNORECASE,
)
_PLAIN = tuple(  # how LaTeX and typography write what a quantity is made of
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:text|mathrm|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}", r"\1/\2"),
        (r"\\[,;:! ]|~", " "),
        (r"\\([%$])", r"\1"),
        (r"\\times|\\cdot|[\u00d7\u00b7]|(?<=\d)\s*x(?=\s*10\s*\^)", "*"),
        (r"\^\s*\{\s*([-+\u2212]?\d+)\s*\}", r"^\1"),
        ("\u2212", "-"),
    )
)
_QUANTITY = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<currency>[$€£¥]?)\s*"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:\s*/\s*(?P<divisor>\d+))?"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})|\s*\*\s*10\s*\^(?P<power>[-+]?\d{1,3}))?"
    r"(?!\s*[\d.,/^*+(-])\s*(?P<unit>.*)",
    re.DOTALL,
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
_CONSTANTS = ((re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])|\u03c0"), r"\\pi "), (re.compile(r"\u221e"), r"\\infty "))


def boxed(text: str) -> tuple[str, ...]:
    r"""What every \boxed{...} of a text holds, in the order of their ends; an unclosed box is none.

    >>> boxed(r"\boxed{\frac{1}{2}} then \boxed{3}")
    ('\\frac{1}{2}', '3')
    """
    found, opened = [], []
    for brace in _BRACE.finditer(text):
        if brace["box"] or brace["open"]:
            opened.append(brace.end() if brace["box"] else None)
        elif brace["close"] and opened:
            start = opened.pop()
            if start is not None:
                found.append(text[start : brace.start()].strip())
    return tuple(found)


def final_answer(text: str) -> str | None:
    r"""The answer that a text ends with; None when it names none.

    It is the last \boxed{...}; without one, the last <answer>...</answer>; without that, the rest of the line after
    the last "answer:" or "answer is" (or 答案:), in any case, without emphasis and a final full stop.
    """
    if boxes := boxed(text):
        return boxes[-1]
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    if closed and opened:
        return inside.strip()
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    rest = text[markers[-1].end() :].strip()
    return _bare(rest.splitlines()[0]) if rest else None


def alternatives(answer: str) -> tuple[str, ...]:
    """The different answers that an answer leaves open, such as "3" and "5" of "3 or 5"; one for a plain answer.

    A comma does not separate alternatives: it joins the parts of one answer.
    """
    different = {normalised(part): part.strip() for part in reversed(_OR.split(answer)) if normalised(part)}
    return tuple(reversed(different.values())) or ("",)


def normalised(text: str) -> str:
    """The text that exact() compares: compatibility characters and case folded, runs of spaces as one, and without
    emphasis, quotation marks, dollar signs of formulas or a final full stop around it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_bare(folded).split())


def exact(answer: str | None, truths: str | Collection[str]) -> bool:
    """Whether the answer equals the truth, or one of several, after normalised(); an empty answer equals nothing.

    Raises:
        ValueError: a truth is empty, or there is none.
    """
    wanted = {normalised(truth) for truth in ([truths] if isinstance(truths, str) else truths)}
    if not wanted or "" in wanted:
        raise ValueError(f"a truth must not be empty, got {truths!r}")
    return answer is not None and normalised(answer) in wanted


def quantity(text: str) -> tuple[float, str] | None:
    r"""A number and the unit behind it ("" without one); None where the text does not begin with a number.

    Reads 1,234.5, 7/2, \frac{7}{2}, 2.5e-3, 2.5 \times 10^{-3}, 12% and $3.50, whose unit is the sign.

    >>> quantity("1,250.5 km.")
    (1250.5, 'km')
    """
    plain = _bare(text)
    for pattern, replacement in _PLAIN:
        plain = pattern.sub(replacement, plain)
    found = _QUANTITY.fullmatch(plain.strip())
    if found is None:
        return None
    try:
        value = Fraction(found["sign"] + found["digits"].replace(",", "")) / int(found["divisor"] or 1)
        value *= Fraction(10) ** int(found["exponent"] or found["power"] or 0)
        return float(value), " ".join(f"{found['currency']} {found['unit']}".split())
    except (ValueError, ZeroDivisionError, OverflowError):  # model output: too large, or no number at all
        return None


def numeric(
    answer: str | None,
    truth: float,
    *,
    relative: float = 1e-6,
    absolute: float = 0.0,
    units: Mapping[str, float] | None = None,
) -> bool:
    """Whether the answer is a number within the larger of relative * |truth| and absolute of the truth.

    units names what may stand behind the number, with its size in the unit of the truth: {"m": 1, "km": 1000} for a
    length in metres, {"%": 0.01} for a share. A bare number counts in the unit of the truth; a unit that is not
    named is a wrong answer, as are two numbers.

    Raises:
        ValueError: the truth is not finite, or a tolerance is negative.

    >>> numeric("1.5 km", 1500, units={"m": 1, "km": 1000})
    True
    """
    if not math.isfinite(truth):
        raise ValueError(f"a numeric truth must be finite, got {truth}")
    if relative < 0 or absolute < 0:
        raise ValueError(f"tolerances must not be negative, got relative {relative}, absolute {absolute}")
    found = quantity(answer) if answer is not None else None
    if found is None:
        return False
    value, unit = found
    factors = {"": 1.0, **(units or {})}
    return unit in factors and abs(value * factors[unit] - truth) <= max(relative * abs(truth), absolute)


async def equivalent(answer: str | None, truth: str, *, seconds: float = 5.0) -> bool:
    r"""Whether the answer and the truth, in LaTeX or plain notation, are the same mathematics.

    By the library `math-verify`, in a process that is killed after seconds; what cannot be shown equal in that time
    is wrong. Decimal fractions agree with irrational and repeating values to 6 places, 50\% is 0.5 and 50, of an
    equation such as x = 5 the right side may answer, units are ignored: use numeric() where they count. An answer
    with more alternatives() than the truth is wrong.

    Raises:
        ValueError: the truth is empty or cannot be parsed, or seconds is not above 0.
        RuntimeError: the processes cannot be started: nothing can be said about the answer.
    """
    truth = _bare(truth)
    if not truth:
        raise ValueError("a truth must not be empty")
    answer = _bare(answer or "")
    if answer == truth:
        return True
    given, wanted = alternatives(answer), alternatives(truth)
    if not answer or len(given) > len(wanted):
        return False
    if len(wanted) > 1:  # "or" is no mathematics to the library: it would multiply its letters
        return await compare_expressions(_set(given), _set(wanted), seconds=seconds)
    return await compare_expressions(_latex(answer), _latex(truth), seconds=seconds)


async def mathematics(response: str, truth: str, *, seconds: float = 5.0) -> float:
    """1.0 when the final_answer of a whole response is equivalent to the truth, else 0.0; raises as equivalent does."""
    return float(await equivalent(final_answer(response), truth, seconds=seconds))


def _set(parts: Collection[str]) -> str:
    return r"\{" + ", ".join(_latex(_bare(part)) for part in parts) + r"\}"


def _latex(text: str) -> str:
    for pattern, replacement in _CONSTANTS:
        text = pattern.sub(replacement, text)
    return text


def _bare(text: str) -> str:
    before = None
    while text != before:
        before, text = text, text.strip().rstrip("\u3002")
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for left, right in _PAIRS:
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)]
    return text
