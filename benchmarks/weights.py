"""Seconds to bring a policy's weights from the trainer's process into an engine on the same GPU, by part.

    python benchmarks/weights.py                      135M, 0.6B, 1.7B and a DSA policy of 1.6B
    python benchmarks/weights.py --shapes smollm2-135m --updates 10

The trainer holds fp32 masters and rounds each tensor to bf16 as it is asked for. Weights are random: the time does not
depend on them. Gather: rounding. Send: copies into the shared memory, and calls. Load: what the engine does.
"""

import argparse
import time
from collections.abc import Iterator
from statistics import median

import torch
import transformers
from shapes import SHAPES, checkpoint
from torch import Tensor, nn

from trimtab.rollout.engine.engine import EngineConfig
from trimtab.rollout.engine.pool import Pool, gpu_share

DEFAULT = ["smollm2-135m", "qwen3-0.6b", "qwen3-1.7b", "dsa-1.6b"]


class Masters:
    """fp32 weights of a policy, given out in bf16; counts the seconds that this takes."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: weight.detach().float() for name, weight in model.named_parameters()}
        self._buffers = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
        self.seconds = 0.0

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._weights.items():
            started = time.perf_counter()
            rounded = weight.to(torch.bfloat16)
            torch.cuda.current_stream().synchronize()
            self.seconds += time.perf_counter() - started
            yield name, rounded
        yield from self._buffers.items()

    @property
    def gigabytes(self) -> float:
        return sum(weight.numel() for weight in self._weights.values()) * 2 / 1e9


def policy(shape: str) -> nn.Module:
    """The policy of a shape on the GPU."""
    family = getattr(transformers, f"{SHAPES[shape][0]}ForCausalLM")
    return family.from_pretrained(checkpoint(shape), dtype=torch.bfloat16).cuda()


def measure(shape: str, updates: int) -> str:
    """One line of the table: medians over the updates after the first."""
    masters = Masters(policy(shape))
    config = EngineConfig(
        model=str(checkpoint(shape)),
        max_model_len=4096,
        dtype="bfloat16",
        kv_cache_bytes=4 << 30,
        max_num_seqs=64,
        graphs=True,
    )
    pool = Pool(config, 1, gpu_share(1))
    try:
        pool.wait_until_ready()
        parts = [update(pool, masters, version) for version in range(updates + 1)]
    finally:
        pool.close()
    total, gather, send, load = (median(part) for part in zip(*parts[1:], strict=True))
    start = sum(pool.start_seconds[0].values())
    cells = (masters.gigabytes, total, gather, send, load, parts[0][0], start)
    return f"{shape:>13}" + "".join(f"{cell:10.3f}" for cell in cells)


def update(pool: Pool, masters: Masters, version: int) -> tuple[float, float, float, float]:
    """Seconds of one update: all, gather, send, load."""
    masters.seconds = 0.0
    started = time.perf_counter()
    pool.load_weights(masters, version + 1)
    total = time.perf_counter() - started
    load = sum(pool.update_seconds.values())
    return total, masters.seconds, total - masters.seconds - load, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=DEFAULT)
    parser.add_argument("--updates", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    print(torch.cuda.get_device_name())
    names = ("GB", "update s", "gather", "send", "load", "first", "start s")
    print(f"{'policy':>13}" + "".join(f"{name:>10}" for name in names))
    for shape in options.shapes:
        print(measure(shape, options.updates), flush=True)


if __name__ == "__main__":
    main()
