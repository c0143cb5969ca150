"""What each kernel must compute, in plain, differentiable PyTorch: the only spec, and the CPU path.

Shape suffixes: T = query tokens, M = key tokens, H = heads, D = head width, C = width of a cached row,
V = value width or vocabulary, K = selected keys, S = sampled tokens, E = kept ids of all S. Leading batch
dimensions, written "...", are allowed where stated.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 23
"""Logits that full_logp holds at a time: 32 MiB in fp32, large enough for full-speed matrix products."""


def index_scores(q_THD: Tensor, k_MD: Tensor, w_TH: Tensor, visible_TM: Tensor) -> Tensor:
    """Lightning-indexer scores, -inf where the key is not visible.

        I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])

    [DeepSeek-V3.2-Exp, eq. 1]. Leading batch dimensions are allowed. w carries every scale (H^-1/2 * D^-1/2).

    Returns:
        [..., T, M] float32.
    """
    score_THM = torch.einsum("...thd,...md->...thm", q_THD.float(), k_MD.float()).relu()
    score_TM = torch.matmul(w_TH.float()[..., None, :], score_THM).squeeze(-2)
    return score_TM.masked_fill(~visible_TM, float("-inf"))


def select(score_TM: Tensor, k: int) -> Tensor:
    """The set of the k best keys of each query in a total order: higher score, then lower position.

    A query with fewer than k visible keys selects all of them, and nothing that is -inf. Values decide the
    threshold and positions break its ties, so the result depends neither on the sort nor on the row length.

    Returns:
        [..., T, M] booleans.
    """
    visible_TM = score_TM > float("-inf")
    if k >= score_TM.shape[-1]:
        return visible_TM
    threshold_T1 = score_TM.topk(k, dim=-1).values[..., -1:]
    above_TM = score_TM > threshold_T1
    tied_TM = score_TM == threshold_T1
    room_T1 = k - above_TM.sum(-1, keepdim=True)
    return (above_TM | (tied_TM & (tied_TM.cumsum(-1) <= room_T1))) & visible_TM


@cache
def hadamard(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix of +-1, by doubling."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.contiguous()


def fp8_rows(x: Tensor) -> Tensor:
    """Rows as FP8 keeps them: rotated by a Hadamard matrix and rounded to e4m3 with one scale a row, here in float32.

    Products of two such rows are those of the rows, but for the rounding [DeepSeek-V3.2-Exp, public inference code].

    Args:
        x: [..., D], D a power of two.
    """
    D = x.shape[-1]
    y = x.float() @ hadamard(D, torch.float32, x.device) * D**-0.5
    top = y.abs().amax(-1, keepdim=True)
    scale = torch.where(top > 0, top / 448.0, 1.0)
    return (y / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale


def selected_ids(selected_TM: Tensor, k: int) -> Tensor:
    """Positions of the selected keys, ascending, padded with -1.

    Returns:
        [..., T, min(k, M)] int64.
    """
    M = selected_TM.shape[-1]
    position_M = torch.arange(M, device=selected_TM.device)
    ids_TK = torch.where(selected_TM, position_M, M).sort(-1).values[..., : min(k, M)]
    return ids_TK.masked_fill(ids_TK == M, -1)


def selected_mask(ids_TK: Tensor, M: int) -> Tensor:
    """Which of M keys are selected: the inverse of selected_ids, bool [..., T, M]."""
    mask_TM = torch.zeros(*ids_TK.shape[:-1], M + 1, dtype=torch.bool, device=ids_TK.device)
    return mask_TM.scatter_(-1, torch.where(ids_TK < 0, M, ids_TK).long(), True)[..., :M]


def gather_rows(kv_MC: Tensor, ids_TK: Tensor) -> Tensor:
    """Cached rows by position; an unused id (-1) reads row 0, so its row must be masked by the caller.

    Returns:
        [..., T, K, C].
    """
    flat_I = ids_TK.clamp(min=0).flatten(-2)
    rows = kv_MC.gather(-2, flat_I[..., None].expand(*flat_I.shape, kv_MC.shape[-1]))
    return rows.unflatten(-2, ids_TK.shape[-2:])


def sparse_mla(q_THC: Tensor, kv_MC: Tensor, ids_TK: Tensor, value_dim: int, scale: float) -> tuple[Tensor, Tensor]:
    """Absorbed multi-query attention over selected rows: keys are whole rows, values their first value_dim.

    [DeepSeek-V3.2-Exp, section 2]. ids of -1 are unused and never count. A query without keys gives O = 0 and
    lse = -inf. Leading batch dimensions are allowed.

    Returns:
        O [..., T, H, value_dim] in q's dtype, lse [..., T, H] float32 (natural logarithm).
    """
    row_TKC = gather_rows(kv_MC, ids_TK)
    score_THK = torch.einsum("...thc,...tkc->...thk", q_THC, row_TKC).float() * scale
    score_THK = score_THK.masked_fill((ids_TK < 0)[..., None, :], float("-inf"))
    lse_TH = score_THK.logsumexp(-1)
    prob_THK = (score_THK - lse_TH.masked_fill(lse_TH == float("-inf"), 0.0)[..., None]).exp()
    out_THV = torch.einsum("...thk,...tkv->...thv", prob_THK.to(q_THC.dtype), row_TKC[..., :value_dim])
    return out_THV, lse_TH


def sparse_prob(q_THC: Tensor, kv_MC: Tensor, ids_TK: Tensor, lse_TH: Tensor, scale: float) -> Tensor:
    """The probabilities of sparse_mla summed over heads, from its lse: the target of the indexer.

    Returns:
        [..., T, K] float32; zero for unused ids.
    """
    score_THK = torch.einsum("...thc,...tkc->...thk", q_THC, gather_rows(kv_MC, ids_TK)).float() * scale
    prob_TK = (score_THK - lse_TH[..., None]).exp().sum(-2)
    return prob_TK.masked_fill(ids_TK < 0, 0.0)


def masked_prob(q_THD: Tensor, k_MHD: Tensor, selected_TM: Tensor, scale: float) -> Tensor:
    """Attention probabilities over the selected keys. Leading batch dimensions are allowed.

    Returns:
        [..., H, T, M] float32; a query without keys gives a finite row that means nothing.
    """
    # matmul and an additive mask, not einsum and masked_fill: a quarter faster on a CPU, backward included
    q_HTD, k_HDM = q_THD.transpose(-3, -2), k_MHD.transpose(-3, -2).transpose(-2, -1)
    hidden_TM = torch.zeros(selected_TM.shape, device=q_THD.device)
    hidden_TM = hidden_TM.masked_fill_(~selected_TM, torch.finfo(torch.float32).min)  # -inf: NaN for an empty row
    return (torch.matmul(q_HTD, k_HDM).float() * scale + hidden_TM[..., None, :, :]).softmax(-1)


def masked_mha(q_THD: Tensor, k_MHD: Tensor, v_MHV: Tensor, selected_TM: Tensor, scale: float) -> Tensor:
    """Multi-head attention in which a query sees its selected keys only. Leading batch dimensions are allowed.

    Returns:
        [..., T, H, V] in q's dtype; zero for a query without keys.
    """
    prob_HTM = masked_prob(q_THD, k_MHD, selected_TM, scale)
    out_THV = torch.matmul(prob_HTM.to(v_MHV.dtype), v_MHV.transpose(-3, -2)).transpose(-3, -2)
    return out_THV.masked_fill(~selected_TM.any(-1)[..., None, None], 0.0)


def indexer_kl(score_TM: Tensor, prob_TM: Tensor, selected_TM: Tensor) -> Tensor:
    """How far the indexer's distribution over the selected keys is from the main attention's.

        L[t] = KL(p[t] || softmax(I[t])),   p = attention probabilities summed over heads, normalised to sum 1

    [DeepSeek-V3.2-Exp, eq. 3-4]. selected is every visible key in the warm-up and S_t in the sparse stage. The
    target p carries no gradient. Leading batch dimensions are allowed; the last one may also hold gathered keys.

    Args:
        prob_TM: any positive multiple of p on the selected keys; what it holds elsewhere is ignored.

    Returns:
        [..., T] float32, in nats; zero for a query without keys.
    """
    target_TM = prob_TM.detach().float().masked_fill(~selected_TM, 0.0)
    target_TM = target_TM / target_TM.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    lowest = torch.finfo(torch.float32).min
    logq_TM = score_TM.float().masked_fill(~selected_TM, lowest).log_softmax(-1)
    return torch.special.xlogy(target_TM, target_TM).sum(-1) - (target_TM * logq_TM).sum(-1)


def kept_logp(
    hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, kept_id_E: Tensor, kept_offset_S: Tensor, temperature: float
) -> Tensor:
    """Log-probability of each sampled token, normalised over the ids its sampler kept.

        log pi~(y) = l_y - log sum_{v in S_t} exp(l_v),   l_v = h_t . W[v] / temperature

    [DeepSeek-V3.2, Keep Sampling Mask]. Only the kept rows of the LM head are read: no [S, V] tensor exists.
    A singleton gives exactly 0 with a gradient of exactly 0.

    Args:
        kept_id_E: kept ids of all positions, one after another; kept_offset_S [S + 1] delimits them (CSR).

    Returns:
        [S] float32.

    Raises:
        ValueError: a sampled token is not among its kept ids, or is there twice.
    """
    row_E = torch.repeat_interleave(torch.arange(len(token_S), device=token_S.device), kept_offset_S.diff())
    is_token_E = kept_id_E == token_S[row_E]
    if not torch.equal(row_E[is_token_E], torch.arange(len(token_S), device=token_S.device)):
        raise ValueError("a sampled token is outside its kept set: refuse such a segment when it is recorded")
    # index_select, not [...]: its backward is several times faster on a CPU
    logit_E = (hidden_SD.index_select(0, row_E) * weight_VD.index_select(0, kept_id_E)).sum(-1).float() / temperature
    top_S = torch.full((len(token_S),), float("-inf"), device=logit_E.device)
    top_S = top_S.scatter_reduce(0, row_E, logit_E.detach(), "amax")
    sum_S = torch.zeros_like(top_S).index_add(0, row_E, (logit_E - top_S[row_E]).exp())
    return logit_E[is_token_E] - top_S - sum_S.log()


@torch.no_grad()
def kept_entropy(
    hidden_SD: Tensor, weight_VD: Tensor, kept_id_E: Tensor, kept_offset_S: Tensor, temperature: float
) -> Tensor:
    """Entropy of the policy over each kept set, in nats. For logging: carries no gradient.

        H = log sum_v exp(l_v) - sum_v pi~(v) l_v,   v in S_t,   l_v = h_t . W[v] / temperature

    Returns:
        [S] float32; exactly 0 where one id was kept.

    Raises:
        ValueError: a position kept no id.
    """
    count_S = kept_offset_S.diff()
    if (count_S < 1).any():
        raise ValueError("a position kept no id: refuse such a segment when it is recorded")
    row_E = torch.repeat_interleave(torch.arange(len(count_S), device=count_S.device), count_S)
    logit_E = (hidden_SD[row_E] * weight_VD[kept_id_E]).sum(-1).float() / temperature
    top_S = torch.full((len(count_S),), float("-inf"), device=logit_E.device)
    top_S = top_S.scatter_reduce(0, row_E, logit_E, "amax")
    logit_E = logit_E - top_S[row_E]
    sum_S = torch.zeros_like(top_S).index_add(0, row_E, logit_E.exp())
    return sum_S.log() - torch.zeros_like(top_S).index_add(0, row_E, logit_E.exp() * logit_E) / sum_S


def full_logp(hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token under the whole vocabulary at the given temperature.

        log pi(y) = l_y - log sum_v exp(l_v),   l_v = h_t . W[v] / temperature

    At most LOGITS_AT_ONCE logits exist at a time, in the backward pass too: larger inputs are recomputed in parts.

    Returns:
        [S] float32.
    """
    rows = max(1, LOGITS_AT_ONCE // len(weight_VD))
    if len(token_S) <= rows:
        return _full_logp(hidden_SD, weight_VD, token_S, temperature)
    parts = [
        checkpoint(_full_logp, hidden, weight_VD, token, temperature, use_reentrant=False, preserve_rng_state=False)
        for hidden, token in zip(hidden_SD.split(rows), token_S.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _full_logp(hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, temperature: float) -> Tensor:
    logit_SV = F.linear(hidden_SD, weight_VD).float() / temperature
    return -F.cross_entropy(logit_SV, token_S, reduction="none")


@torch.no_grad()
def full_entropy(hidden_SD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    """Entropy of the policy over the whole vocabulary, in nats. For logging: carries no gradient.

    Returns:
        [S] float32.
    """
    rows = max(1, LOGITS_AT_ONCE // len(weight_VD))
    return torch.cat([_full_entropy(hidden, weight_VD, temperature) for hidden in hidden_SD.split(rows)])


def _full_entropy(hidden_SD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logp_SV = (F.linear(hidden_SD, weight_VD).float() / temperature).log_softmax(-1)
    return -(logp_SV.exp() * logp_SV).sum(-1)


def full_kl(
    hidden_SD: Tensor, ref_hidden_SD: Tensor, weight_VD: Tensor, ref_weight_VD: Tensor, temperature: float
) -> Tensor:
    """KL(pi || pi_ref) of each position, exact, over the whole vocabulary: estimators.full_kl from hidden states.

        sum_v pi(v) log(pi(v) / pi_ref(v)),   pi = softmax(h_t . W / temperature)

    The reference carries no gradient. Logits exist as in full_logp, twice as many.

    Returns:
        [S] float32, in nats.
    """
    rows = max(1, LOGITS_AT_ONCE // len(weight_VD))
    ref_hidden_SD, ref_weight_VD = ref_hidden_SD.detach(), ref_weight_VD.detach()
    parts = [
        checkpoint(
            _full_kl, hidden, ref, weight_VD, ref_weight_VD, temperature, use_reentrant=False, preserve_rng_state=False
        )
        for hidden, ref in zip(hidden_SD.split(rows), ref_hidden_SD.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _full_kl(
    hidden_SD: Tensor, ref_hidden_SD: Tensor, weight_VD: Tensor, ref_weight_VD: Tensor, temperature: float
) -> Tensor:
    logp_SV = (F.linear(hidden_SD, weight_VD).float() / temperature).log_softmax(-1)
    ref_logp_SV = (F.linear(ref_hidden_SD, ref_weight_VD).float() / temperature).log_softmax(-1)
    return (logp_SV.exp() * (logp_SV - ref_logp_SV)).sum(-1)


def rotate_halves(q_NHD: Tensor, k_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE of queries and keys that pairs element i with i + R, R half the head's width.

        out[i] = x[i] cos - x[i + R] sin,   out[i + R] = x[i + R] cos + x[i] sin

    [Su et al., RoFormer, 2021].

    Returns:
        Two tensors of the inputs' shapes.
    """
    cos, sin = cos_NR[:, None], sin_NR[:, None]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    return rotated(q_NHD), rotated(k_NHD)


def normed_rotation(
    q_NHD: Tensor, k_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """rotate_halves behind an RMSNorm of each head, as Qwen3 has it.

    Returns:
        Two tensors of the inputs' shapes.
    """
    q_NHD = F.rms_norm(q_NHD, q_weight_D.shape, q_weight_D, eps)
    k_NHD = F.rms_norm(k_NHD, k_weight_D.shape, k_weight_D, eps)
    return rotate_halves(q_NHD, k_NHD, cos_NR, sin_NR)


def swiglu(gate_up_N2W: Tensor) -> Tensor:
    """silu(gate) * up, where a row holds gate and then up.

    Returns:
        [N, W].
    """
    gate_NW, up_NW = gate_up_N2W.chunk(2, -1)
    return F.silu(gate_NW) * up_NW


def add_rms_norm(x_ND: Tensor, y_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """s = x + y, and RMSNorm(s) = weight * s / sqrt(mean(s^2) + eps).

    Returns:
        s and its norm, both [N, D].
    """
    sum_ND = x_ND + y_ND
    return sum_ND, F.rms_norm(sum_ND, weight_D.shape, weight_D, eps)
