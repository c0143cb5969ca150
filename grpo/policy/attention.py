"""Attention over packed sequences for training: latent attention, dense or by DeepSeek Sparse Attention in two equal
forms, and grouped-query attention.

The functions run over transformers' modules, which hold the parameters. Shape suffixes: N = tokens of all
sequences, B = sequences of a block, T = its longest, M = key tokens (= T), H = heads, D = width, R = rotary width,
C = latent width, V = value width, K = selected keys.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.grpo.policy.parts import Block, Part
from trimtab.kernels import reference

SPARSE_FROM = 1024
SPARSE_FROM_TIMES_TOPK = 16
"""Sequences longer than both use the sparse form. Measured on a CPU core, forward and backward, for 24 and 64 selected
keys: below, its gathers cost up to twice the dense form; at 2048 tokens it is 1.5 to 2 times faster."""


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """transformers' RMSNorm in one fused operation: about four times faster on a CPU."""
    weight: Any = norm.weight
    eps: Any = norm.variance_epsilon
    return F.rms_norm(x, weight.shape, weight, eps)


def add_norm(norm: nn.Module, x_ND: Tensor, y_ND: Tensor) -> tuple[Tensor, Tensor]:
    """x + y, and its RMSNorm; on a GPU in one launch."""
    weight: Any = norm.weight
    eps: Any = norm.variance_epsilon
    if x_ND.is_cuda:
        from trimtab.kernels.add_norm import add_rms_norm

        return add_rms_norm(x_ND, y_ND, weight, eps)
    return reference.add_rms_norm(x_ND, y_ND, weight, eps)


Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, cos, sin) -> x turned, in x's dtype. cos and sin hold R/2 angles and broadcast over x's leading dimensions."""


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE that pairs element i with i + R/2."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE that pairs element 2i with 2i + 1; the result holds the first elements of all pairs, then the second."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class HeadWeights(nn.Module):
    """The indexer's weights of its heads: a product in fp32 whatever the rest computes in."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.weight: Any = projection.weight

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND.float(), self.weight.float())


def latent_scale(config: Any) -> float:
    """What latent attention multiplies its scores with: YaRN's magnitude squared over the root of the width.

        s = (0.1 mscale_all_dim ln(factor) + 1)^2 / sqrt(qk_nope_head_dim + qk_rope_head_dim)

    [DeepSeek-V2, section 3.1.4, as released]; computed here because transformers' versions differ on DeepSeek-V2.
    """
    rope = config.rope_parameters
    mscale = (rope.get("rope_type", "default") != "default" and rope.get("mscale_all_dim")) or 0.0
    magnitude = 0.1 * mscale * math.log(max(rope.get("factor", 1.0), 1.0)) + 1.0
    scale: float = magnitude**2 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    return scale


class Index(NamedTuple):
    """The indexer's view of tokens: w carries every scale."""

    q_BTHD: Tensor
    k_BTD: Tensor
    w_BTH: Tensor
    ids_BTK: Tensor | None = None
    """int32 positions in the sequence, -1 for none: keys to attend to instead of those with the best scores."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What scores are made of."""
        return self.q_BTHD, self.k_BTD, self.w_BTH

    def scores(self, visible_TM: Tensor) -> Tensor:
        return reference.index_scores(*self.tensors, visible_TM)

    def select(self, score_BTM: Tensor, topk: int) -> Tensor:
        """What is attended to, bool [B, T, M]."""
        if self.ids_BTK is None:
            return reference.select(score_BTM.detach(), topk)
        return reference.selected_mask(self.ids_BTK, score_BTM.shape[-1])


def index_projections(
    indexer: nn.Module, x_ND: Tensor, q_NC: Tensor, cos_NR: Tensor, sin_NR: Tensor, rotate: Rotate
) -> Index:
    """Queries, keys and head weights of the lightning indexer [DeepSeek-V3.2-Exp, section 2].

    Its rotary dimensions come first, unlike those of the attention.

    Args:
        q_NC: the normalised compressed query.
        rotate: DeepSeek pairs halves, GLM pairs neighbours.
    """
    ix: Any = indexer
    R = 2 * cos_NR.shape[-1]
    q_NHD = ix.wq_b(q_NC).unflatten(-1, (ix.n_heads, ix.head_dim))
    k_ND = ix.k_norm(ix.wk(x_ND))
    q_rot = rotate(q_NHD[..., :R], cos_NR[:, None], sin_NR[:, None])
    k_rot = rotate(k_ND[..., :R], cos_NR, sin_NR)
    w_NH = ix.weights_proj(x_ND) * (ix.n_heads**-0.5 * ix.head_dim**-0.5)
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
    selected_BTM = index.select(score_BTM, topk)
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
    if index.ids_BTK is None:
        ids_BTK = reference.selected_ids(index.select(score_BTM, topk), topk)
    else:
        ids_BTK = index.ids_BTK.long()
    out_BTHC, lse_BTH = reference.sparse_mla(q_BTHC, row_BTC, ids_BTK, m.kv_lora_rank, m.scaling)
    kl_BT = None
    if with_kl:
        prob_BTK = reference.sparse_prob(q_BTHC.detach(), row_BTC.detach(), ids_BTK, lse_BTH.detach(), m.scaling)
        kl_BT = reference.indexer_kl(score_BTM.gather(-1, ids_BTK.clamp(min=0)), prob_BTK, ids_BTK >= 0)
    return torch.einsum("bthc,hvc->bthv", out_BTHC, w_uv), kl_BT


