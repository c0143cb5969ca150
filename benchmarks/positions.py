"""Time of a token against its position, up to 128K: a dense policy with latent attention, and its sparse conversion.

    python benchmarks/positions.py           about four minutes on a GPU
    python benchmarks/positions.py --tiny    that it runs, on a CPU

Both are the same 1.6 B weights; `trimtab convert` gives the sparse one its indexers, which are untrained: what they
select does not matter to the time. Every prompt is played twice with other tokens, and the second time counts. Prefill
is the time to the first token, less that of the position before, a token between the two; decoding the median of 64
steps of one sequence, and of eight that share the prompt. DeepSeek-V3.2-Exp's figure 3 has the same two curves.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from shapes import card, checkpoint

STEPS = 64
SETTLE = 8
"""Decoding steps before those that count."""
CHUNK = 4096
POSITIONS = (2048, 4096, 8192, 16384, 32768, 65536, 131072 - 128)
TINY_POSITIONS = (64, 256, 1024)
TOGETHER = 8


def measure(model: str, positions: list[int], chunk: int, dtype: str) -> None:
    """Print a line for each position: milliseconds a prefilled token, a step of one sequence, a step of several."""
    import torch

    from trimtab.rollout.engine.engine import Engine, EngineConfig
    from trimtab.rollout.types import Request, Sampling

    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    gpu = torch.cuda.is_available()
    engine = Engine(
        EngineConfig(
            model=model,
            dtype=dtype,
            max_model_len=positions[-1] + 2 * STEPS,
            kv_cache_bytes=(12 << 30) if gpu else (64 << 20),
            max_num_seqs=TOGETHER,
            max_batched_tokens=chunk,
            graphs=gpu,
        )
    )

    def play(position: int, count: int, repeat: int) -> list[float]:
        """Milliseconds of every step."""
        rng = random.Random(f"{position} {repeat}")
        ids = tuple(rng.randrange(3, vocabulary) for _ in range(position))
        for i in range(count):
            engine.add(Request(name=f"{i}", prompt_ids=ids, sampling=Sampling(max_tokens=STEPS + SETTLE), seed=i))
        times = []
        while engine.busy:
            started = time.perf_counter()
            engine.step()
            times.append(1e3 * (time.perf_counter() - started))
        return times

    before = (0, 0.0)
    for position in positions:
        for repeat in range(2):
            alone, together = play(position, 1, repeat), play(position, TOGETHER, repeat)
        first_token = sum(alone[: -STEPS - SETTLE + 1])
        prefill = (first_token - before[1]) / (position - before[0])
        before = (position, first_token)
        row = {"prefill": prefill, "one": median(alone[-STEPS:]), "many": median(together[-STEPS:])}
        print(json.dumps({"position": position} | row), flush=True)
    engine.close()


def rows(model: Path, positions: list[int], chunk: int, dtype: str) -> list[dict[str, float]]:
    """What a process of its own measures."""
    job = json.dumps([str(model), positions, chunk, dtype])
    environment = {**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    done = subprocess.run([sys.executable, __file__, "--job", job], stdout=subprocess.PIPE, text=True, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"position"')]
    if done.returncode or len(found) != len(positions):
        raise SystemExit(f"{model}: code {done.returncode} after {len(found)} of {len(positions)} positions")
    return found


def crossing(dense: list[dict[str, float]], sparse: list[dict[str, float]], name: str) -> str:
    """The first position measured from which on the sparse policy is faster."""
    start = None
    for one, other in reversed(list(zip(dense, sparse, strict=True))):
        if other[name] >= one[name]:
            break
        start = one["position"]
    return f"{start:,.0f}" if start else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        measure(*json.loads(options.job))
        return
    from trimtab.grpo.stages.config import Indexer
    from trimtab.grpo.stages.convert import convert

    dense = checkpoint("tiny-mla" if options.tiny else "mla-1.6b")
    sparse = dense.with_name(f"{dense.name}-converted")
    indexer = Indexer(index_n_heads=4, index_head_dim=16, index_topk=32) if options.tiny else Indexer(index_n_heads=16)
    if not sparse.exists():
        convert(dense, sparse, indexer)
    positions, chunk = (list(TINY_POSITIONS), 32) if options.tiny else (list(POSITIONS), CHUNK)
    dtype = "float32" if options.tiny else "bfloat16"
    found = [rows(model, positions, chunk, dtype) for model in (dense, sparse)]
    print(f"{card().name}, index_topk {indexer.index_topk}; dense / sparse, sparse : dense\n")
    print(f"| position | prefill, microseconds a token | decoding, ms a step | {TOGETHER} sequences |")
    print("| --- | --- | --- | --- |")
    for one, other in zip(*found, strict=True):
        cells = [
            (1e3 * one["prefill"], 1e3 * other["prefill"]),
            (one["one"], other["one"]),
            (one["many"], other["many"]),
        ]
        shown = [f"{a:.2f} / {b:.2f} ({b / a:.2f})" for a, b in cells]
        print(f"| {one['position']:,.0f} | {' | '.join(shown)} |")
    names = {"prefill": "prefill", "one": "decoding", "many": f"decoding {TOGETHER}"}
    print("\nfaster from: " + ", ".join(f"{shown} {crossing(*found, name)}" for name, shown in names.items()))


if __name__ == "__main__":
    main()
