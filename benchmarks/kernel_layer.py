"""Attention of one DeepSeek-V3.2 layer as the policy trains it, forward and backward: dense against sparse.

The layer's MLP is left out: it is the same in both. One sequence of N tokens, bf16, random weights.
"""

from collections.abc import Callable
from statistics import median

import torch
from kernel_common import DEVICE, Row, Table, peak_gib
from torch import Tensor, nn

from trimtab.grpo.policy.attention import sparse_attention

LENGTHS = (8 << 10, 32 << 10, 64 << 10, 128 << 10)
REPEATED_UP_TO = 32 << 10
"""Longer sequences take seconds: they are timed once, after one run that fills the allocator."""
VARIANTS = {"dense": (True, False), "DSA": (False, False), "DSA with indexer KL": (False, True)}
"""Dense attention, indexer KL."""


def build() -> tuple[nn.Module, nn.Module]:
    """The attention of transformers' DeepSeek-V3.2 at its real sizes, and its rotary embedding."""
    from transformers import DeepseekV32Config
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
        DeepseekV32Attention,
        DeepseekV32RotaryEmbedding,
    )

    config = DeepseekV32Config()
    with torch.device(DEVICE):
        return DeepseekV32Attention(config, 0).to(torch.bfloat16), DeepseekV32RotaryEmbedding(config)


def least_flops(mla: nn.Module, N: int, topk: int, *, dense: bool, with_kl: bool) -> float:
    """Projections (forward, and twice backward) and attention over all earlier tokens or the selected ones."""
    m, pairs = mla, N * (N + 1) / 2
    of_index = sum(p.numel() for p in m.indexer.parameters())
    projections = 2.0 * N * 3 * (sum(p.numel() for p in m.parameters()) - of_index)
    if dense:
        key, value = m.qk_head_dim, m.v_head_dim
        return projections + 2 * pairs * m.num_heads * (4 * key + 3 * value)
    row, value, seen = m.kv_lora_rank + m.qk_rope_head_dim, m.kv_lora_rank, min(topk, N) * (N - min(topk, N) / 2)
    index_width = m.indexer.n_heads * m.indexer.head_dim
    total = projections + 2 * N * of_index + 2 * pairs * index_width + 2 * seen * m.num_heads * (4 * row + 3 * value)
    if with_kl:
        total += 2 * N * 2 * of_index + 2 * seen * (m.num_heads * row + 4 * index_width)
    return total


def step_of(mla: nn.Module, rotary_embedding: nn.Module, N: int, *, dense: bool, with_kl: bool) -> Callable[[], None]:
    """One forward and backward pass over a sequence of N tokens."""
    from trimtab.grpo.policy.packed_attention import choose_attend, spans_of

    config = mla.config
    topk = N if dense else config.index_topk
    x_ND = torch.randn(N, config.hidden_size, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    grad_ND = torch.randn_like(x_ND)
    cos, sin = rotary_embedding(x_ND, torch.arange(N, device=DEVICE)[None])
    half = cos.shape[-1] // 2
    rotary = cos[0, :, :half], sin[0, :, :half]
    spans = spans_of([N], torch.device(DEVICE), topk, choose_attend)

    def step() -> None:
        x_ND.grad = None
        mla.zero_grad(set_to_none=True)
        out_ND, kl_N = sparse_attention(
            mla, x_ND, rotary, spans, topk=topk, with_indexer_kl=with_kl, choose=choose_attend
        )
        losses: list[Tensor] = [out_ND] if kl_N is None else [out_ND, kl_N.mean()]
        grads: list[Tensor | None] = [grad_ND] if kl_N is None else [grad_ND, None]
        del out_ND, kl_N
        torch.autograd.backward(losses, grads)

    return step


def elapsed_ms(step: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def layer(table: Table) -> None:
    table.part("A policy layer's attention, forward and backward, one sequence of N tokens")
    mla, rotary_embedding = build()
    topk = mla.config.index_topk
    for N in LENGTHS:
        for name, (dense, with_kl) in VARIANTS.items():
            with table.attempt(f"layer, {name}, N = {N}"):
                step = step_of(mla, rotary_embedding, N, dense=dense, with_kl=with_kl)
                step()
                times = [elapsed_ms(step) for _ in range(3 if N <= REPEATED_UP_TO else 1)]
                mla.zero_grad(set_to_none=True)
                extra, _ = peak_gib(step)
                flops = least_flops(mla, N, topk, dense=dense, with_kl=with_kl)
                table.add(Row("layer", name, {"N": N}, median(times), flops, 0.0, extra_gib=extra))
            step = None  # its tensors, before the next is built
            mla.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
