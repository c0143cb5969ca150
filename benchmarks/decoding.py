"""A decoding step: our engine beside vLLM's own LLM on the same model, and our DSA + MoE policy, graphs on and off.

    python benchmarks/decoding.py             both tables, about five minutes
    python benchmarks/decoding.py smollm2     256 sequences: ours, vLLM with masks, vLLM without; [--model FOLDER]
    python benchmarks/decoding.py dsa         4, 8 and 32 sequences of 2.5K to 5.6K tokens; --quick: graphs only

Every row is a process of its own. A figure is the median wall time of a step in which all sequences decode and none is
prefilled. The floor is what such a step has to read, every weight that it touches once and its rows of the cache, at
the bandwidth of the card's data sheet.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from shapes import Card, Cost, card, checkpoint

STEADY = 24
"""Steps that a figure is the median of: the last before the first sequence ends."""
SAMPLING = {"temperature": 1.0, "top_p": 0.95, "top_k": 64}


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences that decode together, by the lengths of their prompts."""

    lengths: tuple[int, ...]
    steps: int
    """Tokens that each samples: enough that the first is still at it when the last has been prefilled."""

    @property
    def longest(self) -> int:
        return max(self.lengths) + self.steps

    @property
    def decoded(self) -> list[int]:
        """Lengths in the middle of the steps that count."""
        return [length + self.steps - STEADY // 2 for length in self.lengths]


def spread(count: int, first: int, last: int, steps: int) -> Load:
    """Prompts of evenly spaced lengths, so that sequences are between first and last tokens long."""
    ends = [first + (last - steps - first) * i // max(1, count - 1) for i in range(count)]
    return Load(tuple(ends), steps)


def prompts(load: Load, vocab: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in load.lengths]


def step_ms(step: Callable[[], bool]) -> float:
    """Median of the last steps before the first sequence is finished, which step returns."""
    times: list[float] = []
    finished = False
    while not finished:
        started = time.perf_counter()
        finished = step()
        times.append(time.perf_counter() - started)
    return 1e3 * median(times[-STEADY - 1 : -1])


def ours(job: dict[str, Any]) -> None:
    """Print the milliseconds of each load, with our engine."""
    import torch

    from trimtab.rollout.engine.engine import Engine, EngineConfig
    from trimtab.rollout.types import Request, Sampling

    loads = [Load(tuple(one["lengths"]), one["steps"]) for one in job["loads"]]
    cost = Cost.of(Path(job["model"]))
    config = EngineConfig(
        model=job["model"],
        dtype=job["dtype"],
        max_model_len=max(load.longest for load in loads),
        kv_cache_bytes=max(64 << 20, int(1.3 * max(cost.cached_bytes(sum(load.decoded)) for load in loads))),
        max_num_seqs=max(len(load.lengths) for load in loads),
        graphs=job["graphs"] and torch.cuda.is_available(),
    )
    engine = Engine(config)
    for load in loads:
        sampling = Sampling(**SAMPLING, max_tokens=load.steps)
        for i, ids in enumerate(prompts(load, cost.config["vocab_size"])):
            engine.add(Request(name=f"{i}", prompt_ids=tuple(ids), sampling=sampling, seed=i))
        print(json.dumps({"ms": step_ms(lambda: bool(engine.step()))}), flush=True)
        while engine.busy:
            engine.step()
    engine.close()


def theirs(job: dict[str, Any]) -> None:
    """The same with vLLM's own LLM: masks and log-probabilities as it records them itself, or neither."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_USE_DEEP_GEMM": "0"}
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    (load,) = [Load(tuple(one["lengths"]), one["steps"]) for one in job["loads"]]
    cost = Cost.of(Path(job["model"]))
    masks = {"return_sampling_mask": True, "logprobs_mode": "processed_logprobs"} if job["masks"] else {}
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        max_model_len=load.longest,
        max_num_seqs=len(load.lengths),
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=max(64 << 20, int(1.3 * cost.cached_bytes(sum(load.decoded)))),
        gpu_memory_utilization=0.01,
        generation_config="vllm",
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        **masks,
    )
    recorded = {"logprobs": 0, "flat_logprobs": True} if job["masks"] else {}
    for i, ids in enumerate(prompts(load, cost.config["vocab_size"])):
        params = SamplingParams(
            **SAMPLING,
            **recorded,
            max_tokens=load.steps,
            seed=i,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": ids}, params)
    print(json.dumps({"ms": step_ms(lambda: any(one.finished for one in llm.llm_engine.step()))}), flush=True)


JOBS = {"ours": ours, "theirs": theirs}


def run(kind: str, loads: list[Load], **job: Any) -> list[float] | str:
    """Milliseconds by load, from a process of its own; or why there are none."""
    job["loads"] = [{"lengths": load.lengths, "steps": load.steps} for load in loads]
    log = Path("runs") / "decoding.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as errors:
        command = [sys.executable, __file__, "--job", kind, json.dumps(job)]
        environment = {**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0"}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    found = [json.loads(line)["ms"] for line in done.stdout.splitlines() if line.startswith('{"ms"')]
    if len(found) == len(loads):
        return found
    words = [line.strip() for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    return f"code {done.returncode}: {(words or ['no words'])[-1][:200]} (see {log})"


def floor_ms(cost: Cost, load: Load, hardware: Card) -> float:
    return 1e3 * cost.decode_bytes(load.decoded) / hardware.bandwidth


def dense(model: Path, load: Load, dtype: str, hardware: Card, *, quick: bool) -> None:
    """Our engine against vLLM's, the same sequences."""
    print(f"{model.name}, {len(load.lengths)} sequences of up to {load.longest} tokens\n")
    print("| engine                    | ms a step | x vLLM with masks | x floor |")
    print("| ------------------------- | --------- | ----------------- | ------- |")
    floor = floor_ms(Cost.of(model), load, hardware)
    rows = {
        "vLLM, masks, graphs": ("theirs", {"masks": True}),
        "trimtab, graphs": ("ours", {"graphs": True}),
        "vLLM, no masks, graphs": ("theirs", {"masks": False}),
        "trimtab, eager": ("ours", {"graphs": False}),
    }
    first = float("nan")
    for name, (kind, options) in list(rows.items())[: 2 if quick else 4]:
        found = run(kind, [load], model=str(model), dtype=dtype, **options)
        if isinstance(found, str):
            print(f"| {name:25} | failed: {found}", flush=True)
            continue
        first = found[0] if name.startswith("vLLM, masks") else first
        print(f"| {name:25} | {found[0]:9.2f} | {found[0] / first:17.2f} | {found[0] / floor:7.1f} |", flush=True)
    print(f"| {'floor':25} | {floor:9.2f} | {floor / first:17.2f} |         |\n", flush=True)


def sparse(model: Path, loads: list[Load], dtype: str, hardware: Card, *, quick: bool) -> None:
    """Our DSA + MoE policy at several batch sizes."""
    cost = Cost.of(model)
    print(f"{model.name}, sequences of {min(loads[-1].lengths)} to {loads[-1].longest} tokens\n")
    print("| engine         | sequences | ms a step | floor ms | x floor |")
    print("| -------------- | --------- | --------- | -------- | ------- |")
    for name, graphs in [("graphs", True), ("eager", False)][: 1 if quick else 2]:
        found = run("ours", loads, model=str(model), dtype=dtype, graphs=graphs)
        if isinstance(found, str):
            print(f"| {name:14} | failed: {found}", flush=True)
            continue
        for load, ms in zip(loads, found, strict=True):
            floor = floor_ms(cost, load, hardware)
            print(f"| {name:14} | {len(load.lengths):9} | {ms:9.2f} | {floor:8.2f} | {ms / floor:7.1f} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=("all", "smollm2", "dsa"), default="all")
    parser.add_argument("--model", type=Path, help="a checkpoint folder in place of SmolLM2's shape")
    parser.add_argument("--quick", action="store_true", help="the two rows that matter of each table")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in fp32, for a CPU")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        JOBS[options.job[0]](json.loads(options.job[1]))
        return
    hardware, tiny = card(), options.tiny
    print(f"{hardware.name}\n")
    dtype = "float32" if tiny else "bfloat16"
    if options.table in ("all", "smollm2"):
        model = options.model.resolve() if options.model else checkpoint("tiny-llama" if tiny else "smollm2-135m")
        dense(model, Load((64,) * (8 if tiny else 256), 64), dtype, hardware, quick=options.quick)
    if options.table in ("all", "dsa"):
        model = checkpoint("tiny-dsa" if tiny else "dsa-1.6b")
        counts, ends = ((2, 4), (60, 200)) if tiny else ((4, 8, 32), (2560, 5632))
        loads = [spread(count, *ends, steps=64) for count in counts]
        sparse(model, loads, dtype, hardware, quick=options.quick)


if __name__ == "__main__":
    main()
