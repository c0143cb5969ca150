"""Attention over packed sequences for training: DeepSeek Sparse Attention in two equal forms, and plain causal.

The functions run over transformers' modules, which hold the parameters. Shape suffixes: N = tokens of all
sequences, B = sequences of a block, T = its longest, M = key tokens (= T), H = heads, D = width, R = rotary width,
C = latent width, V = value width, K = selected keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.kernels import reference

MAX_PADDING = 1.25
"""Rows of a block per token in it, at most: above it, a new block costs less than the padding."""
MAX_PAIRS = 1 << 20
"""Query-key pairs of a block, unless it is one sequence: 4 MiB a head in fp32."""
SPARSE_FROM = 1024
SPARSE_FROM_TIMES_TOPK = 16
"""Sequences longer than both use the sparse form. Measured on a CPU core, forward and backward, for 24 and 64 selected
keys: below, its gathers cost up to twice the dense form; at 2048 tokens it is 1.5 to 2 times faster."""


@dataclass(frozen=True)
class Part:
    """Neighbouring sequences of a pack that are attended to in one go, in the form that attention wants them."""

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def T(self) -> int:
        """Length of the longest."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def pad(self, x_N: Tensor) -> Tensor:
        return x_N

    def unpad(self, x: Tensor) -> Tensor:
        return x


