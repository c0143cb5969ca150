"""How far the trainer's log-probabilities are from the engine's on the same weights, and where that comes from.

    python benchmarks/parity.py                          SmolLM2's shape and a small DSA + MoE policy, random weights
    python benchmarks/parity.py smollm2 --model FOLDER   one of them, with weights of your own
    python benchmarks/parity.py dsa --model runs/x       such as a policy that was trained
    --replays: all combinations of types and replays, in place of the table of sources

The mismatch KL is a mean over sampled tokens (k3), beside the largest |log ratio| of one. Each row changes one thing of
the first, in which both compute in bf16 and both replays are on: the trainer's head in fp32; its routers' own choice in
place of the recorded; no selection of keys on either side; the trainer's products, or everybody's, in fp32. What
a row takes off the first is what that thing adds to it.
"""

import argparse
import json
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from accelerate import Accelerator
from shapes import Cost, card, checkpoint
from transformers import DeepseekV32ForCausalLM

from trimtab.grpo.batch import Packed, Trajectory, pack
from trimtab.grpo.config import Config, Domain, LossSettings
from trimtab.grpo.estimators import mismatch_kl
from trimtab.grpo.policy.policy import Policy, load_policy
from trimtab.grpo.stages.shapes import quickstart_policy
from trimtab.grpo.trainer import Trainer
from trimtab.kernels import reference
from trimtab.rollout.attempt import recorded as recorded_segment
from trimtab.rollout.checkpoint import read_config
from trimtab.rollout.engine.engine import Engine, EngineConfig
from trimtab.rollout.types import Completion, Request, Sampling

MAX_TOKENS = 128
SAMPLING = Sampling(temperature=1.0, top_p=0.95, top_k=64, max_tokens=MAX_TOKENS)
DTYPES = ("float32", "bfloat16")
TOPK = 64
LENGTHS = (20, 150, 600, 1500, 3000)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_policy(path: Path) -> None:
    """Write a checkpoint of the quickstart's shape, with random weights that give neither flat nor sharp choices."""
    config = quickstart_policy(1024, 0, 1)
    config.update({"index_topk": TOPK, "max_position_embeddings": 2 * max(LENGTHS), "initializer_range": 0.1})
    torch.manual_seed(0)
    DeepseekV32ForCausalLM(config).save_pretrained(path)


def sample(engine: Engine, vocab_size: int, longest: int) -> list[Trajectory]:
    """Four continuations of each prompt, all in flight at once."""
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(2, vocab_size) for _ in range(length)) for length in LENGTHS if length <= longest]
    requests = [Request(name=f"p{i}", prompt_ids=ids, sampling=SAMPLING, n=4, seed=i) for i, ids in enumerate(prompts)]
    prompt_of = {engine.add(request): request.prompt_ids for request in requests}
    found = []
    while engine.busy:
        for key, completions in engine.step():
            found += [trajectory(f"{key}/{i}", prompt_of[key], one) for i, one in enumerate(completions)]
    return found


def trajectory(name: str, prompt: tuple[int, ...], one: Completion) -> Trajectory:
    segment = recorded_segment(name, prompt, one)
    return Trajectory(name=name, domain="any", segments=(segment,), advantage=1.0, settings=LossSettings())


@dataclass(frozen=True, slots=True)
class Way:
    """How the trainer computes what it compares."""

    dtype: str = "bfloat16"
    routing: bool = True
    mask: bool = True
    head: str = "bfloat16"
    """The type of the head, where it is not the policy's."""


def trained(path: Path, dtype: str) -> Policy:
    """The policy as a Trainer holds it: fp32 master weights, compute in dtype."""
    config = Config(
        domains={"any": Domain(task="x:y", loss=LossSettings(beta=0.0))},
        model=str(path),
        precision="fp32" if dtype == "float32" else "bf16",
    )
    trainer = Trainer(config, load_policy(path), None, Accelerator(cpu=DEVICE == "cpu"))
    policy: Policy = trainer.policy
    return policy


def logp(policy: Policy, packed: Packed, way: Way) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The trainer's log-probabilities, and the experts it used."""
    full, kept = reference.full_logp, reference.kept_logp
    if DEVICE == "cuda":
        from trimtab.kernels.lm_head import full_logp as full
        from trimtab.kernels.lm_head import kept_logp as kept
    out = policy(packed.ids_N, packed.cu_seqlens, routes_NLK=packed.routes_NLK if way.routing else None)
    hidden_SD, weight_VD = out.hidden_ND[packed.predict_S], policy.head_weight
    if way.head == "float32":
        hidden_SD, weight_VD = hidden_SD.float(), weight_VD.float()
    head = (hidden_SD, weight_VD, packed.token_S)
    if way.mask:
        return kept(*head, packed.kept_id_E, packed.kept_offset_S, SAMPLING.temperature), out.routes_NLK
    return full(*head, SAMPLING.temperature), out.routes_NLK


@torch.no_grad()
def compare(policy: Policy, batch: list[Trajectory], way: Way) -> tuple[float, float, float]:
    """Mean mismatch KL, largest |log ratio|, share of routes that differ."""
    kls, ratios, rerouted = [], [], []
    for packed in (packed.to(DEVICE) for packed in pack(batch, max_tokens=16384)):
        logp_S, routes_NLK = logp(policy, packed, way)
        kls.append(mismatch_kl(logp_S.double(), packed.old_logp_S.double()))
        ratios.append((logp_S - packed.old_logp_S).abs().max())
        if routes_NLK is not None and packed.routes_NLK is not None:
            differ = routes_NLK.sort(-1).values != packed.routes_NLK.long().sort(-1).values
            rerouted.append(differ.any(-1).flatten().float())
    return float(torch.cat(kls).mean()), float(max(ratios)), float(torch.cat(rerouted).mean()) if rerouted else 0.0


