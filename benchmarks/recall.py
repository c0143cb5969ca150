"""DSA as a conversion: a dense model from nothing learns to recall, and its sparse copy before and after each stage.

    python benchmarks/recall.py --seeds 0    on two cores
    python benchmarks/recall.py --large      longer worlds and a larger model, on a GPU

A user states facts (" bade fimo;"), the assistant says them again, in another order or the same, and then what follows
from two of them at a time. The model learns on few facts first and then on many. A value's distance is that to the fact
that tells it, in tokens, in multiples of index_topk: what is farther than 1 cannot be selected by being near. It is
right if its token is the likeliest.
"""

import argparse
import json
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer, DeepseekV3Config

from trimtab.environments.base import Message
from trimtab.grpo import pipeline
from trimtab.grpo.pipeline import Pipeline
from trimtab.grpo.policy.policy import Policy, load_policy
from trimtab.grpo.stages.config import Blank, Conversion, Indexer, Supervised
from trimtab.grpo.stages.shapes import quickstart_dense
from trimtab.rollout.formats.chat import render
from trimtab.rollout.formats.openai_messages import to_openai
from trimtab.rollout.formats.template import load_format

HELD_OUT = 64
EPOCHS = 2
"""Passes over the data, about."""
BUCKETS = (0, 2, 4, 8, 16, 32)
SYLLABLES = [a + b for a, b in product("bdfgklmnprstvz", "aeio")]
WORDS = sorted({a + b for a, b in product(SYLLABLES[::3], SYLLABLES[1::3])})
"""361 words of two syllables, always behind a space: a tokenizer has one token for each, and none can be guessed."""


@dataclass(frozen=True)
class Size:
    """How large a world, a model and its training are."""

    words: int
    few: int
    """Facts that the first documents have at most ..."""
    many: int
    """... and the others."""
    shape: str
    indexer: Indexer
    settings: dict[str, Any]
    steps: tuple[int, int, int, int]
    """On few facts, on many, of the warm-up and of sparse training."""
    rates: tuple[float, float, float, float]


SMALL = Size(
    words=64,
    few=12,
    many=40,
    shape="trimtab.grpo.stages.shapes:quickstart_dense",
    indexer=Indexer(index_topk=8, index_n_heads=4, index_head_dim=32),
    settings={"tokens_per_step": 2048, "tokens_per_microbatch": 4096, "max_len": 512, "precision": "fp32"},
    steps=(900, 1200, 200, 200),
    rates=(3e-3, 3e-3, 3e-3, 1e-3),
)
LARGE = Size(
    words=361,
    few=16,
    many=160,
    shape=f"{Path(__file__)}:large_dense",
    indexer=Indexer(index_topk=32, index_n_heads=8, index_head_dim=64),
    settings={"tokens_per_step": 16384, "tokens_per_microbatch": 16384, "max_len": 1536},
    steps=(600, 600, 100, 150),
    rates=(2e-3, 2e-3, 2e-3, 5e-4),
)


@dataclass(frozen=True)
class Recital:
    """Facts in a row, and a recital of all that follows from them.

    asked are pairs of places: where in the recital a value begins, and where among the facts the one that tells it.
    """

    facts: str
    recital: str
    asked: tuple[tuple[int, int], ...]

    @property
    def messages(self) -> tuple[Message, Message]:
        return Message("user", self.facts), Message("assistant", self.recital)


def recital(rng: random.Random, words: list[str], most: int) -> Recital:
    """Of 2 to `most` facts, few as often as many; a third of the values are keys of other facts."""
    keys = rng.sample(words, round(2 * (most / 2) ** rng.random()))
    others = [word for word in words if word not in set(keys)]
    facts = {key: rng.choice(keys if rng.random() < 1 / 3 else others) for key in keys}
    told, places = "facts:", dict[str, int]()
    for key, value in facts.items():
        places[key] = len(told)
        told += f" {key} {value};"
    again = keys if rng.random() < 1 / 3 else rng.sample(keys, len(keys))
    linked = [key for key in keys if facts[key] in facts]
    said, asked = "once:", list[tuple[int, int]]()
    for key in again:
        asked.append((len(said) + len(key) + 1, places[key]))
        said += f" {key} {facts[key]};"
    said += " twice:" if linked else ""
    for key in rng.sample(linked, len(linked)):
        asked.append((len(said) + len(key) + 1, min(places[key], places[facts[key]])))
        said += f" {key} {facts[facts[key]]};"
    return Recital(told, said, tuple(asked))


def large_dense(vocab_size: int, bos_id: int, eos_id: int) -> DeepseekV3Config:
    """About 20 M parameters: six layers of the quickstart's kind, wider."""
    small = quickstart_dense(vocab_size, bos_id, eos_id).to_dict()
    follows = ("head_dim", "qk_head_dim", "layer_types", "mlp_layer_types")
    small = {key: value for key, value in small.items() if key not in follows}
    wider = {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 192,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "initializer_range": 0.03,
    }
    return DeepseekV3Config(**(small | wider))


