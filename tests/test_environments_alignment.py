import asyncio
import random
import re

import pytest

from trimtab.environments.base import Message, VoidEpisode
from trimtab.environments.rubric import RubricEnv
from trimtab.environments.tasks.alignment import (
    NAMES,
    NOUNS,
    AlignmentTask,
    Kind,
    Wish,
    demonstrate,
    judge_demonstration,
)
from trimtab.rewards.judging.rubric import Rubric, RubricScore, parse_verdict, truths

PATTERNS: dict[Kind, str] = {
    "greet": r"[Gg]reet (\w+)",
    "mention": r"[Mm]ention the (\w+)",
    "avoid": r"[Ss]ay nothing about the (\w+)",
    "thank": r"[Ee]nd with (thanks)",
    "language": r"[Uu]se only (English|Chinese)",
    "limit": r"at most (\d+) sentences",
}
BOAT, GREET, THANK = Wish("mention", "boat"), Wish("greet", "Mei"), Wish("thank")


def wishes_in(text: str) -> list[Wish]:
    """The wishes a prompt or a judge's question states."""
    subjects = {"thanks": "", "English": "en", "Chinese": "zh"}
    found = [(kind, subject) for kind, pattern in PATTERNS.items() for subject in re.findall(pattern, text)]
    return [Wish(kind, subjects.get(subject, subject)) for kind, subject in found]


def granted(wish: Wish, note: str) -> bool:
    check = wish.criterion().check
    assert check is not None
    return check(note)


async def truthful(prompt: str) -> str:
    """A judge that is never wrong; it reads nothing but its prompt."""
    note, _, question = prompt.removeprefix("Text: ").rpartition("\nDoes it ")
    (wish,) = wishes_in(question)
    return "yes" if granted(wish, note) else "no"


async def says_yes(answer: str, rubric: Rubric, *, task: str = "") -> RubricScore:
    return RubricScore(rubric, (True,) * len(rubric.criteria), truths(answer, rubric))


def write(prompt: str) -> str:
    """A note that grants every wish of the prompt."""
    wishes = wishes_in(prompt)
    chinese = Wish("language", "zh") in wishes
    sentences = []
    for wish in wishes:
        match wish.kind:
            case "greet":
                sentences.append(f"你好{NAMES[wish.subject]}。" if chinese else f"Hello {wish.subject}.")
            case "mention":
                sentences.append(f"我看见{NOUNS[wish.subject]}。" if chinese else f"I see the {wish.subject}.")
            case "thank":
                sentences.append("谢谢你。" if chinese else "Thank you.")
    return " ".join(sentences) or ("很好。" if chinese else "All is well.")


def rewards_of(env: RubricEnv, note: str) -> dict[str, float]:
    step = asyncio.run(env.step(Message("assistant", note)))
    assert step.done
    return dict(step.rewards)


@pytest.mark.parametrize(
    ("wish", "note", "truth"),
    [
        (GREET, "Hello Mei. I see the boat.", True),
        (GREET, "你好梅。", True),
        (GREET, "I see the boat. Hello Mei.", False),
        (GREET, "Hello Meiling.", False),
        (GREET, "Hello Lin.", False),
        (GREET, "", False),
        (BOAT, "The boat is old.", True),
        (BOAT, "Boats!", True),
        (BOAT, "我看见船。", True),
        (BOAT, "我看见the boat。", True),
        (BOAT, "The boathouse is old.", False),
        (Wish("avoid", "boat"), "The boat is old.", False),
        (Wish("avoid", "boat"), "The book is old.", True),
        (THANK, "The book is old. Thank you.", True),
        (THANK, "谢谢你。", True),
        (THANK, "Thank you. The book is old.", False),
        (THANK, "", False),
        (Wish("language", "en"), "The book is old.", True),
        (Wish("language", "en"), "The book 很老。", False),
        (Wish("language", "zh"), "书很老。", True),
        (Wish("language", "zh"), "", False),
        (Wish("limit", "2"), "One. Two.", True),
        (Wish("limit", "2"), "One. Two. Three", False),
        (Wish("limit", "2"), "一。二。三。", False),
        (Wish("limit", "2"), "Really...", True),
    ],
)
def test_checks_know_whether_a_wish_is_granted(wish, note, truth):
    assert granted(wish, note) is truth


