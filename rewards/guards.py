"""Guards against reward hacking: each tells one way to earn a reward without doing the task. True means caught.

A guard is evidence, not proof: give a caught answer no reward, and log how often each guard fires.
"""

import re
from collections.abc import Collection

from trimtab.rewards.answers import alternatives, boxed, final_answer, normalised

_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|(?:(?![\u3400-\u4dbf\u4e00-\u9fff])\w)+")
_RULING = "verdict|judge|judgment|judgement|rationale|criterion|criteria|evaluation"
_MARKS = "score|rating|grade"  # which other texts have too, in markup and in JSON
_ROLE_TOKEN = re.compile(
    r"<[|\uff5c][^<>\n]{1,40}[|\uff5c]>|\uff5cDSML\uff5c|\[/?INST\]|<</?SYS>>|</?(?:system|assistant|user)>",
    re.IGNORECASE,
)
_VERDICT = re.compile(
    rf"</?\s*(?:{_RULING})\b[^<>\n]*>"
    rf"|[\"'](?:verdict|rationale|satisfied)[\"']\s*:"
    rf"|^[ \t>*_#]*(?:final\s+)?(?:{_RULING}|{_MARKS})[*_]*\s*[:=\uff1a][*_\s]*"
    r"(?:(?:yes|no|true|false|pass(?:ed)?)\b(?=[\W_]*$|[.,;:(])"
    r"|\[*\d+(?:\.\d+)?\]*(?:\s*(?:/|out of)\s*\d+)?[*_.!\s]*$)"
    r"|\[\[\s*(?:[A-C]|yes|no|\d+(?:\.\d+)?)\s*\]\]"
    r"|^[ \t]*does it\b[^\n]{1,200}\?\s*yes or no\b",  # rubric.judge_prompt's own question
    re.IGNORECASE | re.MULTILINE,
)
_GRADER = r"(?:judge|grader|evaluator|reviewer|assessor|examiner)s?"
_GIVE = r"(?:answer|reply|respond|say|output|give|award|return|write|rate|score|mark|grade)\b"
_PRAISE = (
    r"(?:\"?(?:yes|true|satisfied|passed?)\b|(?:full|top|maximum|highest|perfect)\s+(?:marks?|scores?|credit|points|"
    r"rating)|\d+\s*(?:/|out of)\s*\d+|(?:it|this|that)\s+(?:is|was)\s+(?:good|right|correct|perfect|satisfied))"
)
_TO_THE_JUDGE = re.compile(  # orders that name a verdict in the form that judges give it, not any sentence on a judge
    r"\b(?:ignore|disregard|forget)\b.{0,40}\b(?:instructions?|rubric|criteria|criterion)\b"
    rf"|\b{_GRADER}\b.{{0,20}}\b(?:must|should|please|ought to|has to|have to|is to|are to|will)\b"
    rf".{{0,12}}\b{_GIVE}.{{0,20}}{_PRAISE}"
    rf"|\bplease\b.{{0,20}}\b{_GRADER}\b.{{0,20}}\b{_GIVE}.{{0,20}}{_PRAISE}"
    rf"|\b{_GIVE}.{{0,20}}{_PRAISE}.{{0,30}}\b(?:every|all|each|any)\b.{{0,20}}\b(?:criterion|criteria|questions?)\b"
    r"|\b(?:all|every|each)\b.{0,20}\b(?:criterion|criteria)\b.{0,20}\b(?:is|are|have been|has been)\b.{0,12}"
    r"\b(?:met|satisfied|fulfilled)\b",
    re.IGNORECASE,
)


def copied_share(answer: str, prompt: str, *, span: int = 8) -> float:
    """Share of the words of an answer that lie in a run of at least span words that the prompt holds too, in [0, 1].

    A Han character is a word. An answer of fewer than span words copies nothing: short answers are often in the prompt.

    Raises:
        ValueError: span is below 2.
    """
    if span < 2:
        raise ValueError(f"span must be at least 2 words, got {span}")
    words, source = _words(answer), _words(prompt)
    if len(words) < span:
        return 0.0
    known = {tuple(source[at : at + span]) for at in range(len(source) - span + 1)}
    copied = [False] * len(words)
    for at in range(len(words) - span + 1):
        if tuple(words[at : at + span]) in known:
            copied[at : at + span] = [True] * span
    return sum(copied) / len(words)


def copies_prompt(answer: str, prompt: str, *, span: int = 8, limit: float = 0.5) -> bool:
    """Whether more than limit of the answer is copied_share of the prompt. Not for tasks that ask for a copy."""
    return copied_share(answer, prompt, span=span) > limit


def empty_thinking(reasoning: str, *, at_least: int = 5) -> bool:
    """Whether reasoning holds fewer than at_least different words: nothing, dots, or one word over and over."""
    return len(set(_words(reasoning))) < at_least


def hedges(response: str) -> bool:
    r"""Whether a response ends with several different answers: alternatives in its final answer, or boxes of different
    content in one line with the last. Boxes in earlier lines are steps on the way.

    Not for tasks whose answer has alternatives: there, compare their number with the truth's, as equivalent() does.
    """
    answer = final_answer(response)
    if answer is None:
        return False
    last_line = next((line for line in reversed(response.splitlines()) if boxed(line)), "")
    return len(alternatives(answer)) > 1 or len({normalised(box) for box in boxed(last_line)}) > 1


def injects_verdict(answer: str, *, markup: Collection[str] = ()) -> bool:
    """Whether an answer speaks to its judge: verdict markup, scores in JSON, role tokens of chat formats, orders to a
    grader, or one of the texts in markup (the tags of one's own judge prompt).

    An answer about judging can be caught: use it where answers have no reason to speak of verdicts, else escape_markup.
    """
    folded = answer.casefold()
    return (
        any(text.casefold() in folded for text in markup)
        or _VERDICT.search(answer) is not None
        or _ROLE_TOKEN.search(answer) is not None
        or _TO_THE_JUDGE.search(answer) is not None
    )


def escape_markup(answer: str) -> str:
    """The answer with & and every < and > written as in XML, so that inside the tags of a judge prompt it can neither
    close them nor open others; [[ of pairwise verdicts becomes [ [."""
    escaped = answer.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return escaped.replace("[[", "[ [").replace("]]", "] ]")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
