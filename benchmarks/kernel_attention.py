"""Sparse MLA attention forward and backward, dense attention beside it, and where the sparse form becomes faster."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import kernel_rivals as rivals
import torch
from kernel_common import (
    DEVICE,
    LATENT,
    NOPE,
    ROPE,
    SETS,
    VALUE,
    H,
    K,
    Row,
    S,
    Table,
    causal_range,
    fastest_sdpa,
    normal,
    peak_gib,
    random_ids,
    relative_error,
    sdpa,
    time_ms,
)
from torch import Tensor
from torch.nn.attention import SDPBackend

from trimtab.kernels import reference

LENGTHS = tuple(n << 10 for n in (4, 8, 16, 32, 64, 128))
FORWARD = [(128, M) for M in LENGTHS] + [(64, n << 10) for n in (8, 32, 128)] + [(16, 32 << 10)]
BACKWARD = [(128, M) for M in LENGTHS] + [(64, 8 << 10), (64, 32 << 10), (16, 8 << 10), (16, 32 << 10)]
WHOLE = tuple(n << 10 for n in (4, 8, 16))
"""Lengths of whole sequences, for the crossover of masked and absorbed attention."""


def reference_rows(
    q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, grad_NHV: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """O and dq of a few queries in float64."""
    q = q_NHC.detach().double().requires_grad_()
    with torch.enable_grad():
        out, _ = reference.sparse_mla(q, kv_MC.detach().double(), ids_NK.long(), LATENT, scale)
    (dq,) = torch.autograd.grad(out, q, grad_NHV.double())
    return out.detach(), dq


def sparse(table: Table) -> None:
    forwards: dict[str, rivals.Forward] = {}
    with table.rival("FlashMLA"):
        forwards["FlashMLA forward"] = rivals.flashmla()
    table.part(f"Sparse MLA forward, {S} queries, {K} of S_kv keys each")
    for heads, M in FORWARD:
        sparse_forward(table, forwards, heads, M)
    table.part("Sparse MLA backward, deterministic")
    for heads, M in BACKWARD:
        with table.attempt(f"sparse backward, H = {heads}, S_kv = {M}"):
            sparse_backward(table, heads, M)
    table.part("Dense attention, the same queries at the end of S_kv tokens, 192/128 wide (torch)")
    with table.attempt("dense attention"):
        backend = fastest_sdpa(normal(H, S, NOPE + ROPE), normal(H, S, NOPE + ROPE), normal(H, S, VALUE))
        for M in LENGTHS:
            dense_forward(table, M, backend)


def tilelang_attention(table: Table, folder: Path) -> None:
    table.part(f"TileLang's sparse MLA, {S} queries, {K} of S_kv keys each")
    for heads in (128, 64, 16):
        with table.rival(f"TileLang backward, H = {heads}"):
            tilelang_backward(table, rivals.tilelang_backward(folder), heads, M=32 << 10)
    with table.rival("TileLang forward"):
        sparse_forward(table, {"TileLang forward": rivals.tilelang_forward(folder)}, 128, 32 << 10)


def sparse_forward(table: Table, forwards: dict[str, rivals.Forward], heads: int, M: int) -> None:
    C, scale = LATENT + ROPE, (LATENT + ROPE) ** -0.5
    sizes = {"H": heads, "S_kv": M}
    inputs = [(normal(S, heads, C), normal(M, C), random_ids(S, M)) for _ in range(SETS)]
    flops = 2.0 * S * K * heads * (C + LATENT)
    traffic = 2.0 * (S * heads * (C + LATENT) + M * C) + 4.0 * S * (K + heads)
    ours: Tensor | None = None
    with table.attempt(f"sparse forward, H = {heads}, S_kv = {M}"), torch.no_grad():
        from trimtab.kernels.sparse_mla import sparse_mla

        ours = sparse_mla(*inputs[0], LATENT, scale)[0]
        some = torch.arange(0, S, max(1, S // 8), device=DEVICE)
        q, kv, ids = inputs[0]
        expected, _ = reference_rows(q[some], kv, ids[some], ours[some], scale)
        ms = time_ms(*(lambda x=x: sparse_mla(*x, LATENT, scale) for x in inputs))
        error = relative_error(ours[some], expected)
        table.add(Row("sparse", "sparse forward", sizes, ms, flops, traffic, error=error))
    for name, forward in forwards.items():
        with table.rival(f"{name}, H = {heads}, S_kv = {M}"), torch.no_grad():
            theirs = forward(*inputs[0], scale)
            apart = None if ours is None else relative_error(theirs, ours)
            ms = time_ms(*(lambda x=x, forward=forward: forward(*x, scale) for x in inputs))
            note = "padded to 64 heads" if heads % 64 else ""
            table.add(Row("sparse", name, sizes, ms, flops, traffic, error=apart, note=note))


def dense_forward(table: Table, M: int, backend: SDPBackend) -> None:
    """All keys before the last S, then the causal square of these: what causal attention of S queries computes."""
    q, k, v = normal(H, S, NOPE + ROPE), normal(H, M, NOPE + ROPE), normal(H, M, VALUE)
    before = M - S

    def forward() -> None:
        if before:
            sdpa(q, k[:, :before], v[:, :before], causal=False, backend=backend)
        sdpa(q, k[:, before:], v[:, before:], causal=True, backend=backend)

    flops = 2.0 * H * (NOPE + ROPE + VALUE) * (S * before + S * (S + 1) / 2)
    traffic = 2.0 * H * (S + M) * (NOPE + ROPE + VALUE)
    with torch.no_grad():
        ms = time_ms(forward)
    table.add(Row("sparse", "dense forward", {"H": H, "S_kv": M}, ms, flops, traffic, note=name_of(backend)))


def name_of(backend: SDPBackend) -> str:
    return backend.name.removesuffix("_ATTENTION").lower()


def sparse_backward(table: Table, heads: int, M: int) -> None:
    from trimtab.kernels.sparse_mla import sparse_mla

    C, scale = LATENT + ROPE, (LATENT + ROPE) ** -0.5
    sets = []
    for _ in range(2):
        leaves, ids = (normal(S, heads, C).requires_grad_(), normal(M, C).requires_grad_()), random_ids(S, M)
        out = sparse_mla(*leaves, ids, LATENT, scale)[0]
        sets.append((out, leaves, normal(S, heads, LATENT), ids))

    def backward(out: Tensor, leaves: tuple[Tensor, Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    ms = time_ms(*(lambda x=x: backward(*x[:3]) for x in sets))
    out, (q, kv), grad, ids = sets[0]
    once, again = backward(out, (q, kv), grad), backward(out, (q, kv), grad)
    same = all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    some = torch.arange(0, S, max(1, S // 8), device=DEVICE)
    _, expected = reference_rows(q[some], kv, ids[some], grad[some], scale)
    extra, _ = peak_gib(lambda: backward(out, (q, kv), grad))
    flops = 2.0 * S * K * heads * (3 * C + 2 * LATENT)
    traffic = 4.0 * (S * heads * (C + LATENT) + M * C) + 4.0 * S * (K + heads)
    note = "two runs equal to the bit" if same else "TWO RUNS DIFFER"
    error = relative_error(once[0][some], expected)
    row = Row("sparse", "sparse backward", {"H": heads, "S_kv": M}, ms, flops, traffic, "bf16", extra, error, note)
    table.add(row)


def tilelang_backward(table: Table, theirs: Callable[..., tuple[Tensor, Tensor]], heads: int, M: int) -> None:
    from trimtab.kernels.sparse_mla import sparse_mla

    C, scale = LATENT + ROPE, (LATENT + ROPE) ** -0.5
    q, kv = normal(S, heads, C).requires_grad_(), normal(M, C).requires_grad_()
    ids, grad = random_ids(S, M), normal(S, heads, LATENT)
    earlier = ids.masked_fill(ids > torch.arange(S, device=DEVICE)[:, None], -1)
    out, lse = sparse_mla(q, kv, earlier, LATENT, scale)
    dq, dkv = torch.autograd.grad(out, (q, kv), grad)
    # an empty row has lse -inf, of which their exponential would be NaN
    inputs = (q.detach(), kv.detach(), out.detach(), grad, ids, lse.masked_fill(lse == -math.inf, 1e30), scale)
    their_dq, their_dkv = theirs(*inputs)
    ms = time_ms(lambda: theirs(*inputs))
    error = max(relative_error(their_dq, dq), relative_error(their_dkv, dkv))
    flops = 2.0 * S * K * heads * (3 * C + 2 * LATENT)
    traffic = 4.0 * (S * heads * (C + LATENT) + M * C) + 4.0 * S * (K + heads)
    sizes = {"H": heads, "S_kv": M}
    table.add(Row("sparse", "TileLang backward", sizes, ms, flops, traffic, error=error, note="atomic additions"))


def crossover(table: Table) -> None:
    """Masked multi-head against absorbed sparse attention over whole sequences, and where the second is faster."""
    table.part(f"Attention over a whole sequence of N tokens, H = {H}, {K} selected keys")
    masked: dict[int, float] = {}
    absorbed: dict[int, float] = {}
    for N in WHOLE:
        ids = random_ids(N, N, causal=True)
        with table.attempt(f"masked_mha, N = {N}"):
            masked[N] = masked_whole(table, ids)
        with table.attempt(f"sparse_mla, N = {N}"):
            absorbed[N] = absorbed_whole(table, ids)
    table.say(crossing(masked, absorbed))


def masked_whole(table: Table, ids: Tensor) -> float:
    """Rows of masked_mha with and without a selection, and of torch's attention; the time with a selection."""
    from trimtab.kernels.masked_mha import masked_mha

    N, D = len(ids), NOPE + ROPE
    pairs, visible = N * (N + 1.0), causal_range(N)
    work = {"N": N}, pairs * H * (D + VALUE), pairs * H * (3 * D + 2 * VALUE), 4.0 * N * H * (D + VALUE)
    leaves = [normal(N, H, width).requires_grad_() for width in (D, D, VALUE)]

    def causal() -> Tensor:
        return masked_mha(*leaves, None, *visible, D**-0.5)[0]

    both(table, "masked MHA, causal", causal, leaves, *work)
    ms = both(table, "masked MHA, selected", lambda: masked_mha(*leaves, ids, *visible, D**-0.5)[0], leaves, *work)
    with table.rival(f"torch's attention, N = {N}"):
        heads = [x.detach().transpose(0, 1).contiguous().requires_grad_() for x in leaves]
        backend = fastest_sdpa(*heads)
        with torch.no_grad():
            apart = relative_error(sdpa(*heads, causal=True, backend=backend).transpose(0, 1), causal())
        note = f"{name_of(backend)}, {apart:.1e} from ours"
        both(table, "torch, causal", lambda: sdpa(*heads, causal=True, backend=backend), heads, *work, note=note)
    return ms


