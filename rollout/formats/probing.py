"""What a chat template can do, found by rendering messages that nobody else writes and looking for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.formats.chat import FormatError
from trimtab.rollout.formats.rendering import Habits, Rendering
from trimtab.rollout.formats.syntax import PLAIN, PRESETS, Syntax

ASK, SAID, AGAIN = Message("user", "probe one"), Message("assistant", "probe two"), Message("user", "probe three")
_NAME, _VALUE = "probe_four", "probe five"
CALL = Message("assistant", tool_calls=(ToolCall(_NAME, {"probe": _VALUE}),))
RESULT, REASONING = Message("tool", "probe six"), "probe seven"
TOOL = {
    "name": _NAME,
    "description": "Probe.",
    "parameters": {"type": "object", "properties": {"probe": {"type": "string", "description": "Probe."}}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a probe found of a template."""

    end: str
    """The token that ends an answer."""
    call_end: str
    """The token that ends a turn with calls."""
    syntax: Syntax
    faults: Mapping[str, str] = field(default_factory=dict)
    """Why "tools" or "thinking" cannot be had."""


def probe(template: Rendering, given: Syntax | None) -> Found:
    """Look for everything; sets template.habits on the way.

    Args:
        given: the syntax to look for; None: all presets.

    Raises:
        ValueError: no turns that a token ends.
    """
    template.habits = _find_habits(template)
    end = _find_end(template)
    syntax, call_end, no_calls = _find_calls(template, given)
    syntax, no_thinking = _find_thinking(template, syntax, (given,) if given else (syntax, *PRESETS.values()))
    faults = {"tools": no_calls, "thinking": no_thinking}
    return Found(
        end=end,
        call_end=call_end or end,
        syntax=syntax,
        faults={what: fault for what, fault in faults.items() if fault},
    )


def anonymous(text: str) -> str:
    """text with dots for what the probe said in it."""
    for said in (SAID.content, REASONING, _NAME, _VALUE, "probe"):
        text = text.replace(said, "...")
    return text.strip()


def _find_habits(template: Rendering) -> Habits:
    for template.habits in (Habits(), Habits(parts=True)):
        if ASK.content in template.render((ASK,), thinking=True, turn=True):
            return template.habits
    raise ValueError("the template leaves out what the user says, so it cannot be played")


def _find_end(template: Rendering) -> str:
    """The token that ends an answer. Some templates end only those that another message follows."""
    text = template.render((ASK, SAID), thinking=True, turn=False)
    if SAID.content not in text:
        raise ValueError("the template leaves out what the assistant says, so it cannot be played")
    after = text.rpartition(SAID.content)[2].strip()
    if not after:
        text = template.render((ASK, SAID, AGAIN), thinking=True, turn=True)
        after = text.rpartition(SAID.content)[2].partition(AGAIN.content)[0].strip()
    end = max((token for token in template.added if after.startswith(token)), key=len, default="")
    if not end:
        raise ValueError(
            f"the template ends a turn with {after[:40] or 'nothing'!r}, which is no token of this tokenizer, "
            "so no turn would ever stop; add the token, or take the tokenizer that belongs to the template"
        )
    return end


def _find_calls(template: Rendering, given: Syntax | None) -> tuple[Syntax, str, str]:
    """The syntax of calls, what ends a turn with calls where that is known, and why there are none."""
    candidates = (given,) if given else tuple(PRESETS.values())
    habits, fault = template.habits, ""
    for text_arguments in (False, True):
        template.habits = replace(habits, text_arguments=text_arguments)
        try:
            texts = [
                template.render((ASK, CALL), thinking=False, turn=False),
                template.render((ASK, CALL, RESULT), thinking=False, turn=True).partition(RESULT.content)[0],
            ]
        except FormatError as error:
            fault = fault or f"{error}; use no tools with it"
            continue
        if _NAME not in texts[0]:
            return _left_to_us(template, candidates)
        for syntax in candidates:
            end = _end_of_call(template, texts, syntax)
            if any(_is_read(text, end, syntax) for text in texts):
                return syntax, end, ""
        kind = "which the syntax does not read" if given else "for which there is no preset"
        fault = f"the template writes calls in a form {kind}; give the syntax of its calls, or use no tools"
    template.habits = habits
    return given or PLAIN, "", fault


def _left_to_us(template: Rendering, candidates: Sequence[Syntax]) -> tuple[Syntax, str, str]:
    """The same for a template that leaves out calls: the syntax of which it, or the tokenizer, knows the marks."""
    marked = [one for one in candidates if one.call_open]
    known = [one for one in marked if one.call_open in template.added or one.call_open in template.source]
    if not known and len(candidates) > 1:
        return PLAIN, "", "the template leaves out calls of tools; use no tools, or another template"
    syntax = (*known, *candidates)[0]
    template.habits = replace(template.habits, write_calls=syntax.format_calls)
    return syntax, "", ""


def _end_of_call(template: Rendering, texts: Sequence[str], syntax: Syntax) -> str:
    """The first token behind the call that is no mark of the syntax; empty where there is none."""
    for text in texts:
        tail = text.rpartition(_VALUE)[2]
        if found := [token for token in template.added if token in tail and token not in syntax.marks]:
            return min(found, key=lambda token: (tail.index(token), -len(token)))
    return ""


def _is_read(text: str, end: str, syntax: Syntax) -> bool:
    """Whether a syntax reads the call back from the text in which a template wrote it, up to its end."""
    before, value, tail = text.rpartition(_VALUE)
    if not end or end not in tail:
        return False
    begin = before.rfind(syntax.call_open or "{", 0, before.rfind(_NAME))
    try:
        return begin >= 0 and syntax.split((before + value + tail.partition(end)[0])[begin:], {})[1] == CALL.tool_calls
    except ValueError:  # another syntax
        return False


def _find_thinking(template: Rendering, syntax: Syntax, candidates: Sequence[Syntax]) -> tuple[Syntax, str]:
    """The syntax with the marks of reasoning that the template shows or opens, and why there are none."""
    prompt = template.render((ASK,), thinking=True, turn=True).rstrip()
    text = template.render((ASK, replace(SAID, reasoning=REASONING)), thinking=True, turn=False)
    for one in candidates:
        shown = REASONING in text and one.think_open in text and one.think_close in text
        if shown or prompt.endswith(one.think_open):
            return replace(syntax, think_open=one.think_open, think_close=one.think_close), ""
    fault = f"the template shows no reasoning between {syntax.think_open!r} and {syntax.think_close!r}"
    return syntax, f"{fault}; set thinking=False for this domain, or give the syntax of its reasoning"
