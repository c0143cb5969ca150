"""What of specialists' answers is kept, and what the card says of the rest."""

import random
from collections import Counter

import pytest

from trimtab.grpo.commands.cli import main
from trimtab.grpo.config import Domain
from trimtab.grpo.stages.config import Distillation
from trimtab.grpo.stages.data import read_conversations
from trimtab.grpo.stages.distillation import by_teacher, card_text, select

CONFIG = Distillation(
    domains={
        "maths": Domain(task="x:y", teacher="first"),
        "direct": Domain(task="x:y", teacher="first", thinking=False),
        "notes": Domain(task="x:z", teacher="second"),
    },
    max_tokens=50,
    keep=2,
)
PROMPT = {"role": "user", "content": "12 + 35?"}
CALL = {"id": "call_0", "type": "function", "function": {"name": "put", "arguments": "{}"}}


def row(name: str, answer: str = "47", *, prompt: str = "12 + 35?", **changes) -> dict:
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer, "reasoning_content": f"because {name}"},
    ]
    return {
        "domain": "maths",
        "prompt": f"step0-maths-{prompt}",
        "name": name,
        "thinking": True,
        "score": 1.0,
        "rewards": {"outcome": 1.0},
        "ended": "done",
        "resets": 0,
        "tokens": 10,
        "messages": messages,
    } | changes


def twin(name: str, of: str, **changes) -> dict:
    return row(name, **changes) | {"messages": row(of, **changes)["messages"]}


ROWS = [
    row("a", tokens=12),
    row("b", tokens=11),
    row("c", tokens=13),
    twin("a2", "a", tokens=14),
    row("wrong", score=0.5),
    row("long", tokens=51, prompt="1 + 1?"),
    row("cut", ended="length"),
    row("broken", ended="malformed"),
    row("reset", resets=1),
    row("mute", messages=None),
    row(
        "calling",
        messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    row("foreign", rewards={"outcome": 1.0, "language": 0.5}),
    {"domain": "maths", "prompt": "step0-maths-lost", "name": "lost#0", "lost": "the judge is down"},
    row("d", domain="direct", thinking=False, messages=[PROMPT, {"role": "assistant", "content": "47"}]),
    row("e", domain="notes", score=0.0),
]


def test_every_sample_is_kept_or_dropped_for_one_reason():
    kept, shares = select(ROWS, CONFIG)
    assert [one["messages"][1].get("reasoning_content") for one in kept] == [None, "because b", "because a"]
    assert [one["thinking"] for one in kept] == [False, True, True]
    maths = shares["maths"]
    assert maths.dropped == Counter(
        {
            "without an answer": 4,
            "not right": 1,
            "too long": 1,
            "context reset": 1,
            "another language": 1,
            "lost": 1,
            "double": 1,
            "enough of its prompt": 1,
        }
    )
    assert maths.kept + maths.dropped.total() == maths.samples == 13
    assert (maths.kept, maths.kept_tokens, maths.prompts) == (2, 23, 3)
    assert maths.examples["not right"] == "wrong" and maths.examples["double"] == "a2"
    assert shares["direct"].kept == 1 and shares["notes"].kept == 0 and not shares["direct"].thinking


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_samples_does_not_matter(seed):
    shuffled = random.Random(seed).sample(ROWS, len(ROWS))
    assert select(shuffled, CONFIG) == select(ROWS, CONFIG)


def test_equal_answers_to_other_prompts_are_no_doubles_and_space_and_case_do_not_tell():
    one, other = row("same", prompt="1 + 46?"), row("same")
    loud = row("x") | {"messages": [{"role": "user", "content": "12  +\n35?"}, *row("SAME", "47")["messages"][1:]]}
    loud["messages"][1]["reasoning_content"] = "Because  Same"
    kept, shares = select([one, other, loud], CONFIG)
    assert len(kept) == 2 and shares["maths"].dropped == {"double": 1}


def test_a_language_that_is_asked_for_is_looked_for_in_reasoning_too():
    english = Distillation(domains=CONFIG.domains, language="en")
    mixed = row("z", "seven and forty")
    mixed["messages"][1]["reasoning_content"] = "十二 加 三十五 等于 四十七"
    kept, shares = select([row("w", "it is seven and forty"), mixed], english)
    assert len(kept) == 1 and shares["maths"].dropped == {"another language": 1}


def test_each_specialist_plays_its_domains_in_one_go():
    first, second = by_teacher(CONFIG)
    assert first.model == "first" and set(first.domains) == {"maths", "direct"} and set(second.domains) == {"notes"}
    assert first.group_size == CONFIG.samples and first.domains["maths"].prompts == CONFIG.prompts_at_once
    assert not first.references[0] and second.domains["notes"].teacher == ""


def test_the_card_accounts_for_every_sample():
    _, shares = select(ROWS, CONFIG)
    text = card_text(shares, CONFIG)
    assert "3 conversations of 3 domains" in text and "| notes | second | yes | 1 | 1 | 0 | - | 1 not right |" in text
    assert "* maths, lost: lost#0" in text


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "Distillation(domains={'a': Domain(task='x:y')})",
            "domain a has no specialist to answer: set domains.a.teacher",
        ),
        ("Distillation(domains={'a': Domain(task='x:y', teacher='no')})", "no checkpoint at no"),
        ("Distillation(domains={'a': Domain(task='x:y', teacher='no')}, language='xx')", "language must be one of"),
        ("Distillation(domains={})", "domains is empty"),
        ("Distillation(domains={'a': Domain(task='x:y')}, samples=1)", "samples must be at least 2"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(recipe, message, tmp_path, monkeypatch, capsys):
    imports = "from trimtab.grpo.config import Domain\nfrom trimtab.grpo.stages.config import Distillation\n"
    (tmp_path / "mine.py").write_text(f"{imports}def recipe():\n    return {recipe}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mine.py:recipe"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_is_kept_can_be_learnt_from(tmp_path):
    from tiny import save_tiny_deepseek

    from trimtab.environments.json_lines import json_line

    save_tiny_deepseek(tmp_path / "student")
    kept, _ = select(ROWS, CONFIG)
    (tmp_path / "kept.jsonl").write_text("".join(map(json_line, kept)))
    files = [str(tmp_path / "kept.jsonl")]
    corpus = read_conversations(
        files, model=tmp_path / "student", field="messages", max_len=512, held_out=1, thinking=True
    )
    assert not corpus.left_out and len(corpus.train) == 2
