"""Time of a token against its position, up to 128K: a dense policy with latent attention, and its sparse conversion.

    python benchmarks/positions.py           both shapes, about six minutes on a GPU
    python benchmarks/positions.py --tiny    that it runs, on a CPU

mla-v3 has DeepSeek-V3's attention to the number, in four layers; mla-1.6b is a whole policy with an eighth of the
heads. `trimtab convert` gives the sparse ones their indexers, which are untrained: what they select does not matter to
the time. Prefill is the step of the chunk that ends at the position, a token of it; decoding the median step of one
sequence, and of eight that share the prompt. DeepSeek-V3.2-Exp's figure 3 has the same two curves.
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
from typing import Any

from shapes import card, checkpoint

from trimtab.grpo.stages.config import Indexer

STEPS = 64
SETTLE = 8
"""Decoding steps before those that count."""
REPEATS = 3
"""Prompts that count; one before them compiles and warms up."""
CHUNK = 4096
POSITIONS = (4096, 8192, 16384, 32768, 65536, 131072)
TINY_POSITIONS = (64, 256, 512)
TOGETHER = 8
NAMES = {"prefill": "prefill", "one": "decoding", "many": f"decoding {TOGETHER}"}
INDEXERS = {
    "mla-1.6b": Indexer(index_n_heads=16),
    "tiny-mla": Indexer(index_n_heads=4, index_head_dim=16, index_topk=32),
}
"""Of shapes that do not take DeepSeek-V3.2's own."""


def measure(model: str, positions: list[int], chunk: int, dtype: str, repeats: int) -> None:
    """Print a line for each position: microseconds a prefilled token, milliseconds a step of one sequence and of
    several."""
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

    def play(ids: tuple[int, ...], count: int, tokens: int, *, wait: bool) -> list[float]:
        """Milliseconds of every step; where it waits, until the GPU has done it."""
        for i in range(count):
            engine.add(Request(name=f"{i}", prompt_ids=ids, sampling=Sampling(max_tokens=tokens), seed=i))
        times = []
        while engine.busy:
            started = time.perf_counter()
            engine.step()
            if wait and gpu:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - started))
        return times

    prefill, decoding = {p: [] for p in positions}, {(p, n): [] for p in positions for n in (1, TOGETHER)}
    for repeat in range(repeats + 1):
        rng = random.Random(repeat)
        ids = tuple(rng.randrange(3, vocabulary) for _ in range(positions[-1]))
        chunks = play(ids, 1, 1, wait=True)
        for position in positions:
            prefill[position] += [chunks[position // chunk - 1]] * bool(repeat)
            for count in (1, TOGETHER):
                steps = play(ids[:position], count, STEPS + SETTLE, wait=False)
                decoding[position, count] += steps[-STEPS:] * bool(repeat)
    for position in positions:
        one, many = (median(decoding[position, count]) for count in (1, TOGETHER))
        row = {"prefill": 1e3 * median(prefill[position]) / chunk, "one": one, "many": many}
        print(json.dumps({"position": position} | row), flush=True)
    engine.close()


def rows(model: Path, *sizes: Any) -> list[dict[str, float]]:
    """What `measure` prints in a process of its own."""
    job = json.dumps([str(model), *sizes])
    environment = {**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    done = subprocess.run([sys.executable, __file__, "--job", job], stdout=subprocess.PIPE, text=True, env=environment)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"position"')]
    if done.returncode or not found:
        raise SystemExit(f"{model}: code {done.returncode} after {len(found)} positions")
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
    print(f"{card().name}\n")
    for name in ("tiny-mla",) if options.tiny else ("mla-v3", "mla-1.6b"):
        compare(name, tiny=options.tiny)


def compare(name: str, *, tiny: bool) -> None:
    """Print the table of one shape."""
    from trimtab.grpo.stages.convert import convert

    dense = checkpoint(name)
    sparse = dense.with_name(f"{dense.name}-converted")
    indexer = INDEXERS.get(name, Indexer())
    if not sparse.exists():
        convert(dense, sparse, indexer)
    sizes = (TINY_POSITIONS, 64, "float32", 1) if tiny else (POSITIONS, CHUNK, "bfloat16", REPEATS)
    found = [rows(model, *sizes) for model in (dense, sparse)]
    print(f"{name}, index_topk {indexer.index_topk}; dense / sparse (sparse : dense)\n")
    print(f"| position | prefill, microseconds a token | decoding, ms a step | {TOGETHER} sequences |")
    print("| --- | --- | --- | --- |")
    for one, other in zip(*found, strict=True):
        cells = [(one[key], other[key]) for key in NAMES]
        shown = [f"{a:.2f} / {b:.2f} ({b / a:.2f})" for a, b in cells]
        print(f"| {one['position']:,.0f} | {' | '.join(shown)} |")
    print("\nfaster from: " + ", ".join(f"{shown} {crossing(*found, key)}" for key, shown in NAMES.items()) + "\n")


if __name__ == "__main__":
    main()
