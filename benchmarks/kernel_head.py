"""The LM head over kept ids beside the head over the whole vocabulary."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from kernel_common import DEVICE, Row, Table, normal, peak_gib, short, time_ms
from torch import Tensor

HEAD_ROWS, D_MODEL, VOCABULARY = 32 << 10, 7168, 129280


def kept_sets(rows: int) -> tuple[Tensor, Tensor]:
    """Kept ids of many positions (CSR) with the published sizes: 48% singletons, mean 8, 99th percentile 82.

    Sizes above one are 2 plus a lognormal number. A position's ids are spread over the vocabulary by a stride that has
    no factor in common with it: they are distinct, and suit caches least.
    """
    size = 2 + torch.randn(rows, device=DEVICE).mul_(1.317).add_(1.69).exp_().round_().long()
    size = torch.where(torch.rand(rows, device=DEVICE) < 0.48, 1, size).clamp_(max=min(4096, VOCABULARY))
    offset = F.pad(size.cumsum(0), (1, 0))
    row = torch.repeat_interleave(torch.arange(rows, device=DEVICE), size)
    place = torch.arange(len(row), device=DEVICE) - offset[row]
    first = torch.randint(VOCABULARY, (rows,), device=DEVICE)
    return (first[row] + 7919 * place) % VOCABULARY, offset


def head(table: Table) -> None:
    N, d, V = HEAD_ROWS, D_MODEL, VOCABULARY
    kept, offset = kept_sets(N)
    size = offset.diff()
    p99 = size.float().quantile(0.99).item()
    table.say(
        f"kept ids: {(size == 1).float().mean().item():.0%} singletons, mean {size.float().mean().item():.1f}, "
        f"99th percentile {p99:.0f}"
    )
    table.part(f"LM head, forward and backward, N = {short(N)}, d = {d}, V = {V}")
    hidden, weight = normal(N, d).requires_grad_(), normal(V, d).mul_(d**-0.5).requires_grad_()
    token, grad = kept[offset[:-1]], torch.randn(N, device=DEVICE)
    alone = int((size == 1).sum())
    touched = len(kept[torch.repeat_interleave(size > 1, size)].unique()) + N - alone
    outputs = N * d + V * d
    found: dict[str, tuple[float, float]] = {}
    with table.attempt("kept-set head"):
        from trimtab.kernels.lm_head import kept_logp

        found["kept"] = head_step(
            table,
            "kept-set head",
            lambda: kept_logp(hidden, weight, token, kept, offset, 1.0),
            (hidden, weight, grad),
            3 * 2.0 * (len(kept) - alone) * d,
            2.0 * d * 2 * touched + 2.0 * outputs,
        )
    with table.attempt("full head"):
        from trimtab.kernels.lm_head import full_logp

        found["full"] = head_step(
            table,
            "full head, in chunks",
            lambda: full_logp(hidden, weight, token, 1.0),
            (hidden, weight, grad),
            4 * 2.0 * N * d * V,
            4.0 * outputs,
        )
    if len(found) == 2:
        (kept_ms, kept_gib), (full_ms, full_gib) = found["kept"], found["full"]
        table.say(
            f"kept-set head: {full_ms / kept_ms:.0f} times faster than the full head, and "
            f"{full_gib / max(kept_gib, 2**-30):.0f} times less memory beside the gradients"
        )


def head_step(
    table: Table,
    kernel: str,
    call: Callable[[], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    flops: float,
    traffic: float,
) -> tuple[float, float]:
    """Milliseconds, and GiB above inputs and gradients."""
    hidden, weight, grad = tensors

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), (hidden, weight), grad)

    step()
    extra, above_results = peak_gib(step)
    ms = time_ms(step, budget_ms=200.0)
    note = f"{above_results:.3f} GiB of it beside gradients"
    table.add(Row("head", kernel, {"N": len(hidden)}, ms, flops, traffic, extra_gib=extra, note=note))
    return ms, above_results
