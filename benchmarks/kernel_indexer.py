"""The lightning indexer: scores, top-k, scores of selected keys, and the KL that it learns from."""

from pathlib import Path

import kernel_rivals as rivals
import torch
from kernel_common import (
    DEVICE,
    INDEX_D,
    INDEX_H,
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
    normal,
    peak_gib,
    random_ids,
    relative_error,
    time_ms,
)
from torch import Tensor

INDEXED = KL_LENGTH = 32 << 10


def indexer(table: Table) -> None:
    M, N = INDEXED, S
    table.part(f"Lightning indexer, {N} queries over {M} keys, {INDEX_H} heads of {INDEX_D}, top {K}")
    start, end = torch.zeros(N, dtype=torch.int32, device=DEVICE), torch.full((N,), M, dtype=torch.int32, device=DEVICE)
    shapes = (N, INDEX_H, INDEX_D), (M, INDEX_D), (N, INDEX_H)
    inputs = [tuple(normal(*shape) for shape in shapes) for _ in range(SETS)]
    sizes = {"H": INDEX_H, "S_kv": M}
    flops = 2.0 * N * M * INDEX_H * INDEX_D
    read = (N * INDEX_H + M) * INDEX_D
    with table.attempt("indexer in bf16"):
        from trimtab.kernels.indexer import index_scores, index_topk

        scores = [index_scores(*x, start, end) for x in inputs]
        ms = time_ms(*(lambda x=x: index_scores(*x, start, end) for x in inputs))
        table.add(Row("indexer", "scores, bf16", sizes, ms, flops, 2.0 * read + 4.0 * N * M))
        ms = time_ms(*(lambda x=x: index_topk(*x, start, end, K) for x in inputs))
        table.add(Row("indexer", "scores and top-k, bf16", sizes, ms, flops, 2.0 * read + 4.0 * N * K))
        index_topk_of(table, scores, start, end)
        del scores
    with table.attempt("indexer in FP8"):
        index_fp8(table, inputs, start, end)
    with table.attempt("scores of selected keys"):
        selected(table, inputs[0])


def index_topk_of(table: Table, scores: list[Tensor], start: Tensor, end: Tensor) -> None:
    from trimtab.kernels.topk import topk_ids

    N, M = scores[0].shape
    sizes, traffic = {"S_kv": M}, 4.0 * N * (M + K)
    ours = topk_ids(scores[0], K, start_N=start, end_N=end)
    ms = time_ms(*(lambda x=x: topk_ids(x, K, start_N=start, end_N=end) for x in scores))
    best = scores[0].sort(dim=-1, descending=True, stable=True).indices[:, :K].sort(-1).values
    note = "equal to a stable sort" if torch.equal(ours, best.int()) else "DIFFERS FROM A STABLE SORT"
    table.add(Row("indexer", "top-k", sizes, ms, 0.0, traffic, note=note))
    ms = time_ms(*(lambda x=x: x.topk(K, sorted=False) for x in scores))
    table.add(Row("indexer", "torch.topk, unsorted", sizes, ms, 0.0, traffic))


def tilelang_indexer(table: Table, folder: Path) -> None:
    from trimtab.kernels.indexer import index_scores, quantize_fp8
    from trimtab.kernels.topk import topk_ids

    N, M = S, INDEXED
    table.part(f"TileLang's indexer, {N} queries over {M} keys, top {K}")
    start, end = torch.zeros(N, dtype=torch.int32, device=DEVICE), torch.full((N,), M, dtype=torch.int32, device=DEVICE)
    (q, q_scale), (k, k_scale) = quantize_fp8(normal(N, INDEX_H, INDEX_D)), quantize_fp8(normal(M, INDEX_D))
    w = torch.randn(N, INDEX_H, device=DEVICE) * q_scale
    ours = index_scores(q, k, w, start, end) * k_scale
    with table.rival("TileLang top-k"):
        topk = rivals.tilelang_topk(folder)
        ids = topk(ours, start, end, K).sort(-1).values
        differ = (ids != topk_ids(ours, K, start_N=start, end_N=end)).float().mean().item()
        ms = time_ms(lambda: topk(ours, start, end, K))
        note = f"in no fixed order; {differ:.1%} of sorted ids differ"
        table.add(Row("indexer", "TileLang top-k", {"S_kv": M}, ms, 0.0, 4.0 * N * (M + K), note=note))
    with table.rival("TileLang scores, FP8"):
        fp8_rival(table, "TileLang scores, FP8", rivals.tilelang_scores(folder), (q, k, k_scale, w, start, end), ours)


def fp8_rival(table: Table, name: str, theirs: rivals.Scores, inputs: tuple[Tensor, ...], ours: Tensor) -> None:
    error = relative_error(theirs(*inputs), ours)
    ms = time_ms(lambda: theirs(*inputs))
    flops, traffic = 2.0 * S * INDEXED * INDEX_H * INDEX_D, (S * INDEX_H + INDEXED) * INDEX_D + 4.0 * S * INDEXED
    table.add(Row("indexer", name, {"H": INDEX_H, "S_kv": INDEXED}, ms, flops, traffic, "fp8", error=error))