def absorbed_whole(table: Table, ids: Tensor) -> float:
    from trimtab.kernels.sparse_mla import sparse_mla

    N, C = len(ids), LATENT + ROPE
    pairs = 2.0 * min(K, N) * (N - min(K, N) / 2)
    work = {"N": N}, pairs * H * (C + LATENT), pairs * H * (3 * C + 2 * LATENT), 2.0 * N * H * (C + LATENT)
    leaves = [normal(N, H, C).requires_grad_(), normal(N, C).requires_grad_()]
    return both(table, "absorbed sparse", lambda: sparse_mla(*leaves, ids, LATENT, C**-0.5)[0], leaves, *work)


def both(
    table: Table,
    kernel: str,
    call: Callable[[], Tensor],
    leaves: list[Tensor],
    sizes: dict[str, int],
    forward_flops: float,
    backward_flops: float,
    traffic: float,
    *,
    note: str = "",
) -> float:
    """A row for the forward and one for the backward pass; the time of both together."""
    with torch.no_grad():
        forward_ms = time_ms(call)
    table.add(Row("crossover", f"{kernel}, forward", sizes, forward_ms, forward_flops, traffic, note=note))
    out = call()
    grad = torch.randn_like(out)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    backward_ms = time_ms(backward)
    table.add(Row("crossover", f"{kernel}, backward", sizes, backward_ms, backward_flops, 2 * traffic, note=note))
    return forward_ms + backward_ms


def crossing(masked: dict[int, float], absorbed: dict[int, float]) -> str:
    """Where the ratio of the two times passes 1, straight between measured lengths on logarithmic scales."""
    lengths = sorted(masked.keys() & absorbed.keys())
    points = [(math.log(N), math.log(masked[N] / absorbed[N])) for N in lengths]
    if not points:
        return "crossover: not measured"
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 <= 0 < y1:
            N = math.exp(x0 - y0 * (x1 - x0) / (y1 - y0))
            return f"crossover: absorbed sparse attention is faster above {N:.0f} tokens, {N / K:.1f} times {K} keys"
    side = "above" if points[0][1] <= 0 else "below"
    limit = lengths[-1] if side == "above" else lengths[0]
    return f"crossover: {side} {limit} tokens, outside what was measured"
