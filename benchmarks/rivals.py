"""A batch of trimtab beside a batch of TRL with vLLM in its process: the same prompts, sampling, tokens and steps.

    python benchmarks/rivals.py smollm2                  32 prompts x 8, 128 tokens, random weights
    python benchmarks/rivals.py smollm2 --model FOLDER   the real weights: answers end where they end
    python benchmarks/rivals.py qwen3-0.6b               16 prompts x 8, 512 tokens; also qwen3-1.7b
    python benchmarks/rivals.py smollm2 --only trimtab   one side; --quick: fewer batches; --rounds 2: sides take turns

Each side is a process of its own, one after the other, on the same card; the figures are medians over the batches after
the warm-up. Both keep fp32 master weights and compute in bf16; the rival trl-bf16 keeps its weights in bf16, and
trl-liger, where liger-kernel is installed, has fused layers. Update: everything but playing the batch and handing over
weights, so passes of reference and old policy are in it. GiB: the most that the card held, over what it held before.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from shapes import Card, Cost, card, checkpoint, used_gib

HERE = Path(__file__).resolve().parent
START_LIMIT_S = 300.0
TRIMTAB = "import sys; from trimtab.grpo.commands.cli import main; sys.exit(main())"
PARTS = {
    "generation": ("rollout", "rewards"),
    "weights": ("weights", "wake_and_sleep"),
    "update": ("packing", "reference", "forward_and_backward", "optimiser"),
}
"""Which phases of metrics.jsonl make up a part."""


@dataclass(frozen=True, slots=True)
class Size:
    """One comparison. micro: the sequences that TRL takes at a time, the most that fit a card of 80 GiB."""

    shape: str
    prompts: int
    tokens: int
    pack: int
    micro: int
    group: int = 8
    prompt_len: int = 128
    model: Path | None = None

    @property
    def episodes(self) -> int:
        return self.prompts * self.group

    @property
    def max_len(self) -> int:
        return self.prompt_len + self.tokens

    @property
    def folder(self) -> Path:
        return self.model or checkpoint(self.shape)

    @property
    def cache_gib(self) -> float:
        """Cache for all sequences at once, and a quarter on top: both sides get it."""
        return 1.25 * Cost.of(self.folder).cached_bytes(self.episodes * self.max_len) / 2**30


SIZES = {
    "smollm2": Size("smollm2-135m", prompts=32, tokens=128, pack=32768, micro=128),
    "qwen3-0.6b": Size("qwen3-0.6b", prompts=16, tokens=512, pack=16384, micro=16),
    "qwen3-1.7b": Size("qwen3-1.7b", prompts=16, tokens=512, pack=8192, micro=4),
    "tiny": Size("tiny-llama", prompts=2, tokens=8, pack=4096, micro=4, group=4),
}


@dataclass(slots=True)
class Found:
    """What one side's batches took, in order."""

    rows: list[dict[str, float]]
    gib: float = 0.0
    failed: str = ""


class Watch:
    """The most memory that the card held while this was open, over what it held before."""

    def __enter__(self) -> "Watch":
        self.before = self.peak = used_gib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            self.peak = max(self.peak, used_gib())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def gib(self) -> float:
        return self.peak - self.before


