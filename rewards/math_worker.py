"""The program of one worker process of `equivalence.py`: reads questions from standard input, answers one byte each.

A worker may hang or run out of memory at any question: it is made to be killed. An alarm ends it even where its parent
has died.
"""

import json
import os
import resource
import signal
import sys
from typing import Any

READY, EQUAL, DIFFERENT, UNREADABLE_TRUTH = b"r", b"1", b"0", b"t"

_MEMORY = 2 << 30  # bytes of address space; SymPy alone needs about a tenth

_WARM_UP = (("1", "1"), ("sin(x)^2", "1-cos(x)^2"), (r"x \le 3", r"(-\infty, 3]"), ("a", r"\text{b}"))
"""Comparisons that import what others need, before the first time limit."""


def main() -> None:
    """Answer questions, each a line of JSON [answer, truth, seconds], until standard input ends."""
    channel = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for answer, truth in _WARM_UP:
        _compare(answer, truth)
    os.write(channel, READY)
    for line in sys.stdin:
        answer, truth, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
        reply = _compare(answer, truth)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(channel, reply)


def _compare(answer: str, truth: str) -> bytes:
    from math_verify import verify  # type: ignore[import-untyped]

    try:
        wanted = _parse(truth)
        if not wanted:
            return UNREADABLE_TRUTH
        return (
            EQUAL if verify(wanted, _parse(answer), allow_set_relation_comp=True, timeout_seconds=None) else DIFFERENT
        )
    except (MemoryError, RecursionError):
        return DIFFERENT


def _parse(text: str) -> list[Any]:
    """The expression of a whole text, in a list; empty where it is none. No part of a text stands for it."""
    from math_verify import LatexExtractionConfig, parse  # here: the parent imports this module for its constants

    return parse(
        f"\\boxed{{{text}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )


if __name__ == "__main__":
    main()
