"""How far the trainer's log-probabilities are from the engine's on the same weights, with each replay on and off.

    python benchmarks/parity.py                            a small policy of random weights
    python benchmarks/parity.py --model runs/cold-start-x  a checkpoint

Prints, for each type the engine and the trainer compute in: the mismatch KL (mean over tokens, k3), the largest
|log ratio| of a token, and the share of (token, layer) pairs for which the trainer's routers choose other experts.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from transformers import DeepseekV32ForCausalLM

from trimtab.grpo.batch import Packed, Trajectory, pack
from trimtab.grpo.config import LossSettings
from trimtab.grpo.estimators import mismatch_kl
from trimtab.grpo.policy.policy import Policy, load_policy
from trimtab.grpo.stages.cold_start import quickstart_policy
from trimtab.kernels import reference
from trimtab.rollout.engine.engine import Engine, EngineConfig, read_config
from trimtab.rollout.types import Completion, Request, Sampling, Segment

SAMPLING = Sampling(temperature=1.0, top_p=0.95, top_k=64, max_tokens=128)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
    segment = Segment(
        name=name,
        token_ids=np.array([*prompt, *one.token_ids], np.int32),
        sampled=np.array([False] * len(prompt) + [True] * len(one.token_ids)),
        logp=one.logp,
        kept_ids=one.kept_ids,
        kept_offsets=one.kept_offsets,
        routes=one.routes,
        weight_version=np.full(len(one.token_ids), one.weight_version, np.int32),
    )
    return Trajectory(name=name, domain="any", segments=(segment,), advantage=1.0, settings=LossSettings())


def logp(policy: Policy, packed: Packed, *, routing: bool, mask: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The trainer's log-probabilities, and the experts it used."""
    out = policy(packed.ids_N, packed.cu_seqlens, routes_NLK=packed.routes_NLK if routing else None)
    hidden_SD = out.hidden_ND[packed.predict_S]
    head = (hidden_SD, policy.head_weight, packed.token_S)
    if mask:
        kept = (packed.kept_id_E, packed.kept_offset_S)
        return reference.kept_logp(*head, *kept, SAMPLING.temperature), out.routes_NLK
    return reference.full_logp(*head, SAMPLING.temperature), out.routes_NLK


@torch.no_grad()
def compare(policy: Policy, batch: list[Trajectory], *, routing: bool, mask: bool) -> tuple[float, float, float]:
    """Mean mismatch KL, largest |log ratio|, share of routes that differ."""
    kls, ratios, rerouted = [], [], []
    for packed in (packed.to(DEVICE) for packed in pack(batch, max_tokens=16384)):
        logp_S, routes_NLK = logp(policy, packed, routing=routing, mask=mask)
        kls.append(mismatch_kl(logp_S, packed.old_logp_S))
        ratios.append((logp_S - packed.old_logp_S).abs().max())
        if routes_NLK is not None and packed.routes_NLK is not None:
            differ = routes_NLK.sort(-1).values != packed.routes_NLK.long().sort(-1).values
            rerouted.append(differ.any(-1).flatten().float())
    return float(torch.cat(kls).mean()), float(max(ratios)), float(torch.cat(rerouted).mean()) if rerouted else 0.0


def rows(path: Path, engine_dtype: str) -> Iterator[str]:
    """A line of the table for each way to compare."""
    config = read_config(str(path))
    longest = config["max_position_embeddings"] - SAMPLING.max_tokens
    engine = Engine(EngineConfig(model=str(path), dtype=engine_dtype, max_model_len=longest + SAMPLING.max_tokens))
    batch = sample(engine, config["vocab_size"], longest)
    engine.close()
    for trainer_dtype, routing, mask in product(DTYPES, (True, False), (True, False)):
        policy = load_policy(path, dtype=DTYPES[trainer_dtype]).to(DEVICE)
        kl, worst, rerouted = compare(policy, batch, routing=routing, mask=mask)
        names = f"{engine_dtype:9} {trainer_dtype:9} {'on' if routing else 'off':8} {'on' if mask else 'off':5}"
        yield f"{names} {kl:12.2e} {worst:12.2e} {rerouted:10.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder")
    parser.add_argument(
        "--engine", nargs="*", choices=DTYPES, default=list(DTYPES), help="types the engine computes in"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or Path(folder)
        if options.model is None:
            make_policy(path)
        print(f"{'engine':9} {'trainer':9} routing  mask  {'mismatch KL':>12} {'max |ratio|':>12} {'rerouted':>10}")
        for dtype in options.engine:
            for row in rows(path, dtype):
                print(row, flush=True)


if __name__ == "__main__":
    main()