class Block(Part):
    """Sequences of similar length as one rectangle [B, T]."""

    @cached_property
    def place_N(self) -> Tensor:
        """Where each token lies in the flattened rectangle."""
        places = [torch.arange(length) + b * self.T for b, length in enumerate(self.lengths)]
        return torch.cat(places).to(self.device)

    @cached_property
    def row_BT(self) -> Tensor:
        """Which token fills each place, flattened; padding repeats token 0, which no real query sees."""
        row_BT = torch.zeros(len(self.lengths) * self.T, dtype=torch.long, device=self.device)
        row_BT[self.place_N] = torch.arange(self.tokens, device=self.device)
        return row_BT

    @cached_property
    def causal_TM(self) -> Tensor:
        return torch.ones(self.T, self.T, dtype=torch.bool, device=self.device).tril()

    @property
    def rectangular(self) -> bool:
        return self.tokens == len(self.lengths) * self.T

    def pad(self, x_N: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...]."""
        padded: Tensor = x_N if self.rectangular else _Pad.apply(x_N, self.row_BT, self.place_N)
        return padded.unflatten(0, (len(self.lengths), self.T))

    def unpad(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        flat = x_BT.flatten(0, 1)
        return flat if self.rectangular else _Unpad.apply(flat, self.place_N)


class _Pad(torch.autograd.Function):
    """Rows by index; the backward gathers, because padding never gets gradient (autograd's own adds row by row)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of _Pad: padding rows get zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return padded.index_copy_(0, ctx.saved_tensors[0], grad), None


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """Tokens of each sequence.

    Raises:
        ValueError: cu_seqlens does not start at 0 or an entry is not above the one before.
    """
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    if offsets[:1] != [0] or not lengths or min(lengths) < 1:
        raise ValueError(f"cu_seqlens must start at 0 and rise with every sequence, got {offsets}")
    return lengths


def blocks_of(cu_seqlens: Tensor) -> list[Block]:
    """Cut a pack into blocks, in order. Sequences sorted by length pad least. Raises what lengths_of does."""
    groups: list[list[int]] = [[]]
    for length in lengths_of(cu_seqlens):
        group = [*groups[-1], length]
        rows = len(group) * max(group)
        if groups[-1] and (rows > MAX_PADDING * sum(group) or rows * max(group) > MAX_PAIRS):
            groups.append([length])
        else:
            groups[-1] = group
    return [Block(tuple(group), cu_seqlens.device) for group in groups]


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """transformers' RMSNorm in one fused operation: about four times faster on a CPU."""
    weight: Any = norm.weight
    eps: Any = norm.variance_epsilon
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE that pairs element i with i + R/2. cos and sin hold R/2 angles and broadcast over x's leading dimensions."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE that pairs element 2i with 2i + 1; the result holds the first elements of all pairs, then the second."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Index(NamedTuple):
    """The indexer's view of tokens: w carries every scale."""

    q_BTHD: Tensor
    k_BTD: Tensor
    w_BTH: Tensor

    def scores(self, visible_TM: Tensor) -> Tensor:
        return reference.index_scores(self.q_BTHD, self.k_BTD, self.w_BTH, visible_TM)


def index_projections(indexer: nn.Module, x_ND: Tensor, q_NC: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Index:
    """Queries, keys and head weights of the lightning indexer [DeepSeek-V3.2-Exp, section 2].

    Its rotary dimensions come first and pair halves, unlike those of the attention.

    Args:
        q_NC: the normalised compressed query.
    """
    ix: Any = indexer
    R = 2 * cos_NR.shape[-1]
    q_NHD = ix.wq_b(q_NC).unflatten(-1, (ix.n_heads, ix.head_dim))
    k_ND = ix.k_norm(ix.wk(x_ND))
    q_rot = rotate_halves(q_NHD[..., :R], cos_NR[:, None], sin_NR[:, None])
    k_rot = rotate_halves(k_ND[..., :R], cos_NR, sin_NR)
    w_NH = ix.weights_proj(x_ND.to(ix.weights_proj.weight.dtype)).float() * (ix.n_heads**-0.5 * ix.head_dim**-0.5)
    return Index(torch.cat([q_rot, q_NHD[..., R:]], -1), torch.cat([k_rot, k_ND[..., R:]], -1), w_NH)


class Latents(NamedTuple):
    """What MLA attends with: full queries, and keys and values as latents."""

    q_BTHD: Tensor
    latent_BTC: Tensor
    k_rope_BTR: Tensor


Attend = Callable[[nn.Module, Latents, Index | None, Any, int, bool], tuple[Tensor, Tensor | None]]
"""(MLA module, latents, index, part, selected keys, with indexer KL) -> values [..., H, V] and KL [...], padded."""


def attend_dense(
    mla: nn.Module, latents: Latents, index: Index | None, block: Block, topk: int, with_kl: bool
) -> tuple[Tensor, Tensor | None]:
    """MLA as multi-head attention with the selection as a mask: time and memory grow with T * T * H."""
    m: Any = mla
    kv_BTHD = m.kv_b_proj(latents.latent_BTC).unflatten(-1, (m.num_heads, -1))
    k_nope, v_BTHV = kv_BTHD.split([m.qk_nope_head_dim, m.v_head_dim], -1)
    k_rope = latents.k_rope_BTR[:, :, None].expand(-1, -1, m.num_heads, -1)
    k_BTHD = torch.cat([k_nope, k_rope], -1)
    if index is None:
        return reference.masked_mha(latents.q_BTHD, k_BTHD, v_BTHV, block.causal_TM, m.scaling), None
    score_BTM = index.scores(block.causal_TM)
    selected_BTM = reference.select(score_BTM.detach(), topk)
    if not with_kl:
        return reference.masked_mha(latents.q_BTHD, k_BTHD, v_BTHV, selected_BTM, m.scaling), None
    prob_BHTM = reference.masked_prob(latents.q_BTHD, k_BTHD, selected_BTM, m.scaling)
    out_BTHV = torch.matmul(prob_BHTM.to(v_BTHV.dtype), v_BTHV.transpose(1, 2)).transpose(1, 2)
    return out_BTHV, reference.indexer_kl(score_BTM, prob_BHTM.detach().sum(1), selected_BTM)


def attend_sparse(
    mla: nn.Module, latents: Latents, index: Index | None, block: Block, topk: int, with_kl: bool
) -> tuple[Tensor, Tensor | None]:
    """MLA absorbed into multi-query attention over the gathered latents of the selected keys."""
    if index is None:
        return attend_dense(mla, latents, index, block, topk, with_kl)
    m: Any = mla
    w_uk, w_uv = m.kv_b_proj.weight.unflatten(0, (m.num_heads, -1)).split([m.qk_nope_head_dim, m.v_head_dim], 1)
    q_nope, q_rope = latents.q_BTHD.split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
    q_BTHC = torch.cat([torch.einsum("bthn,hnc->bthc", q_nope, w_uk), q_rope], -1)
    row_BTC = torch.cat([latents.latent_BTC, latents.k_rope_BTR], -1)
    score_BTM = index.scores(block.causal_TM)
    ids_BTK = reference.selected_ids(reference.select(score_BTM.detach(), topk), topk)
    out_BTHC, lse_BTH = reference.sparse_mla(q_BTHC, row_BTC, ids_BTK, m.kv_lora_rank, m.scaling)
    kl_BT = None
    if with_kl:
        prob_BTK = reference.sparse_prob(q_BTHC.detach(), row_BTC.detach(), ids_BTK, lse_BTH.detach(), m.scaling)
        kl_BT = reference.indexer_kl(score_BTM.gather(-1, ids_BTK.clamp(min=0)), prob_BTK, ids_BTK >= 0)
    return torch.einsum("bthc,hvc->bthv", out_BTHC, w_uv), kl_BT


def choose_attend(T: int, topk: int) -> Attend:
    """The faster form for sequences of up to T tokens."""
    return attend_sparse if max(SPARSE_FROM, SPARSE_FROM_TIMES_TOPK * topk) < T else attend_dense


def causal_mha(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
    """Causal attention over all keys; fewer key heads than query heads are shared in order.

    Returns:
        [B, T, H, V].
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHV))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)


def sparse_attention(
    mla: nn.Module,
    x_ND: Tensor,
    rotary: tuple[Tensor, Tensor],
    parts: Sequence[Part],
    *,
    topk: int,
    with_indexer_kl: bool,
    choose: Callable[[int, int], Attend] = choose_attend,
) -> tuple[Tensor, Tensor | None]:
    """DeepSeek Sparse Attention over a pack [DeepSeek-V3.2-Exp, eq. 1-4].

    The indexer reads detached inputs and learns from its KL alone; nothing else learns from the KL. Where no query
    has more than topk keys there is nothing to select.

    Returns:
        The output [N, D] and, if asked for, the indexer's KL of each query [N].
    """
    m: Any = mla
    cos_NR, sin_NR = rotary
    q_NC = rms_norm(m.q_a_layernorm, m.q_a_proj(x_ND))
    q_nope, q_rope = (
        m.q_b_proj(q_NC).unflatten(-1, (m.num_heads, -1)).split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
    )
    q_NHD = torch.cat([q_nope, rotate_pairs(q_rope, cos_NR[:, None], sin_NR[:, None])], -1)
    latent_NC, k_rope_NR = m.kv_a_proj_with_mqa(x_ND).split([m.kv_lora_rank, m.qk_rope_head_dim], -1)
    latents = (q_NHD, rms_norm(m.kv_a_layernorm, latent_NC), rotate_pairs(k_rope_NR, cos_NR, sin_NR))
    index: Index | tuple[()] = ()
    if with_indexer_kl or any(topk < part.T for part in parts):
        with torch.set_grad_enabled(with_indexer_kl and torch.is_grad_enabled()):
            index = index_projections(m.indexer, x_ND.detach(), q_NC.detach(), cos_NR, sin_NR)
    sizes = [part.tokens for part in parts]
    outs, kls = [], []
    for part, *tensors in zip(parts, *(x.split(sizes) for x in (*latents, *index)), strict=True):
        padded = [part.pad(tensor) for tensor in tensors]
        indexed = Index(*padded[3:]) if with_indexer_kl or topk < part.T else None
        out, kl = choose(part.T, topk)(mla, Latents(*padded[:3]), indexed, part, topk, with_indexer_kl)
        outs.append(part.unpad(out.flatten(-2)))
        if kl is not None:
            kls.append(part.unpad(kl))
    return m.o_proj(torch.cat(outs)), torch.cat(kls) if kls else None


def full_attention(attention: nn.Module, x_ND: Tensor, rotary: tuple[Tensor, Tensor], blocks: Sequence[Part]) -> Tensor:
    """Causal attention of Llama and Qwen3 over a pack; Qwen3 normalises queries and keys.

    Returns:
        [N, D].
    """
    a: Any = attention
    q_NHD, k_NHD, v_NHD = (p(x_ND).unflatten(-1, (-1, a.head_dim)) for p in (a.q_proj, a.k_proj, a.v_proj))
    if hasattr(a, "q_norm"):
        q_NHD, k_NHD = rms_norm(a.q_norm, q_NHD), rms_norm(a.k_norm, k_NHD)
    cos, sin = (angle[:, None] for angle in rotary)
    q_NHD, k_NHD = rotate_halves(q_NHD, cos, sin), rotate_halves(k_NHD, cos, sin)
    sizes = [block.tokens for block in blocks]
    outs = []
    for block, *parts in zip(blocks, *(x.split(sizes) for x in (q_NHD, k_NHD, v_NHD)), strict=True):
        q, k, v = (block.pad(part) for part in parts)
        outs.append(block.unpad(causal_mha(q, k, v, a.scaling).flatten(-2)))
    return a.o_proj(torch.cat(outs))
