"""Mathematical notation that `math-verify` does not read, or misreads, as notation that it reads; and what is words."""

import re

from trimtab.rewards.reading.plain import bare
from trimtab.rewards.reading.quantities import repeating

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_LETTERS = r"\\(?:mathrm|mathbf|mathit|boldsymbol|operatorname|text|textbf|rm)\s*"
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|gcd|max|min"
_INTEGERS = r"\\(?:mathbb|mathbf|Bbb)\s*\{?\s*[ZN]\s*\}?(?:\s*(?:\^[+*]|_\{?\+\}?|_\{?0\}?))?"
_SIGNS = {
    "\u2212": "-", "\u2013": "-", "\u2012": "-", "°": r"^\circ ", "\u00d7": r"\times ", "·": r"\cdot ", "÷": r"\div ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "\u222a": r"\cup ", "∩": r"\cap ", "±": r"\pm ", "∈": r"\in ",
    "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", 
    "\u211d": r"\mathbb{R}", "\u2124": r"\mathbb{Z}", "∅": r"\emptyset ",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}",
}  # fmt: skip
_REWRITES = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\w.])(\d{1,3}(?:(?:\\,|[ \u2009\u202f\u00a0])\d{3})+)(?![\d.]*\d)", lambda found: _digits(found[0])),
        (r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\d)", r"\1\\times10^{\2}"),
        (_LETTERS + rf"\{{\s*({_FUNCTIONS})\s*\}}", r"\\\1 "),
        (_LETTERS + r"\{\s*([A-Za-z])\s*\}", r"{\1}"),
        (rf"(?<![\\A-Za-z{{])({_FUNCTIONS})(?![A-Za-z}}])", r"\\\1 "),
        (r"(?<![\\A-Za-z{])i(?![A-Za-z}])", "{i}"),  # else it depends on what stands around it whether it is imaginary
        (r"\\lg\b", r"\\log_{10}"),
        (r"\\langle\b(.*)\\rangle\b", r"(\1)"),
        (r"\\begin\{(?:cases|aligned)\}(.*?)\\end\{(?:cases|aligned)\}", lambda found: _rows(found[1])),
        (r"^\s*\]([^\[\]]*,[^\[\]]*)\[\s*$", r"(\1)"),
        (r"^\s*\[([^\[\]]*,[^\[\]]*)\[\s*$", r"[\1)"),
        (r"^\s*\]([^\[\]]*,[^\[\]]*)\]\s*$", r"(\1]"),
        (
            rf"[,;]?\s*(?:\\q?quad\s*|\\[,; ]\s*|\\text\s*\{{[^{{}}]*\}}\s*|\()*\b[a-z]\s*\\in\s*{_INTEGERS}\s*\)?\s*$",
            "",
        ),
        (r"[,;]?\s*(?:\\text\s*\{)?\s*(?:where|for)?\s*\b[a-z] (?:is )?an(?:y)? integer\s*\}?\s*$", ""),
    )
)
_BUILDER = re.compile(
    r"\s*\\(?:left\\)?\{\s*(?P<what>.+?)\s*(?:\\mid\b|\\vert\b|\\colon\b|\||:)\s*(?P<where>.+?)\s*\\(?:right\\)?\}\s*",
    re.DOTALL,
)
_VARIABLE = re.compile(r"([A-Za-z])(?:\s*\\in\s*\\(?:mathbb|mathbf)\s*\{?\s*R\s*\}?)?")
_RANGES = re.compile(rf"[a-z]\s*\\in\s*{_INTEGERS}")
_WORDS = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*(?:[\s,]+[^\W\d_]+(?:['\u2019-][^\W\d_]+)*)*")
_MATHS = frozenset(
    f"pi|sqrt|infty|infinity|oo|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|sigma|phi|omega|{_FUNCTIONS}".split("|")
)
_SHORT = (
    "no on yes up as at an am in is it if of or so to us we he me my by be do go hi id tv uk usa and any all are age "
    "ago air arm art ask bad bag bar bat bed bee big bit box boy bus but buy can cap car cat cow cup cut day did die "
    "dig dog dry due ear east eat egg end eye far fat few fit fly for fox fun gas get god got gun had has hat hen her "
    "him his hit hot how ice its jam jar job joy key kid law lay leg let lie lip log lot low man map may men met mix "
    "mom mud net new nor not now nut odd off oil old one our out own pan pay pen pet pig pin pot put ran rat raw red "
    "rod row run sad sat saw say sea see set she shy sit six sky son sun tan tax tea ten the tie tin tip toe too top "
    "toy try tub two use van war was way wet who why win won wow yet you zoo sat tar act"
)
"""Words of two or three letters; other runs so short are products of variables."""
_SHORT_WORDS = frozenset(_SHORT.split())


def readable_latex(text: str) -> str:
    r"""The same mathematics in the LaTeX that `math-verify` reads: 0.\overline{3}, \mathrm{i}, 1e-3, 10 000, sets by a
    condition, brackets of French intervals, "k an integer" behind a family of solutions."""
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    for pattern, plain in _REWRITES:
        text = pattern.sub(plain, text)
    text = repeating(text)
    built = _BUILDER.fullmatch(text)
    if built is None:
        return text
    if _VARIABLE.fullmatch(built["what"]):
        return built["where"]
    return built["what"] if _RANGES.fullmatch(built["where"]) else text


def is_words(text: str) -> bool:
    """Whether a text is words of a language, and no product of variables or name of a function.

    >>> is_words("no solution"), is_words("xy"), is_words("sin x")
    (True, False, False)
    """
    plain = bare(text).casefold()
    if not _WORDS.fullmatch(plain):
        return False
    runs = re.findall(r"[^\W\d_]+", plain)
    return _MATHS.isdisjoint(runs) and any(map(_is_word, runs))


def _is_word(letters: str) -> bool:
    if len(letters) <= 3:
        return letters in _SHORT_WORDS or not letters.isascii()
    return [ord(letter) - ord(min(letters)) for letter in sorted(letters)] != list(range(len(letters)))


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _rows(text: str) -> str:
    rows = (row.replace("&", "").strip(" ,") for row in re.split(r"\\\\(?:\[[^\]]*\])?", text))
    return ", ".join(row for row in rows if row)
