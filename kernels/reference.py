"""What each kernel must compute, in plain, differentiable PyTorch: the only spec, and the CPU path.

Shape suffixes: T = query tokens, M = key tokens, H = heads, D = head width, C = width of a cached row,
V = value width or vocabulary, K = selected keys, S = sampled tokens, E = kept ids of all S. Leading batch
dimensions, written "...", are allowed where stated.
"""

import torch
from torch import Tensor


def index_scores(q_THD: Tensor, k_MD: Tensor, w_TH: Tensor, visible_TM: Tensor) -> Tensor:
    """Lightning-indexer scores, -inf where the key is not visible.

        I[t, s] = sum_h w[t, h] * relu(q[t, h] . k[s])

    [DeepSeek-V3.2-Exp, eq. 1]. Leading batch dimensions are allowed. w carries every scale (H^-1/2 * D^-1/2).

    Returns:
        [..., T, M] float32.
    """
    score_THM = torch.einsum("...thd,...md->...thm", q_THD.float(), k_MD.float()).relu()
    score_TM = torch.einsum("...thm,...th->...tm", score_THM, w_TH.float())
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


def selected_ids(selected_TM: Tensor, k: int) -> Tensor:
    """Positions of the selected keys, ascending, padded with -1.

    Returns:
        [..., T, min(k, M)] int64.
    """
    M = selected_TM.shape[-1]
    position_M = torch.arange(M, device=selected_TM.device)
    ids_TK = torch.where(selected_TM, position_M, M).sort(-1).values[..., : min(k, M)]
    return ids_TK.masked_fill(ids_TK == M, -1)


def sparse_mla(q_THC: Tensor, kv_MC: Tensor, ids_TK: Tensor, value_dim: int, scale: float) -> tuple[Tensor, Tensor]:
    """Absorbed multi-query attention over selected rows: keys are whole rows, values their first value_dim.

    [DeepSeek-V3.2-Exp, section 2]. ids of -1 are unused and never read. A query without keys gives O = 0 and
    lse = -inf. Leading batch dimensions are allowed.

    Returns:
        O [..., T, H, value_dim] in q's dtype, lse [..., T, H] float32 (natural logarithm).
    """
    used_TK = ids_TK >= 0
    batch = ids_TK.shape[:-2]
    flat_TK = ids_TK.clamp(min=0).flatten(-2)
    rows = kv_MC.gather(-2, flat_TK[..., None].expand(*flat_TK.shape, kv_MC.shape[-1]))
    row_TKC = rows.unflatten(-2, ids_TK.shape[len(batch) :])
    score_THK = torch.einsum("...thc,...tkc->...thk", q_THC, row_TKC).float() * scale
    score_THK = score_THK.masked_fill(~used_TK[..., None, :], float("-inf"))
    lse_TH = score_THK.logsumexp(-1)
    prob_THK = (score_THK - lse_TH.masked_fill(lse_TH == float("-inf"), 0.0)[..., None]).exp()
    out_THV = torch.einsum("...thk,...tkv->...thv", prob_THK.to(q_THC.dtype), row_TKC[..., :value_dim])
    return out_THV, lse_TH


def masked_mha(q_THD: Tensor, k_MHD: Tensor, v_MHV: Tensor, selected_TM: Tensor, scale: float) -> Tensor:
    """Multi-head attention in which a query sees its selected keys only. Leading batch dimensions are allowed.

    Returns:
        [..., T, H, V] in q's dtype; zero for a query without keys.
    """
    score_HTM = torch.einsum("...thd,...mhd->...htm", q_THD, k_MHD).float() * scale
    score_HTM = score_HTM.masked_fill(~selected_TM[..., None, :, :], float("-inf"))
    prob_HTM = score_HTM.softmax(-1).nan_to_num(0.0) if not selected_TM.any(-1).all() else score_HTM.softmax(-1)
    return torch.einsum("...htm,...mhv->...thv", prob_HTM.to(v_MHV.dtype), v_MHV)


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
        ValueError: a sampled token is not among its kept ids.
    """
    count_S = kept_offset_S.diff()
    row_E = torch.repeat_interleave(torch.arange(len(token_S), device=token_S.device), count_S)
    is_token_E = kept_id_E == token_S[row_E]
    if int(is_token_E.sum()) != len(token_S):
        raise ValueError(f"{len(token_S) - int(is_token_E.sum())} of {len(token_S)} sampled tokens are outside their kept set")
    logit_E = (hidden_SD[row_E] * weight_VD[kept_id_E]).sum(-1).float() / temperature
    top_S = torch.full_like(hidden_SD[:, 0], float("-inf"), dtype=torch.float32)
    top_S = top_S.scatter_reduce(0, row_E, logit_E.detach(), "amax")
    sum_S = torch.zeros_like(top_S).index_add(0, row_E, (logit_E - top_S[row_E]).exp())
    return logit_E[is_token_E] - top_S - sum_S.log()
