"""Where a policy from nothing begins: conversations that its tasks show, a tokenizer of them, and an empty model."""

import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import trimtab.environments.tasks.alignment as alignment
from trimtab.environments.base import Message
from trimtab.environments.files import Row, read_rows
from trimtab.environments.json_lines import json_line
from trimtab.grpo.config import Domain, load
from trimtab.grpo.stages.config import Blank, Demonstrations
from trimtab.grpo.stages.tokenizer import train_tokenizer
from trimtab.rollout.formats.chat import Chat
from trimtab.rollout.formats.dsml import BOS, EOS, MARKUP, SPECIAL_TOKENS, format_calls, tools_block
from trimtab.rollout.formats.openai_messages import from_openai, to_openai

Demonstrate = Callable[[random.Random], tuple[Message, ...]]
CONVERSATIONS = "conversations.jsonl"


def sources(domains: dict[str, Domain], judge: float) -> dict[str, tuple[Demonstrate, bool, float]]:
    """By name: what makes one conversation, whether it thinks (else it shows answers alone), and its share of the
    examples."""

    async def nobody(prompt: str) -> str:
        raise AssertionError("demonstrations are not judged")

    found: dict[str, tuple[Demonstrate, bool, float]] = {
        name: (_shown(domain, domain.load_task(judge=nobody).demonstrate), domain.thinking, domain.demonstrations)
        for name, domain in domains.items()
    }
    return found | ({"judge": (alignment.judge_demonstration, True, judge)} if judge else {})


def _shown(domain: Domain, demonstrate: Demonstrate) -> Demonstrate:
    if domain.thinking:
        return demonstrate
    return lambda rng: tuple(replace(message, reasoning="") for message in demonstrate(rng))


def write_demonstrations(settings: Demonstrations, out: Path) -> str:
    """Fill the folder `out` with conversations. Returns what was done, in one line.

    Raises:
        ValueError: a task that leads nowhere, or that shows nothing.
    """
    found = sources(settings.domains, settings.judge)
    rng = random.Random(f"demonstrations{settings.seed}")
    names, shares = list(found), [share for _, _, share in found.values()]
    lines = []
    for _ in range(settings.conversations):
        (name,) = rng.choices(names, shares)
        demonstrate, thinking, _ = found[name]
        lines.append(json_line({"domain": name, "thinking": thinking, "messages": to_openai(demonstrate(rng))}))
    with whole(out) as partial:
        (partial / CONVERSATIONS).write_text("".join(lines))
    return f"{len(lines)} conversations of {', '.join(found)}"


def write_blank(settings: Blank, out: Path) -> str:
    """Fill the folder `out` with config.json and a tokenizer. Returns what was done, in one line.

    Raises:
        ValueError: a file or a shape that cannot be read.
    """
    make: Callable[[int, int, int], Any] = load(settings.shape)
    rows = [row for file in settings.data for row in read_rows(file)]
    tokenizer = train_tokenizer(
        (text for row in rows for text in _texts(row)),
        vocab_size=settings.vocab_size,
        special=SPECIAL_TOKENS,
        markup=MARKUP,
        bos=BOS,
        eos=EOS,
    )
    chat = Chat(tokenizer)
    config = make(len(tokenizer), chat.bos_id, chat.eos_id)
    with whole(out) as partial:
        config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return f"a {config.architectures[0]} without weights, {len(tokenizer)} tokens of {len(rows)} rows"


def _texts(row: Row) -> Iterable[str]:
    """Of a text, or of a conversation."""
    return [row.text("text")] if "messages" not in row.values else texts_of([from_openai(row.value("messages"))])


def texts_of(conversations: Iterable[Iterable[Message]]) -> Iterator[str]:
    """What a tokenizer learns from."""
    for messages in conversations:
        for message in messages:
            yield message.content
            yield message.reasoning
            yield format_calls(message.tool_calls)
            yield tools_block(message.tools) if message.tools else ""


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` if nothing fails."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
