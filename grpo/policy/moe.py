"""Mixture of experts with Keep Routing: the experts are an argument, the gate weights stay live.

The functions run over transformers' modules, which hold the parameters. Shape suffixes: N = tokens, D = hidden
width, E = experts, K = experts a token, I = expert width, R = N * K rows sorted by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def top_experts(score_NE: Tensor, k: int) -> Tensor:
    """Ids of the k best experts of each token: the choice of Qwen3-MoE.

    Returns:
        [N, K] int64.
    """
    return score_NE.topk(k, dim=-1).indices


def top_experts_in_groups(score_NE: Tensor, bias_E: Tensor, k: int, *, groups: int, kept_groups: int) -> Tensor:
    """Ids of the k best experts of each token within its best groups: the choice of DeepSeek-V3.

    The load-balancing bias counts for the choice only. A group is worth the sum of its two best experts.
    [DeepSeek-V3, section 2.1.2].

    Returns:
        [N, K] int64.
    """
    choice_NGE = (score_NE + bias_E).unflatten(-1, (groups, -1))
    best_NG = choice_NGE.topk(2, dim=-1).values.sum(-1).topk(kept_groups, dim=-1).indices
    kept_NG = torch.zeros(choice_NGE.shape[:-1], dtype=torch.bool, device=score_NE.device).scatter(-1, best_NG, True)
    return top_experts(choice_NGE.masked_fill(~kept_NG[..., None], float("-inf")).flatten(-2), k)


def gate_weights(score_NE: Tensor, ids_NK: Tensor, *, normalise: bool, scale: float = 1.0) -> Tensor:
    """Weights of the given experts from the live scores; the router learns through them.

        g[n, e] = scale * score[n, e] / sum_{e' in ids[n]} score[n, e']          (without the divisor if not normalised)

    [DeepSeek-V3, eq. 13; DeepSeek-V3.2, Keep Routing].

    Returns:
        [N, K] in the scores' dtype.
    """
    weight_NK = score_NE.gather(-1, ids_NK)
    if normalise:
        weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
    return weight_NK * scale


def mix_experts(x_ND: Tensor, ids_NK: Tensor, weight_NK: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor) -> Tensor:
    """The weighted sum of each token's SwiGLU experts.

    Deterministic: rows are sorted by expert and gathered back, never added atomically.

    Returns:
        [N, D] in x's dtype.
    """
    flat_R = ids_NK.flatten()
    order_R = flat_R.argsort(stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    end_E = torch.bincount(flat_R, minlength=len(down_EDI)).cumsum(0).int()
    x_RD: Tensor = _Dispatch.apply(x_ND, order_R, place_R)
    weight_R: Tensor = _Dispatch.apply(weight_NK.flatten().to(x_ND.dtype), order_R, place_R)
    gate_RI, up_RI = F.grouped_mm(x_RD, gate_up_E2ID.transpose(1, 2), offs=end_E).chunk(2, -1)
    out_RD = F.grouped_mm(F.silu(gate_RI) * up_RI * weight_R[:, None], down_EDI.transpose(1, 2), offs=end_E)
    back_RD: Tensor = _Dispatch.apply(out_RD, place_R, order_R)
    return back_RD.unflatten(0, ids_NK.shape).sum(1)


class _Dispatch(torch.autograd.Function):
    """Row r of the result is row order[r] // copies of x, where copies = len(order) / len(x).

    Its backward gathers through the inverse permutation and sums the copies: autograd's own would add rows one by
    one (slow on a CPU, not deterministic on a GPU).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order_R: Tensor, place_R: Tensor) -> Tensor:
        ctx.save_for_backward(place_R)
        ctx.copies = len(order_R) // len(x)
        return x.index_select(0, order_R // ctx.copies)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place_R,) = ctx.saved_tensors
        back = grad.index_select(0, place_R)
        return (back if ctx.copies == 1 else back.unflatten(0, (-1, ctx.copies)).sum(1)), None, None


def deepseek_moe(mlp: nn.Module, x_ND: Tensor, routes_NK: Tensor | None) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's block: sigmoid scores, group-limited choice, one shared expert.

    Returns:
        The output [N, D] and the experts used [N, K]: routes_NK, or the router's own choice.
    """
    gate: Any = mlp.gate
    score_NE = F.linear(x_ND.float(), gate.weight.float()).sigmoid()
    if routes_NK is None:
        routes_NK = top_experts_in_groups(
            score_NE.detach(),
            gate.e_score_correction_bias,
            gate.top_k,
            groups=gate.num_group,
            kept_groups=gate.topk_group,
        )
    weight_NK = gate_weights(score_NE, routes_NK, normalise=gate.norm_topk_prob, scale=gate.routed_scaling_factor)
    experts: Any = mlp.experts
    mixed_ND = mix_experts(x_ND, routes_NK, weight_NK, experts.gate_up_proj, experts.down_proj)
    shared: Any = mlp.shared_experts
    return mixed_ND + shared(x_ND), routes_NK


def qwen_moe(mlp: nn.Module, x_ND: Tensor, routes_NK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Qwen3-MoE's block: softmax scores, the best experts of all.

    Returns:
        The output [N, D] and the experts used [N, K]: routes_NK, or the router's own choice.
    """
    gate: Any = mlp.gate
    score_NE = F.linear(x_ND, gate.weight).float().softmax(-1)
    if routes_NK is None:
        routes_NK = top_experts(score_NE.detach(), gate.top_k)
    weight_NK = gate_weights(score_NE, routes_NK, normalise=gate.norm_topk_prob)
    experts: Any = mlp.experts
    return mix_experts(x_ND, routes_NK, weight_NK, experts.gate_up_proj, experts.down_proj), routes_NK
