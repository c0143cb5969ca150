"""Many cycles of an engine and a trainer on one GPU: sleep, memory for training, wake, new weights; does memory grow?

    python benchmarks/sleep.py                    50 cycles with the shape of Qwen3-0.6B
    python benchmarks/sleep.py --shape smollm2-135m --cycles 10 --train-gib 40

Every other cycle brings other weights and the next one the first ones again; after each, a probe is compared with what
the same weights gave the first time. Memory is the GPU's, of all processes. Ends with 1 if it grew by more than 1 %
or a probe changed.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
import transformers
from shapes import SHAPES, checkpoint
from torch import Tensor, nn

from trimtab.rollout.engine.engine import EngineConfig
from trimtab.rollout.engine.pool import Pool, gpu_share
from trimtab.rollout.types import Completion, Request, Sampling

PROBE = Request(
    name="probe",
    prompt_ids=tuple(range(100, 164)),
    sampling=Sampling(temperature=1.0, top_p=1.0, top_k=64, max_tokens=16),
    seed=1,
)


def used_gib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def train_like(gib: float) -> None:
    """Take memory as a step of training does, write it, give it back."""
    pieces = [torch.ones(256 << 20, dtype=torch.uint8, device="cuda") for _ in range(int(gib * 4))]
    torch.cuda.synchronize()
    del pieces
    torch.cuda.empty_cache()


def weights(model: nn.Module, scale: float) -> Iterator[tuple[str, Tensor]]:
    for name, weight in model.named_parameters():
        yield name, weight.detach() * scale
    yield from ((n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))


def difference(one: Completion, first: Completion) -> float:
    """Largest difference of log-probabilities; infinite if other tokens were sampled."""
    same = one.token_ids.tolist() == first.token_ids.tolist()
    return float(np.abs(one.logp - first.logp).max()) if same else float("inf")


def cycles(pool: Pool, model: nn.Module, count: int, train_gib: float | None) -> tuple[list[float], float]:
    """Play them, printing a row each: memory while asleep, and the probe's largest difference."""
    first: dict[float, Completion] = {}
    asleep, worst = [], 0.0
    for cycle in range(count):
        scale = (1.0, 1.05)[cycle % 2]
        times = [time.perf_counter()]
        pool.sleep()
        times.append(time.perf_counter())
        asleep.append(used_gib())
        free = torch.cuda.mem_get_info()[0] / 2**30
        train_like(0.8 * free if train_gib is None else train_gib)
        times.append(time.perf_counter())
        pool.load_weights(lambda scale=scale: weights(model, scale), cycle + 1)
        times.append(time.perf_counter())
        pool.wake()
        times.append(time.perf_counter())
        (one,) = pool.probe(PROBE)
        change = difference(one, first.setdefault(scale, one))
        worst = max(worst, change)
        sleep, _, update, wake = (b - a for a, b in pairwise(times))
        print(
            f"{cycle:6d}{asleep[-1]:12.3f}{used_gib():12.3f}{sleep:9.3f}{update:9.3f}{wake:9.3f}{change:12.2e}",
            flush=True,
        )
    return asleep, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--kv-gib", type=float, default=16.0)
    parser.add_argument("--train-gib", type=float, default=None, help="default: 80 %% of what is free")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    family = getattr(transformers, f"{SHAPES[options.shape][0]}ForCausalLM")
    model = family.from_pretrained(checkpoint(options.shape), dtype=torch.bfloat16).cuda()
    config = EngineConfig(
        model=str(checkpoint(options.shape)),
        max_model_len=4096,
        dtype="bfloat16",
        kv_cache_bytes=int(options.kv_gib * 2**30),
        max_num_seqs=64,
        graphs=True,
        sleep=True,
    )
    pool = Pool(config, 1, gpu_share(1))
    try:
        pool.wait_until_ready()
        print(f"{torch.cuda.get_device_name()}, {options.shape}, awake at the start: {used_gib():.3f} GiB")
        print(" cycle  asleep GiB   awake GiB  sleep s update s   wake s       probe")
        asleep, worst = cycles(pool, model, options.cycles, options.train_gib)
    finally:
        pool.close()
    settled = asleep[min(2, len(asleep) - 1)]  # the first cycles make what is kept: pinned memory, workspaces
    growth = asleep[-1] / settled - 1
    print(f"memory while asleep grew by {growth:.2%} since the third cycle; the probe changed by {worst:.2e} at most")
    sys.exit(growth > 0.01 or worst > 0)


if __name__ == "__main__":
    main()
