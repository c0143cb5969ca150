"""The trainer alone on recorded trajectories, the whole RL loss: KL to a reference, kept sets, replayed routes.

    python benchmarks/training.py             the three rows, about four minutes
    python benchmarks/training.py qwen3-16k   Qwen3-0.6B's shape, 4 sequences of 16K tokens; qwen3-64k: 2 of 64K
    python benchmarks/training.py dsa         DSA + MoE of 1.6 B, 32 trajectories of 5.6K tokens, two optimiser steps
    --no-recompute: keep activations; --quick: one batch after one; --batches N

Every row is a process of its own, in bf16 on a GPU; the figure is the median batch. MFU counts what the update needs
once: the policy forward and backward, the reference forward, logits of kept ids alone. Floor: that
arithmetic at the data sheet's rate, and the optimiser's traffic of 28 bytes a parameter at its bandwidth. GiB: the most
that torch allocated. Published: prime-rl's figures for Qwen3-0.6B, of its hardware and its loss, not measured here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from shapes import Card, Cost, card, checkpoint

KEPT_MEAN, KEPT_MOST = 15, 64
"""Ids of the half of the kept sets that hold more than one, so that the mean of all is 8."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    shape: str
    sequences: int
    length: int
    prompt: int
    pack: int
    minibatches: int = 1
    published: str = ""


ROWS = {
    "qwen3-16k": Row("qwen3-0.6b", 4, 16384, 1024, 16384, published="prime-rl 16.5k tok/s, 12.5 GiB"),
    "qwen3-64k": Row("qwen3-0.6b", 2, 65536, 1024, 65536, published="prime-rl 10.2k tok/s, 19.6 GiB"),
    "dsa": Row("dsa-1.6b", 32, 5632, 2560, 22528, minibatches=2),
    "tiny-qwen3": Row("tiny-qwen3", 4, 160, 32, 320),
    "tiny-dsa": Row("tiny-dsa", 4, 160, 32, 320, minibatches=2),
}


def segment(name: str, row: Row, config: dict[str, Any], rng: np.random.Generator) -> Any:
    """A recording of random tokens: half of the kept sets are singletons, and each token's experts are drawn evenly.

    The sampler's log-probabilities are 0, so that no ratio is above 1, whatever the weights.
    """
    from trimtab.rollout.types import Segment

    S, vocab = row.length - row.prompt, config["vocab_size"]
    ids = rng.integers(3, vocab, row.length).astype(np.int32)
    more = np.minimum(1 + rng.geometric(1 / (KEPT_MEAN - 1), S), KEPT_MOST)
    counts = np.where(rng.random(S) < 0.5, 1, more)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    kept = (np.repeat(ids[row.prompt :].astype(np.int64), counts) + 7919 * place) % vocab
    layers = config["num_hidden_layers"] - config["first_k_dense_replace"] if "index_topk" in config else 0
    routes = np.zeros((row.length - 1, 0, 0), np.uint8)
    if layers:
        score = rng.random((row.length - 1, layers, config["n_routed_experts"]), np.float32)
        routes = score.argpartition(config["num_experts_per_tok"])[..., : config["num_experts_per_tok"]]
    return Segment(
        name=name,
        token_ids=ids,
        sampled=np.arange(row.length) >= row.prompt,
        logp=np.zeros(S, np.float32),
        kept_ids=kept.astype(np.int32),
        kept_offsets=offsets,
        routes=routes.astype(np.uint8),
        weight_version=np.zeros(S, np.int32),
    )


def work(job: dict[str, Any]) -> None:
    """Print a line of seconds and GiB for each batch."""
    import torch
    from accelerate import Accelerator

    from trimtab.grpo.batch import Trajectory
    from trimtab.grpo.config import Config, Domain, LossSettings
    from trimtab.grpo.policy.policy import load_policy
    from trimtab.grpo.trainer import Trainer

    gpu, row, folder = torch.cuda.is_available(), Row(**job["row"]), Path(job["folder"])
    loss = LossSettings(beta=0.001, delta=None)
    config = Config(
        domains={"any": Domain(task="x:y", loss=loss)},
        model=str(folder),
        tokens_per_microbatch=row.pack,
        minibatches=row.minibatches,
        checkpoint_activations=job["recompute"],
        precision="bf16" if gpu else "fp32",
        lr=1e-6,
    )
    policy = load_policy(folder, checkpointing=job["recompute"])
    frozen = load_policy(folder).requires_grad_(False)
    trainer = Trainer(config, policy, frozen, Accelerator(cpu=not gpu))
    rng = np.random.default_rng(0)
    shape = Cost.of(folder).config
    batch = [
        Trajectory(
            name=str(i),
            domain="any",
            segments=(segment(str(i), row, shape, rng),),
            advantage=(-1.0) ** i,
            settings=loss,
        )
        for i in range(row.sequences)
    ]
    for step in range(job["batches"] + 1):
        started = time.perf_counter()
        trainer.train_on(batch, step)
        if gpu:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
        print(json.dumps({"seconds": time.perf_counter() - started, "gib": peak}), flush=True)


def run(row: Row, batches: int, *, recompute: bool) -> tuple[list[dict[str, float]], str]:
    """The batches of a process of its own, and why there are not enough."""
    job = {"row": asdict(row), "folder": str(checkpoint(row.shape)), "batches": batches, "recompute": recompute}
    log = Path("runs") / "training.log"
    with log.open("a") as errors:
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(os.environ))
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if len(found) > 1:
        return found[1:], ""
    words = [line.strip() for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    return [], f"code {done.returncode}: {(words or ['no words'])[-1][:200]} (see {log})"


def line(row: Row, found: list[dict[str, float]], hardware: Card) -> str:
    cost, tokens = Cost.of(checkpoint(row.shape)), row.sequences * row.length
    flops = row.sequences * cost.update_flops(row.length, 8 * (row.length - row.prompt))
    seconds = median(one["seconds"] for one in found)
    floor = flops / hardware.flops + row.minibatches * 28 * cost.parameters / hardware.bandwidth
    return (
        f"| {row.shape:12} | {row.sequences:3} x {row.length:6} | {seconds:7.2f} | {tokens / seconds:8.0f} |"
        f" {flops / seconds / hardware.flops:5.1%} | {max(one['gib'] for one in found):5.1f} | {floor:7.2f} |"
        f" {row.published}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="rows to measure")
    parser.add_argument("--no-recompute", action="store_true", help="keep activations in place of recomputing them")
    parser.add_argument("--batches", type=int, default=3, help="batches measured, after one")
    parser.add_argument("--quick", action="store_true", help="one batch, of a quarter of the DSA policy's trajectories")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(json.loads(options.job))
        return
    hardware = card()
    kept = "activations kept" if options.no_recompute else "activations recomputed"
    print(f"{hardware.name}, {kept}\n")
    print("| shape        | sequences    | batch s |    tok/s |   MFU |   GiB | floor s | published")
    print("| ------------ | ------------ | ------- | -------- | ----- | ----- | ------- | ---------")
    names = options.rows or [name for name in ROWS if name.startswith("tiny") == options.tiny]
    for name in names:
        row = ROWS[name]
        if options.quick and row.sequences == 32:
            row = Row(**asdict(row) | {"sequences": 8})
        found, why = run(row, 1 if options.quick else options.batches, recompute=not options.no_recompute)
        print(line(row, found, hardware) if found else f"| {name:12} | failed: {why}", flush=True)


if __name__ == "__main__":
    main()
