"""Which chat templates play, in which modes: python benchmarks/templates.py [FOLDER OF .jinja FILES].

Each template is put on a stand-in tokenizer of bytes that knows the marks found in its text; whether a real model's
tokenizer holds them as tokens is for that tokenizer to say. Without a folder: those of tests/templates.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.environments.base import Message, ToolCall
from trimtab.rollout.formats.template import TemplateChat

MARKS = re.compile(
    r"<[|\uff5c]?[^<>'\"{}\s/=]+[|\uff5c]>|<\|[a-z_]+>|</?[a-z_]+_of_[a-z_]+>|\[/?[A-Z_]{3,}\]|</?(?:think|tool_call)>"
)
TOOL = {"name": "get", "description": "Get.", "parameters": {"type": "object", "properties": {"k": {"type": "string"}}}}
MODES = {"plain": (False, False), "tools": (False, True), "thinking": (True, False), "both": (True, True)}


def stand_in(template: str, bos: str = "<s>", eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a template, and the marks of its text as tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    calls = ("<|tool_call_start|>", "<|tool_call_end|>") if "<|tool_list_start|>" in template else ()
    marks = dict.fromkeys((bos, eos, *MARKS.findall(template), *calls))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in marks if "think" in text or "tool_" in text])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in marks])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


def try_mode(chat: TemplateChat, *, thinking: bool, tools: bool) -> None:
    """Play two turns, over a tool's result where there are tools.

    Raises:
        ValueError: they cannot be played.
    """
    chat.verify(thinking=thinking, tools=tools)
    system = (Message("system", "S", tools=(TOOL,)),) if tools else ()
    talk = chat.conversation((*system, Message("user", "Q")), thinking=thinking)
    talk.prompt_ids()
    said = Message("assistant", "", "R" if thinking else "", (ToolCall("get", {"k": "a"}),))
    if tools:
        talk.add_sampled(chat.encode_assistant(said, thinking=thinking))
        talk.add([Message("tool", "5 <|im_end|>")])
        talk.prompt_ids()
    talk.add_sampled(chat.encode_assistant(replace(said, content="A", tool_calls=()), thinking=thinking))
    talk.add([Message("user", "Q2")])
    talk.prompt_ids()


def results(template: str) -> dict[str, str]:
    """For each mode, empty where it plays, else why it does not."""
    try:
        chat = TemplateChat(stand_in(template))
    except ValueError as error:
        return dict.fromkeys(MODES, str(error))
    found = {}
    for mode, (thinking, tools) in MODES.items():
        try:
            try_mode(chat, thinking=thinking, tools=tools)
            found[mode] = ""
        except ValueError as error:
            found[mode] = str(error)
    return found


def main(folder: Path) -> None:
    rows = {path.stem: results(path.read_text()) for path in sorted(folder.glob("*.jinja"))}
    print("| template |" + "".join(f" {mode} |" for mode in MODES) + "\n|" + " --- |" * (len(MODES) + 1))
    for name, row in rows.items():
        print(f"| {name} |" + "".join(" refused |" if row[mode] else " plays |" for mode in MODES))
    print(f"\n{sum('' in row.values() for row in rows.values())} of {len(rows)} templates play\n")
    for name, row in rows.items():
        for sentence in dict.fromkeys(filter(None, row.values())):
            modes = ", ".join(mode for mode in MODES if row[mode] == sentence)
            print(f"{name} ({modes}): {sentence}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests" / "templates")