@pytest.mark.parametrize("held_out", [False, True])
def test_a_perfect_writer_gets_full_reward(held_out):
    rng = random.Random(1)
    for _ in range(200):
        env = AlignmentTask(truthful).sample(rng, held_out=held_out)()
        (opening,) = asyncio.run(env.start())
        rewards = rewards_of(env, write(opening.content))
        assert rewards.pop("injection") == 0.0
        assert set(rewards.values()) == {1.0}


def test_rubric_parts_tell_the_judge_from_the_truth():
    """Weights: greet 1, mention 2, thank 1. Granted: the greeting alone. The judge says yes to all three."""
    rubric = Rubric(tuple(wish.criterion() for wish in (GREET, BOAT, THANK)))
    rewards = rewards_of(RubricEnv("Write a note.", rubric, says_yes, language="en"), "Hello Mei. 书很老。")
    assert rewards == {
        "rubric": 1.0,
        "injection": 0.0,
        "rubric_truth": pytest.approx(1 / 4),
        "judge_agreement": pytest.approx(1 / 3),
        "language": pytest.approx(2 / 5),
    }


@pytest.mark.parametrize("verdict", ["", "I think yes", "错"])
def test_a_verdict_that_cannot_be_parsed_voids_the_episode(verdict):
    async def judge(prompt: str) -> str:
        return verdict

    env = AlignmentTask(judge).sample(random.Random(2))()
    with pytest.raises(VoidEpisode):
        rewards_of(env, "Hello.")


def test_a_judge_that_breaks_voids_the_episode():
    async def judge(prompt: str) -> str:
        raise ConnectionError("engine gone")

    env = AlignmentTask(judge).sample(random.Random(3))()
    with pytest.raises(VoidEpisode, match="engine gone"):
        rewards_of(env, "Hello.")


def test_demonstrations_grant_about_six_wishes_in_ten_of_every_kind():
    rng = random.Random(4)
    grants: dict[str, list[bool]] = {kind: [] for kind in PATTERNS}
    for _ in range(2000):
        prompt, note = demonstrate(rng)
        for wish in wishes_in(prompt.content):
            grants[wish.kind].append(granted(wish, note.content))
    shares = {kind: sum(values) / len(values) for kind, values in grants.items()}
    assert all(0.5 < share < 0.8 for share in shares.values()), shares


def test_judge_demonstrations_are_true_balanced_and_short():
    rng = random.Random(5)
    verdicts: dict[str, list[bool]] = {kind: [] for kind in PATTERNS}
    for _ in range(2000):
        prompt, verdict = judge_demonstration(rng)
        assert asyncio.run(truthful(prompt.content)) == verdict.content
        assert len(prompt.content) < 200
        (wish,) = wishes_in(prompt.content.splitlines()[-1])
        verdicts[wish.kind].append(parse_verdict(verdict.content))
    for values in verdicts.values():
        assert len(values) > 60 and 0.35 < sum(values) / len(values) < 0.65


def test_the_demonstrated_judge_quotes_the_note_before_it_rules_on_a_word():
    rng = random.Random(7)
    for _ in range(1000):
        prompt, verdict = judge_demonstration(rng)
        (wish,) = wishes_in(prompt.content.splitlines()[-1])
        if wish.kind not in ("greet", "mention", "avoid"):
            assert verdict.reasoning == ""
            continue
        found = (verdict.content == "yes") == (wish.kind != "avoid")
        assert verdict.reasoning.endswith(" none.") is not found
        assert not found or verdict.reasoning.split(wish.subject, 1)[1].strip() in prompt.content


def test_demonstrations_depend_on_the_seed_alone():
    assert [demonstrate(random.Random(seed)) for seed in range(9)] == [demonstrate(random.Random(s)) for s in range(9)]
    one, two = ([judge_demonstration(random.Random(seed)) for seed in range(9)] for _ in range(2))
    assert one == two


def test_held_out_prompts_are_never_trained_on():
    rng, task = random.Random(6), AlignmentTask(truthful)
    trained = {task.sample(rng)().prompt for _ in range(2000)} | {demonstrate(rng)[0].content for _ in range(2000)}
    held_out = {task.sample(rng, held_out=True)().prompt for _ in range(500)}
    assert held_out and not held_out & trained