def index_fp8(table: Table, inputs: list, start: Tensor, end: Tensor) -> None:
    from trimtab.kernels.indexer import index_scores, index_topk, quantize_fp8

    N, M = S, INDEXED
    sizes = {"H": INDEX_H, "S_kv": M}
    flops, read = 2.0 * N * M * INDEX_H * INDEX_D, (N * INDEX_H + M) * INDEX_D
    sets = []
    for q, k, w in inputs:
        (q8, q_scale), (k8, k_scale) = quantize_fp8(q), quantize_fp8(k)
        sets.append((q8, k8, k_scale, w.float() * q_scale))
    exact = index_scores(*inputs[0], start, end)
    q8, k8, k_scale, w = sets[0]
    ours = index_scores(q8, k8, w, start, end) * k_scale
    error = relative_error(ours, exact)
    ms = time_ms(*(lambda x=x: index_scores(x[0], x[1], x[3], start, end) for x in sets))
    note = "error against bf16"
    table.add(Row("indexer", "scores, FP8", sizes, ms, flops, read + 4.0 * N * M, "fp8", error=error, note=note))
    ms = time_ms(*(lambda x=x: index_topk(x[0], x[1], x[3], start, end, K, k_scale_M=x[2]) for x in sets))
    table.add(Row("indexer", "scores and top-k, FP8", sizes, ms, flops, read + 4.0 * N * K, "fp8"))
    ms = time_ms(*(lambda x=x: quantize_fp8(x[0]) for x in inputs))
    table.add(Row("indexer", "quantise q", {"H": INDEX_H}, ms, 0.0, N * INDEX_H * (3.0 * INDEX_D + 4)))
    with table.rival("DeepGEMM scores, FP8"):
        fp8_rival(table, "DeepGEMM scores, FP8", rivals.deepgemm_scores(), (*sets[0], start, end), ours)


def selected(table: Table, inputs: tuple[Tensor, ...]) -> None:
    from trimtab.kernels.indexer import selected_scores

    ids, sizes = random_ids(S, INDEXED), {"H": INDEX_H, "S_kv": INDEXED}
    q, k, w = leaves = [x.detach().requires_grad_() for x in inputs]
    flops = 2.0 * S * K * INDEX_H * INDEX_D
    read = 2.0 * (S * INDEX_H + INDEXED) * INDEX_D
    with torch.no_grad():
        ms = time_ms(lambda: selected_scores(q, k, w, ids))
    table.add(Row("indexer", "scores of selected keys", sizes, ms, flops, read + 8.0 * S * K))
    score = selected_scores(q, k, w, ids)
    grad = torch.randn_like(score)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(score, leaves, grad, retain_graph=True)

    ms, (extra, _) = time_ms(backward), peak_gib(backward)
    row = Row(
        "indexer", "scores of selected keys, backward", sizes, ms, 3 * flops, 2 * read + 8.0 * S * K, "bf16", extra
    )
    table.add(row)


def kl(table: Table) -> None:
    table.part("Indexer KL")
    with table.attempt("sparse_prob"):
        target(table)
    with table.attempt("dense_indexer_kl"):
        dense_kl(table)


def target(table: Table) -> None:
    from trimtab.kernels.indexer_kl import sparse_prob
    from trimtab.kernels.sparse_mla import sparse_mla

    C, M, scale = LATENT + ROPE, INDEXED, (LATENT + ROPE) ** -0.5
    q, kv, ids = normal(S, H, C), normal(M, C), random_ids(S, M)
    lse = sparse_mla(q, kv, ids, LATENT, scale)[1]
    sums = sparse_prob(q, kv, ids, lse, scale).sum(-1)
    ms = time_ms(lambda: sparse_prob(q, kv, ids, lse, scale))
    error = relative_error(sums, torch.full_like(sums, H))
    flops, traffic = 2.0 * S * K * H * C, 2.0 * (S * H + M) * C + 8.0 * S * K
    note = "error: sums against H"
    table.add(Row("kl", "target on selected keys", {"H": H, "S_kv": M}, ms, flops, traffic, error=error, note=note))


def dense_kl(table: Table) -> None:
    from trimtab.kernels.indexer_kl import dense_indexer_kl
    from trimtab.kernels.masked_mha import masked_mha

    N, D = KL_LENGTH, NOPE + ROPE
    start, end = causal_range(N)
    q, k = normal(N, H, D), normal(N, H, D)
    with torch.no_grad():
        lse = masked_mha(q, k, normal(N, H, VALUE), None, start, end, D**-0.5)[1]
    index = [normal(*shape).mul_(0.3).requires_grad_() for shape in ((N, INDEX_H, INDEX_D), (N, INDEX_D), (N, INDEX_H))]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(dense_indexer_kl(*index, q, k, lse, start, end, D**-0.5).sum(), index)

    extra, above_results = peak_gib(step)
    ms = time_ms(step, budget_ms=100.0)
    # forward: probabilities and scores; backward: both again, and the gradients of q and k of the indexer
    flops = N * (N + 1.0) * (2 * H * D + 4 * INDEX_H * INDEX_D)
    traffic = 4.0 * 2 * N * (H * D + INDEX_H * INDEX_D)
    note = f"{above_results:.2f} GiB of it beside gradients"
    row = Row("kl", "dense KL, forward and backward", {"N": N, "H": H}, ms, flops, traffic, "bf16", extra, note=note)
    table.add(row)
