"""What the kernel benchmarks share: sizes and inputs, timing on a GPU, the machine's ceilings, the table."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = "cuda"
S, K = 4096, 2048
"""Queries, and keys that each selects."""
H, NOPE, ROPE, VALUE, LATENT = 128, 128, 64, 128, 512
INDEX_H, INDEX_D = 64, 128
SETS = 3
"""Input sets that a timing goes through in turn."""

COLUMNS = ("kernel", "sizes", "ms", "rate", "floor ms", "of floor", "extra GiB", "error", "note")
WIDTHS = (34, 30, 9, 13, 9, 8, 9, 8, 4)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine does at best, measured: FLOP/s of a matrix product by type, bytes/s of a copy."""

    flops: dict[str, float]
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. flops and bytes are the least that the result needs, not what a kernel happens to do."""

    part: str
    kernel: str
    sizes: dict[str, int]
    ms: float
    flops: float
    bytes: float
    dtype: str = "bf16"
    extra_gib: float | None = None
    """Peak memory above the inputs."""
    error: float | None = None
    note: str = ""


class Table:
    """Rows, printed and written to a file as they come, and what could not be measured."""

    def __init__(self, ceilings: Ceilings, path: Path) -> None:
        self.ceilings = ceilings
        self.path = path
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.lines: list[str] = []

    def part(self, title: str) -> None:
        print(f"\n## {title}\n")
        print(_line(COLUMNS))
        print(_line(tuple("-" * width for width in WIDTHS)), flush=True)

    def floor_ms(self, row: Row) -> float:
        """The larger of arithmetic at the matrix rate and traffic at the copy bandwidth."""
        return 1e3 * max(row.flops / self.ceilings.flops[row.dtype], row.bytes / self.ceilings.bandwidth)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        floor = self.floor_ms(row)
        computes = row.flops / self.ceilings.flops[row.dtype] >= row.bytes / self.ceilings.bandwidth
        rate = f"{row.flops / row.ms / 1e9:.0f} TFLOP/s" if computes else f"{row.bytes / row.ms / 1e6:.0f} GB/s"
        sizes = " ".join(f"{name} {short(size)}" for name, size in row.sizes.items())
        extra = "" if row.extra_gib is None else f"{row.extra_gib:.2f}"
        error = "" if row.error is None else f"{row.error:.1e}"
        cells = (row.kernel, sizes, f"{row.ms:.3f}", rate, f"{floor:.3f}", f"{floor / row.ms:.0%}", extra, error)
        print(_line((*cells, row.note)), flush=True)
        self.save()

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(f"\n{line}", flush=True)
        self.save()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A row of ours: if it cannot be measured the others still are, and the command fails at its end."""
        try:
            yield
        except Exception as error:  # any: a kernel that is absent, does not compile, or wants too much memory
            self.failures.append(f"{what}: {_reason(error)}")
            print(f"FAILED {self.failures[-1]}", flush=True)
        torch.cuda.empty_cache()

    @contextmanager
    def rival(self, what: str) -> Iterator[None]:
        """A row of somebody else's: it may be absent, or not run here."""
        try:
            yield
        except Exception as error:  # other people's code, compiled on the spot
            self.say(f"not measured: {what}: {_reason(error)}")
        torch.cuda.empty_cache()

    def save(self) -> None:
        rows = [asdict(row) | {"floor_ms": self.floor_ms(row)} for row in self.rows]
        found = {"ceilings": asdict(self.ceilings), "rows": rows, "lines": self.lines, "failures": self.failures}
        self.path.write_text(json.dumps(found, indent=1))


def short(size: int) -> str:
    return f"{size // 1024}K" if size >= 4096 and size % 1024 == 0 else str(size)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=True)) + " |"


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:240]}"


def time_ms(*calls: Callable[[], object], budget_ms: float = 60.0) -> float:
    """Median time of a call on the GPU. Calls on different inputs take turns; before each the L2 is overwritten."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)
    times: list[float] = []
    for call in calls:
        call()
    while len(times) < 3 or sum(times) < budget_ms:
        pairs = []
        for call in calls:
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) for start, end in pairs]
    return median(times)


def peak_gib(call: Callable[[], object]) -> tuple[float, float]:
    """GiB that a call takes at its peak: above what was there before, and of that, above its results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del results
    return (peak - before) / 2**30, (peak - after) / 2**30


def relative_error(result: Tensor, expected: Tensor) -> float:
    result, expected = result.detach().float(), expected.detach().float()
    same = (result == expected) & expected.isinf()
    result, expected = result.masked_fill(same, 0.0), expected.masked_fill(same, 0.0)
    return ((result - expected).norm() / expected.norm()).item()


def measure_ceilings(n: int = 8192, copied_bytes: int = 1 << 31) -> Ceilings:
    """Rates of matrix products of random numbers, and of a copy, read and write counted."""
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    flops = {"bf16": 2e3 * n**3 / time_ms(lambda: a @ b)}
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)

    def product() -> Tensor:
        return torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    flops["fp8"] = 2e3 * n**3 / time_ms(product)
    source = torch.empty(copied_bytes, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return Ceilings(flops, 2e3 * copied_bytes / time_ms(lambda: target.copy_(source)))


def sdpa(q_HND: Tensor, k_HMD: Tensor, v_HMV: Tensor, *, causal: bool, backend: SDPBackend) -> Tensor:
    """torch's attention; its flash form wants values as wide as keys, so they get columns of zeros."""
    padding = k_HMD.shape[-1] - v_HMV.shape[-1] if backend == SDPBackend.FLASH_ATTENTION else 0
    with sdpa_kernel(backend):
        v_HMV = F.pad(v_HMV, (0, padding))
        out = F.scaled_dot_product_attention(q_HND[None], k_HMD[None], v_HMV[None], is_causal=causal)[0]
    return out[..., : out.shape[-1] - padding]


def fastest_sdpa(q_HND: Tensor, k_HMD: Tensor, v_HMV: Tensor) -> SDPBackend:
    """The backend of torch that is fastest forward and backward at these sizes, of those that take them."""
    times: dict[SDPBackend, float] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        leaves = [x.detach().requires_grad_() for x in (q_HND, k_HMD, v_HMV)]

        def step(backend: SDPBackend = backend, leaves: list[Tensor] = leaves) -> None:
            out = sdpa(*leaves, causal=True, backend=backend)
            torch.autograd.grad(out, leaves, out.detach())

        try:
            times[backend] = time_ms(step)
        except RuntimeError:  # no kernel for these widths
            continue
    return min(times, key=lambda backend: times[backend])


@contextmanager
def stopwatch(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"\n({what}: {time.perf_counter() - started:.0f} s)", flush=True)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def random_ids(N: int, M: int, *, causal: bool = False) -> Tensor:
    """K keys for each query, drawn from all M or from those up to its own position; ascending, padded with -1."""
    ids_NK = torch.full((N, K), M, dtype=torch.int32, device=DEVICE)
    for n in range(0, N, 512):
        score = torch.rand(min(512, N - n), M, device=DEVICE)
        if causal:
            score.tril_(n)
        drawn = score.topk(min(K, M), sorted=False)
        ids_NK[n : n + 512, : drawn.indices.shape[1]] = torch.where(drawn.values > 0, drawn.indices, M).int()
    ids_NK = ids_NK.sort(-1).values
    return ids_NK.masked_fill_(ids_NK == M, -1)


def causal_range(N: int) -> tuple[Tensor, Tensor]:
    end_N = torch.arange(1, N + 1, dtype=torch.int32, device=DEVICE)
    return torch.zeros_like(end_N), end_N
