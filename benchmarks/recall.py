"""DSA as a conversion: a dense model from nothing learns to recall, and its sparse copy before and after each stage.

    python benchmarks/recall.py              three seeds, small, on two cores
    python benchmarks/recall.py --large      longer worlds and a larger model, on a GPU

A user states facts, the assistant recites their values by key, and over two keys. A value's distance is that to the
fact that tells it, in tokens, in multiples of index_topk: what is farther than 1 cannot be selected by being near. It
is right if its token is the likeliest.
"""

import argparse
import json
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer, DeepseekV3Config

from trimtab.environments.tasks.recall import Recital, recital
from trimtab.grpo import pipeline
from trimtab.grpo.pipeline import Pipeline
from trimtab.grpo.policy.policy import Policy, load_policy
from trimtab.grpo.stages.config import Blank, Conversion, Indexer, Supervised
from trimtab.grpo.stages.shapes import quickstart_dense
from trimtab.rollout.formats.chat import render
from trimtab.rollout.formats.openai_messages import to_openai
from trimtab.rollout.formats.template import load_format

HELD_OUT = 64
BUCKETS = (0, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Size:
    """How large a world, a model and its training are."""

    facts: tuple[int, int]
    documents: int
    shape: str
    indexer: Indexer
    settings: dict[str, Any]
    steps: tuple[int, int, int]
    """Of pre-training, warm-up and sparse training."""
    rates: tuple[float, float, float]


SMALL = Size(
    facts=(2, 64),
    documents=6000,
    shape="trimtab.grpo.stages.shapes:quickstart_dense",
    indexer=Indexer(index_topk=16, index_n_heads=4, index_head_dim=32),
    settings={"tokens_per_step": 2048, "tokens_per_microbatch": 4096, "max_len": 768, "precision": "fp32"},
    steps=(900, 150, 150),
    rates=(3e-3, 3e-3, 1e-3),
)
LARGE = Size(
    facts=(2, 160),
    documents=12000,
    shape=f"{Path(__file__)}:large_dense",
    indexer=Indexer(index_topk=32, index_n_heads=8, index_head_dim=64),
    settings={"tokens_per_step": 16384, "tokens_per_microbatch": 16384, "max_len": 1536},
    steps=(700, 100, 100),
    rates=(2e-3, 2e-3, 5e-4),
)


def large_dense(vocab_size: int, bos_id: int, eos_id: int) -> DeepseekV3Config:
    """About 45 M parameters: eight layers of the quickstart's kind, wider."""
    small = quickstart_dense(vocab_size, bos_id, eos_id).to_dict()
    follows = ("head_dim", "qk_head_dim", "layer_types", "mlp_layer_types")
    small = {key: value for key, value in small.items() if key not in follows}
    wider = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 256,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
        "initializer_range": 0.02,
    }
    return DeepseekV3Config(**(small | wider))


def stages(size: Size, data: Path, seed: int) -> Pipeline:
    base = Supervised(
        form="conversations",
        thinking=False,
        data=(str(data),),
        optimizer="muon",
        weight_decay=0.01,
        held_out=HELD_OUT,
        save_every=10_000,
        seed=seed,
        **size.settings,
    )
    pretrain, warm_up, sparse = (
        replace(base, steps=steps, lr=lr) for steps, lr in zip(size.steps, size.rates, strict=True)
    )
    return Pipeline(
        stages={
            "blank": Blank(shape=size.shape, data=(str(data),), vocab_size=1024),
            "dense": replace(pretrain, model="stage:blank", random_weights=True),
            "converted": Conversion(model="stage:dense", indexer=replace(size.indexer, seed=seed)),
            "warm_up": replace(warm_up, model="stage:converted", dense_attention=True, learns="indexer"),
            "sparse": replace(sparse, model="stage:warm_up"),
        }
    )


def write_world(size: Size, folder: Path, seed: int) -> list[Recital]:
    """Conversations to train on, and behind them those that are held out, which are returned."""
    rng = random.Random(f"recall{seed}")
    found = [recital(rng, *size.facts) for _ in range(size.documents + HELD_OUT)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"messages": to_openai(one.messages)}) + "\n" for one in found)
    (folder / "recitals.jsonl").write_text("".join(lines))
    return found[-HELD_OUT:]


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
            if one.recital[end : end + 1] == ";":
                bucket = np.searchsorted(BUCKETS, (place - fact[source]) / topk, side="right") - 1
                right[bucket] += bool(hits_N[place])
                asked[bucket] += 1
    return [right[i] / asked[i] if asked[i] else float("nan") for i in range(len(BUCKETS))]


def likeliest(policy: Policy, ids_N: torch.Tensor) -> np.ndarray:
    """Whether each token of a sequence is the likeliest behind those before it; bool [N]."""
    hidden_ND = policy(ids_N, torch.tensor([0, len(ids_N)], device=ids_N.device)).hidden_ND
    best_N = (hidden_ND[:-1] @ policy.head_weight.T).argmax(-1)
    return np.r_[False, (best_N == ids_N[1:]).cpu().numpy()]


def run(size: Size, seed: int, home: Path, console: Console) -> list[list[str]]:
    """All stages of one seed; a row for each state of the model."""
    folder = home / f"seed{seed}"
    held_out = write_world(size, folder, seed)
    if code := pipeline.run(stages(size, folder / "recitals.jsonl", seed), folder / "stages", console):
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
    names = [f"{low}-{high}" for low, high in pairwise(BUCKETS)] + [f"{BUCKETS[-1]}+"]
    header = ["seed", "model", "loss", "loss, dense attention", "indexer KL", "selected mass by layer", *names]
    for line in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