def recorded(path: Path, engine_dtype: str) -> list[Trajectory]:
    """What an engine of that type samples, in a process of its own: it would end the trainer's process group."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, __file__, "--record", str(path), engine_dtype, file.name, *map(str, LENGTHS)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: list[Trajectory] = pickle.loads(Path(file.name).read_bytes())
    return found


def record(path: str, engine_dtype: str, target: str, *lengths: str) -> None:
    """Sample continuations of prompts of these lengths and write their trajectories."""
    globals()["LENGTHS"] = tuple(map(int, lengths))
    config = read_config(path)
    longest = min(config["max_position_embeddings"] - MAX_TOKENS, max(LENGTHS))
    tokens = 4 * sum(length + MAX_TOKENS for length in LENGTHS)
    engine = Engine(
        EngineConfig(
            model=path,
            dtype=engine_dtype,
            max_model_len=longest + MAX_TOKENS,
            kv_cache_bytes=max(64 << 20, int(2.6 * Cost.of(Path(path)).cached_bytes(tokens))),
            graphs=DEVICE == "cuda" and engine_dtype == "bfloat16",
        )
    )
    Path(target).write_bytes(pickle.dumps(sample(engine, config["vocab_size"], longest)))
    engine.close()


def without_selection(path: Path, folder: Path) -> Path:
    """The same checkpoint with an indexer that selects every key."""
    shutil.copytree(path, folder, dirs_exist_ok=True)
    config = read_config(str(path))
    window = max(LENGTHS) + MAX_TOKENS
    (folder / "config.json").write_text(json.dumps(config | {"index_topk": window}))
    return folder


def sources(path: Path, folder: Path) -> None:
    """Where the mismatch comes from: one row for each thing that is switched."""
    sparse = "index_topk" in read_config(str(path))
    moe = sparse or "num_experts" in read_config(str(path))
    print("| engine   | trainer  | switched                            | mismatch KL | of first | largest log ratio |")
    print("| -------- | -------- | ----------------------------------- | ----------- | -------- | ----------------- |")
    batch, policy = recorded(path, "bfloat16"), trained(path, "bfloat16")
    first = row("bf16", "bf16", "nothing", compare(policy, batch, Way()), None)
    row("bf16", "bf16", "head: the trainer's in fp32", compare(policy, batch, Way(head="float32")), first)
    row("bf16", "bf16", "kept sets: not replayed", compare(policy, batch, Way(mask=False)), first)
    if moe:
        row("bf16", "bf16", "routes: the trainer's own", compare(policy, batch, Way(routing=False)), first)
    policy = trained(path, "float32")
    row("bf16", "fp32", "products: the trainer's in fp32", compare(policy, batch, Way("float32")), first)
    if sparse:
        whole = without_selection(path, folder)
        found = compare(trained(whole, "bfloat16"), recorded(whole, "bfloat16"), Way())
        row("bf16", "bf16", "selection: every key, on both sides", found, first)
    row("fp32", "fp32", "all of it", compare(policy, recorded(path, "float32"), Way("float32")), first)
    print()


def row(engine: str, trainer: str, switched: str, found: tuple[float, float, float], first: float | None) -> float:
    """Print a row; returns its mismatch KL."""
    kl, worst, _ = found
    share = 1.0 if first is None else kl / first if first else float("nan")
    print(f"| {engine:8} | {trainer:8} | {switched:35} | {kl:11.2e} | {share:8.2f} | {worst:17.2e} |", flush=True)
    return kl


def replays(path: Path) -> None:
    """Every combination of types and replays."""
    print(f"{'engine':9} {'trainer':9} routing  mask  {'mismatch KL':>12} {'max |ratio|':>12} {'rerouted':>10}")
    for engine_dtype in DTYPES:
        for line in combinations(path, engine_dtype):
            print(line, flush=True)
    print()


def combinations(path: Path, engine_dtype: str) -> Iterator[str]:
    batch = recorded(path, engine_dtype)
    for dtype in DTYPES:
        policy = trained(path, dtype)
        for routing, mask in product((True, False), (True, False)):
            kl, worst, rerouted = compare(policy, batch, Way(dtype, routing, mask))
            names = f"{engine_dtype:9} {dtype:9} {'on' if routing else 'off':8} {'on' if mask else 'off':5}"
            yield f"{names} {kl:12.2e} {worst:12.2e} {rerouted:10.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", nargs="?", choices=("both", "smollm2", "dsa"), default="both")
    parser.add_argument("--model", type=Path, help="checkpoint folder, of the one policy that is named")
    parser.add_argument("--replays", action="store_true", help="all combinations of types and replays")
    parser.add_argument("--tiny", action="store_true", help="a tiny Llama and short prompts, for a CPU")
    parser.add_argument("--record", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        record(*options.record)
        return
    if options.model and options.policy == "both":
        parser.error("--model needs the policy that it is: smollm2 or dsa")
    if options.tiny:
        globals()["LENGTHS"] = (20, 150)
    print(f"{card().name}\n")
    with tempfile.TemporaryDirectory() as folder:
        for policy in ("smollm2", "dsa") if options.policy == "both" else (options.policy,):
            path = options.model or _random(policy, Path(folder), tiny=options.tiny)
            print(f"{policy}: {path}\n")
            if options.replays:
                replays(path)
            else:
                sources(path, Path(folder) / "whole")


def _random(policy: str, folder: Path, *, tiny: bool) -> Path:
    if policy == "smollm2":
        return checkpoint("tiny-llama" if tiny else "smollm2-135m")
    make_policy(folder / "dsa")
    return folder / "dsa"


if __name__ == "__main__":
    main()