def stages(size: Size, few: Path, many: Path, seed: int) -> Pipeline:
    base = Supervised(
        form="conversations",
        thinking=False,
        data=(str(many),),
        prompt_weight=0.1,
        optimizer="muon",
        weight_decay=0.01,
        held_out=HELD_OUT,
        save_every=10_000,
        seed=seed,
        **size.settings,
    )
    first, longer, warm_up, sparse = (
        replace(base, steps=steps, lr=lr) for steps, lr in zip(size.steps, size.rates, strict=True)
    )
    return Pipeline(
        stages={
            "blank": Blank(shape=size.shape, data=(str(few), str(many)), vocab_size=1024),
            "few": replace(first, model="stage:blank", random_weights=True, data=(str(few),)),
            "dense": replace(longer, model="stage:few"),
            "converted": Conversion(model="stage:dense", indexer=replace(size.indexer, seed=seed)),
            "warm_up": replace(warm_up, model="stage:converted", dense_attention=True, learns="indexer"),
            "sparse": replace(sparse, model="stage:warm_up"),
        }
    )


def write_world(size: Size, folder: Path, seed: int) -> tuple[Path, Path, list[Recital]]:
    """Conversations of few facts and of many, and of the latter those that are held out."""
    rng = random.Random(f"recall{seed}")
    words = WORDS[:: len(WORDS) // size.words][: size.words]
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for most, steps in ((size.few, size.steps[0]), (size.many, sum(size.steps[1:]))):
        tokens, found = steps * size.settings["tokens_per_step"] / EPOCHS, list[Recital]()
        while tokens > 0 or len(found) < 2 * HELD_OUT:
            found.append(recital(rng, words, most))
            tokens -= 3 * len(found[-1].asked) + found[-1].facts.count(";") * 3
        files.append(folder / f"{most}.jsonl")
        lines = (json.dumps({"messages": to_openai(one.messages)}) + "\n" for one in found)
        files[-1].write_text("".join(lines))
    return *files, found[-HELD_OUT:]


@torch.no_grad()
def recall(checkpoint: Path, held_out: list[Recital], topk: int) -> list[float]:
    """Share of values that are the likeliest, by distance, over BUCKETS; values of one token alone count."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, chat = load_policy(checkpoint).to(device), load_format(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    right, asked = defaultdict(int), defaultdict(int)
    for one in held_out:
        ((ids_N, sampled_N),) = render(chat, one.messages, thinking=False)
        told, said = (
            tokenizer(text, return_offsets_mapping=True, add_special_tokens=False) for text in (one.facts, one.recital)
        )
        ids = ids_N.tolist()
        opening = next(i for i in range(len(ids)) if ids[i : i + len(told["input_ids"])] == told["input_ids"])
        answer = int(sampled_N.argmax())
        fact = {start: opening + i for i, (start, _) in enumerate(told["offset_mapping"])}
        value = {start: (answer + i, end) for i, (start, end) in enumerate(said["offset_mapping"])}
        hits_N = likeliest(policy, torch.from_numpy(ids_N).long().to(device))
        for where, source in one.asked:
            place, end = value.get(where, (0, 0))  # a word's token begins with the space before it
            bucket = np.searchsorted(BUCKETS, (place - fact[source]) / topk, side="right") - 1
            if one.recital[end : end + 1] == ";" and bucket < len(BUCKETS) - 1:
                right[bucket] += bool(hits_N[place])
                asked[bucket] += 1
    return [right[i] / asked[i] if asked[i] else float("nan") for i in range(len(BUCKETS) - 1)]


def likeliest(policy: Policy, ids_N: torch.Tensor) -> np.ndarray:
    """Whether each token of a sequence is the likeliest behind those before it; bool [N]."""
    hidden_ND = policy(ids_N, torch.tensor([0, len(ids_N)], device=ids_N.device)).hidden_ND
    best_N = (hidden_ND[:-1] @ policy.head_weight.T).argmax(-1)
    return np.r_[False, (best_N == ids_N[1:]).cpu().numpy()]


def run(size: Size, seed: int, home: Path, console: Console) -> list[list[str]]:
    """All stages of one seed; a row for each state of the model."""
    folder = home / f"seed{seed}"
    few, many, held_out = write_world(size, folder, seed)
    if code := pipeline.run(stages(size, few, many, seed), folder / "stages", console):
        raise SystemExit(code)
    state = json.loads((folder / "stages" / "pipeline.json").read_text())
    figures = {name: state[name]["figures"] for name in ("dense", "warm_up", "sparse")}
    before = {key: values[0] for key, values in figures["warm_up"].items()}
    after = {name: {key: values[1] for key, values in figures[name].items()} for name in figures}
    measured = {"dense": after["dense"], "converted": before, "warm_up": after["warm_up"], "sparse": after["sparse"]}
    rows = []
    for name, found in measured.items():
        shares = recall(Path(state[name]["output"]), held_out, size.indexer.index_topk)
        mass = found.get("selected_mass")
        rows.append(
            [
                str(seed),
                name,
                f"{found['loss']:.3f}",
                f"{found['loss_dense']:.3f}" if mass else "-",
                f"{found['indexer_kl']:.3f}" if mass else "-",
                "/".join(f"{one:.2f}" for one in mass) if mass else "-",
                *(f"{share:.2f}" for share in shares),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/recall"))
    arguments = parser.parse_args()
    size = LARGE if arguments.large else SMALL
    rows = [row for seed in arguments.seeds for row in run(size, seed, arguments.out, Console())]
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "a CPU"
    print(f"\n{card}, torch {torch.__version__}, index_topk {size.indexer.index_topk}\n")
    names = [f"{low}-{high}" for low, high in pairwise(BUCKETS)]
    header = ["seed", "model", "loss", "loss, dense attention", "indexer KL", "selected mass by layer", *names]
    for line in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