def choose_attend(T: int, topk: int) -> Attend:
    """The faster form for sequences of up to T tokens."""
    return attend_sparse if max(SPARSE_FROM, SPARSE_FROM_TIMES_TOPK * topk) < T else attend_dense


def latent_attention(
    mla: nn.Module,
    x_ND: Tensor,
    rotary: tuple[Tensor, Tensor],
    parts: Sequence[Part],
    *,
    topk: int,
    with_indexer_kl: bool,
    index_rotate: Rotate,
    choose: Callable[[int, int], Attend] = choose_attend,
    replay: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head latent attention over a pack, and where it has more than topk keys to choose from, DeepSeek Sparse
    Attention [DeepSeek-V2, section 2.1; DeepSeek-V3.2-Exp, eq. 1-4].

    The indexer reads detached inputs and learns from its KL alone; nothing else learns from the KL. Where no query
    has more than topk keys there is nothing to select.

    Args:
        replay: recorded selections [N, topk], which are attended to whatever the indexer says, and the position of each
            token in its sequence [N].

    Returns:
        The output [N, D] and, if asked for, the indexer's KL of each query [N].
    """
    m: Any = mla
    cos_NR, sin_NR = rotary
    q_NC = x_ND if m.q_lora_rank is None else rms_norm(m.q_a_layernorm, m.q_a_proj(x_ND))
    q_proj = m.q_proj if m.q_lora_rank is None else m.q_b_proj
    q_nope, q_rope = q_proj(q_NC).unflatten(-1, (m.num_heads, -1)).split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
    q_NHD = torch.cat([q_nope, rotate_pairs(q_rope, cos_NR[:, None], sin_NR[:, None])], -1)
    latent_NC, k_rope_NR = m.kv_a_proj_with_mqa(x_ND).split([m.kv_lora_rank, m.qk_rope_head_dim], -1)
    latents = (q_NHD, rms_norm(m.kv_a_layernorm, latent_NC), rotate_pairs(k_rope_NR, cos_NR, sin_NR))
    index: tuple[Tensor, ...] = ()
    if with_indexer_kl or any(topk < part.T for part in parts):
        with torch.set_grad_enabled(with_indexer_kl and torch.is_grad_enabled()):
            index = index_projections(m.indexer, x_ND.detach(), q_NC.detach(), cos_NR, sin_NR, index_rotate).tensors
        index += () if replay is None else (visible_or(*replay),)
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


def visible_or(selected_NK: Tensor, position_N: Tensor) -> Tensor:
    """Recorded selections, and for tokens with no more than K keys all that they see, padded with -1: int32 [N, K]."""
    key_K = torch.arange(selected_NK.shape[1], dtype=torch.int32, device=selected_NK.device)
    visible_NK = torch.where(key_K <= position_N[:, None], key_K, -1)
    return torch.where(position_N[:, None] < selected_NK.shape[1], visible_NK, selected_NK.int())


def full_attention(attention: nn.Module, x_ND: Tensor, rotary: tuple[Tensor, Tensor], parts: Sequence[Part]) -> Tensor:
    """Causal grouped-query attention over a pack; Qwen3 normalises queries and keys.

    Returns:
        [N, D].
    """
    a: Any = attention
    q_NHD, k_NHD, v_NHD = (p(x_ND).unflatten(-1, (-1, a.head_dim)) for p in (a.q_proj, a.k_proj, a.v_proj))
    q_NHD, k_NHD = _positioned(a, q_NHD, k_NHD, rotary)
    sizes = [part.tokens for part in parts]
    outs = [
        part.causal_mha(q, k, v, a.scaling).flatten(-2)
        for part, q, k, v in zip(parts, *(x.split(sizes) for x in (q_NHD, k_NHD, v_NHD)), strict=True)
    ]
    return a.o_proj(outs[0] if len(outs) == 1 else torch.cat(outs))


def _positioned(a: Any, q_NHD: Tensor, k_NHD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries and keys, normed where the model has norms for them, and turned; on a GPU all of it in one launch."""
    normed = hasattr(a, "q_norm")
    if q_NHD.is_cuda:
        from trimtab.kernels import rotary as kernels

        if normed:
            weights = a.q_norm.weight, a.k_norm.weight
            return kernels.normed_rotation(q_NHD, k_NHD, *rotary, *weights, a.q_norm.variance_epsilon)
        return kernels.rotate_halves(q_NHD, k_NHD, *rotary)
    if normed:
        q_NHD, k_NHD = rms_norm(a.q_norm, q_NHD), rms_norm(a.k_norm, k_NHD)
    cos, sin = (angle[:, None] for angle in rotary)
    return rotate_halves(q_NHD, cos, sin), rotate_halves(k_NHD, cos, sin)
