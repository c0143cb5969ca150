"""The answer that a text ends with, in the forms that models and data sets write it."""

import re

from trimtab.rewards.reading.plain import bare

_BRACE = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)|(?P<open_box>\\(?:boxed|fbox)(?=[\s\d\\-]))|\\.|(?P<open>\{)|(?P<close>\})",
    re.DOTALL,
)
_TOKEN = re.compile(r"[ \t]*([-+]?(?:\\[A-Za-z]+(?:\{[^{}\n]*\}|\d)*|[^\s$\\{},;])+)")
_MARKER = re.compile(
    r"\banswer\b(?:\s+is)?\**\s*[:\uff1a]\**"
    r"|\banswer\s+(?:is|(?:should|must|would|will)\s+be)\b"
    r"|\b(?:option|choice)\s+is\b\s*[:\uff1a]?\**"
    r"|^[ \t]{0,8}(?:\#{1,6}[ \t]{0,8})?(?:\*\*|__|\\textbf\{)?(?:the )?(?:final )?answer(?:\*\*|__|\})?[ \t]{0,8}$"
    r"|^[ \t]{0,8}\#{4}[ \t]{0,8}(?=[-+\u2212$€£¥\\(]{0,3}\.?\d)(?!\d+[.)][ \t]+\S)"
    r"|答案\s*(?:[是为]\**\s*[:\uff1a]?|\**\s*[:\uff1a])\**",
    re.IGNORECASE | re.MULTILINE,
)
_MARKED_LINE = re.compile(r"[ \t]{0,8}\#{4}[ \t]*(?=\S)")
_CHOSEN = re.compile(
    r"\b(?:option|choice|choose|pick|select)\s+(?:option\s+)?\**\(?(?P<named>[A-J])\)?\**(?![\w'\u2019])"
    r"|\((?P<right>[A-J])\)\**\s+is\s+(?:the\s+)?(?:correct|right|best)\b"
)
_CHOICE_LINE = re.compile(r"[*_$\s]*(?:\([A-J]\)|\[[A-J]\]|[A-J][).:](?=\s|$)|[A-J](?=[*_$\s.]*$)).*")
_OPTION = re.compile(r"^(?:option|choice)\s+(?=\(?[A-J]\)?\W*$)", re.IGNORECASE)
_DISPLAY = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]", re.DOTALL)
_HOPE = re.compile(r"\bI hope (?:it|this|that) is correct\b.{0,4}$", re.IGNORECASE)


def boxed(text: str) -> tuple[str, ...]:
    r"""What every \boxed{...} of a text holds, in the order of their ends; an unclosed box is none.

    Without braces a box holds what follows up to a space or the end of the formula: 5 in \boxed 5$.

    >>> boxed(r"\boxed{\frac{1}{2}} then \boxed{3}")
    ('\\frac{1}{2}', '3')
    """
    found, opened = [], []
    for brace in _BRACE.finditer(text):
        if brace["box"] or brace["open"]:
            opened.append(brace.end() if brace["box"] else None)
        elif brace["open_box"]:
            if token := _TOKEN.match(text, brace.end()):
                found.append(token[1].rstrip("."))
        elif brace["close"] and opened:
            start = opened.pop()
            if start is not None:
                found.append(text[start : brace.start()].strip())
    return tuple(box for box in found if box)


def final_answer(text: str) -> str | None:
    r"""The answer that a text ends with; None when it names none.

    It is the last \boxed{...}; without one, the last <answer>...</answer>; without that, what follows the last mark:
    the line after "answer:", "answer is" (or 答案:), "option is", "####", or under a heading "Final Answer", in any
    case, without emphasis and a final full stop; without that, a choice such as "(C)" that is picked, or is the last
    line.
    """
    if boxes := boxed(text):
        return boxes[-1]
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    if closed and opened:
        return inside.strip()
    last = text.rstrip().rpartition("\n")[2]
    if marked := _MARKED_LINE.match(last):
        return _first(last[marked.end() :])
    markers = list(_MARKER.finditer(text))
    if markers:
        return _first(text[markers[-1].end() :])
    chosen = list(_CHOSEN.finditer(text))
    if chosen:
        return chosen[-1]["named"] or chosen[-1]["right"]
    return bare(last) if _CHOICE_LINE.fullmatch(last) else None


def _first(rest: str) -> str | None:
    """The first line of what follows a mark, or the formula that is set there."""
    rest = rest.strip()
    if not rest:
        return None
    if formula := _DISPLAY.match(rest):
        return bare(formula[1] or formula[2])
    line = _HOPE.sub("", rest.splitlines()[0]).strip()
    if line.count("**") == 1 and line.endswith("**"):  # the whole line, mark and all, was bold
        line = line[:-2]
    return bare(_OPTION.sub("", line))