def environment() -> dict[str, str]:
    return {**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0"}


def trimtab(size: Size, batches: int, log: Path) -> Iterator[dict[str, float]]:
    """A `trimtab train` that is stopped after enough batches, by the two interrupts that keep it from saving."""
    folder = Path(tempfile.mkdtemp()) / "run"
    options = {
        "out": folder,
        "model": size.folder,
        "domains.sums.prompts": size.prompts,
        "group-size": size.group,
        "sampling.max-tokens": size.tokens,
        "rollout.max-len": size.max_len,
        "rollout.kv-cache-mib": max(64, int(1024 * size.cache_gib)),
        "tokens-per-microbatch": size.pack,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-c", TRIMTAB, "train", f"{HERE / 'rivals_task.py'}:recipe", *words]
    process = subprocess.Popen(command, stdout=log.open("a"), stderr=subprocess.STDOUT, env=environment())
    try:
        seen, waited = 0, time.monotonic()
        while seen < batches:
            file = folder / "metrics.jsonl"
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            for line in (line for line in lines[seen:batches] if line.endswith("\n")):
                seen, waited = seen + 1, time.monotonic()
                yield _row(json.loads(line))
            if seen < batches and process.poll() is not None:
                raise RuntimeError(f"ended with code {process.returncode}: {_last_words(log)}")
            if time.monotonic() - waited > START_LIMIT_S:
                raise RuntimeError(f"no batch in {START_LIMIT_S:.0f} s: {_last_words(log)}")
            time.sleep(0.2)
    finally:
        _stop(process)


def _row(metrics: dict[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as a row: the phases that make up each part."""
    parts = {part: sum(metrics.get(f"seconds/{name}", 0.0) for name in names) for part, names in PARTS.items()}
    return {"batch": metrics["seconds"], "tokens": metrics["sampled_tokens"], **parts}


def trl(size: Size, batches: int, log: Path, *, dtype: str = "float32", liger: bool = False) -> Iterator[dict]:
    """TRL in a process; it has half as many sequences at a time, and at last recomputes, where memory did not reach."""
    weights_gib = 2 * Cost.of(size.folder).parameters / 2**30
    share = min(0.6, (weights_gib + size.cache_gib + 5) / card().gib)
    settings = {
        "model": str(size.folder),
        "real": size.model is not None,
        "prompts": size.prompts,
        "group": size.group,
        "tokens": size.tokens,
        "max_len": size.max_len,
        "batches": batches,
        "micro": size.micro,
        "vllm_share": round(share, 3),
        "checkpointing": False,
        "dtype": dtype,
        "liger": liger,
    }
    for attempt in ({}, {"micro": size.micro // 2}, {"checkpointing": True}):
        command = [sys.executable, str(HERE / "rivals_trl.py"), json.dumps(settings | attempt)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("a"), env=environment(), text=True)
        limit = threading.Timer(2 * START_LIMIT_S, process.kill)
        limit.start()
        try:
            assert process.stdout
            for line in process.stdout:
                if line.startswith('{"batch"'):
                    yield json.loads(line)
            if process.wait() == 0:
                return
        finally:
            limit.cancel()
            _stop(process)
        words = _last_words(log)
        if "OutOfMemory" not in words and "out of memory" not in words:
            raise RuntimeError(f"ended with code {process.returncode}: {words}")
        print(f"  TRL did not fit with {attempt or size.micro}; again", flush=True)
    raise RuntimeError("did not fit the card")


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-80:] if "Error" in line or line.startswith("trimtab:")]
    return (errors or lines or ["nothing was said"])[-1][:300]


def _stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for _ in range(2):  # the second stops trimtab at once, without saving
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in family:
            if child.is_running():
                child.kill()
    process.wait()


SIDES = {
    "trimtab": trimtab,
    "trl": trl,
    "trl-bf16": lambda *arguments: trl(*arguments, dtype="bfloat16"),
    "trl-liger": lambda *arguments: trl(*arguments, liger=True),
}


def measure(side: str, size: Size, batches: int, found: Found) -> None:
    """Run one side and add its batches; what goes wrong is kept for the table."""
    log = Path("runs") / f"rivals-{side}.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    started = time.perf_counter()
    with Watch() as watch:
        try:
            for i, row in enumerate(SIDES[side](size, batches, log)):
                if i == 0:
                    print(f"  {side}: first batch after {time.perf_counter() - started:.0f} s", flush=True)
                print("  " + side + ": " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)
                row["index"] = i
                found.rows.append(row)
        except Exception as error:  # a rival is other people's code, and the rest goes on
            found.failed = f"{type(error).__name__}: {error}"
            print(f"  {side} failed: {found.failed} (see {log})", flush=True)
    found.gib = max(found.gib, watch.gib)


def table(found: dict[str, Found], size: Size, hardware: Card, warmup: int) -> list[str]:
    """Medians by side, each as a multiple of the fastest TRL, and the floor."""
    keys = ("batch", "generation", "weights", "update")
    middle = {
        side: {key: median(row[key] for row in one.rows if row["index"] >= warmup) for key in (*keys, "tokens")}
        for side, one in found.items()
        if any(row["index"] >= warmup for row in one.rows)
    }
    rivals = [row for side, row in middle.items() if side.startswith("trl")]
    best = {key: min((row[key] for row in rivals), default=float("nan")) for key in keys}
    lines = [
        f"| {'':9} | batch s | x TRL | generation s | x TRL | weights s | update s | x TRL |   GiB |  tokens |",
        "| --------- | ------- | ----- | ------------ | ----- | --------- | -------- | ----- | ----- | ------- |",
    ]
    for side, row in middle.items():
        times = {key: row[key] / best[key] if best[key] else float("nan") for key in keys}
        lines.append(
            f"| {side:9} | {row['batch']:7.3f} | {times['batch']:5.2f} | {row['generation']:12.3f} |"
            f" {times['generation']:5.2f} | {row['weights']:9.3f} | {row['update']:8.3f} | {times['update']:5.2f} |"
            f" {found[side].gib:5.1f} | {row['tokens']:7.0f} |"
        )
    generation, update = floors(size, hardware)
    lines.append(
        f"| {'floor':9} | {generation + update:7.3f} |       | {generation:12.3f} |       |           | {update:8.3f} |"
        "       |       |         |"
    )
    lines += [f"{side} failed: {one.failed}" for side, one in found.items() if one.failed]
    return lines


def floors(size: Size, hardware: Card) -> tuple[float, float]:
    """Seconds of a batch at the least: decoding by the bytes it reads, the update by its arithmetic."""
    cost = Cost.of(size.folder)
    prompt = size.prompt_len // 2
    mean = prompt + size.tokens // 2
    generation = size.tokens * cost.decode_bytes([mean] * size.episodes) / hardware.bandwidth
    update = size.episodes * cost.update_flops(prompt + size.tokens, 9 * size.tokens) / hardware.flops
    return generation, update


def unequal(found: dict[str, Found], size: Size) -> list[str]:
    """Sides whose batches are not all of the tokens asked for: random weights never end a turn."""
    wanted = size.episodes * size.tokens
    return [side for side, one in found.items() if any(row["tokens"] != wanted for row in one.rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--model", type=Path, help="a checkpoint folder in place of random weights")
    parser.add_argument("--only", nargs="*", choices=SIDES, help="sides to run")
    parser.add_argument("--batches", type=int, default=10, help="batches measured")
    parser.add_argument("--warmup", type=int, default=3, help="batches before them")
    parser.add_argument("--rounds", type=int, default=1, help="times that the sides take turns")
    parser.add_argument("--quick", action="store_true", help="4 batches after 2")
    options = parser.parse_args()
    size = replace(SIZES[options.size], model=options.model.resolve() if options.model else None)
    batches, warmup = (4, 2) if options.quick else (options.batches, options.warmup)
    sides = options.only or ["trimtab", "trl", *(["trl-liger"] if importlib.util.find_spec("liger_kernel") else [])]
    hardware = card()
    print(f"{hardware.name} · {size.folder.name}, {size.prompts} prompts x {size.group}, {size.tokens} tokens\n")
    found = {side: Found([]) for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            measure(side, size, batches + warmup, found[side])
    lines = table(found, size, hardware, warmup)
    print("\n" + "\n".join(lines))
    if size.model is None and (wrong := unequal(found, size)):
        print(f"the work was not equal: {', '.join(wrong)} sampled other than {size.episodes * size.tokens} tokens")
        return 1
    return int(any(one.failed for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
