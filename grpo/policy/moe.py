"""Mixture of experts with Keep Routing: the experts are an argument, the gate weights stay live.

The functions run over transformers' modules, which hold the parameters. Shape suffixes: N = tokens, D = hidden
width, E = experts, K = experts a token, I = expert width, R = N * K rows sorted by expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.kernels import reference


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
    return _top_experts_of(choice_NGE, choice_NGE.topk(2, dim=-1).values.sum(-1), k, kept_groups)


def top_experts_in_best_groups(score_NE: Tensor, k: int, *, groups: int, kept_groups: int) -> Tensor:
    """Ids of the k best experts of each token within its best groups: the choice of DeepSeek-V2.

    A group is worth its best expert. [DeepSeek-V2, section 2.2.2].

    Returns:
        [N, K] int64.
    """
    score_NGE = score_NE.unflatten(-1, (groups, -1))
    return _top_experts_of(score_NGE, score_NGE.amax(-1), k, kept_groups)


def _top_experts_of(choice_NGE: Tensor, worth_NG: Tensor, k: int, kept_groups: int) -> Tensor:
    best_NG = worth_NG.topk(kept_groups, dim=-1).indices
    kept_NG = torch.zeros_like(worth_NG, dtype=torch.bool).scatter(-1, best_NG, True)
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
    sorted_R, order_R = ids_NK.flatten().sort(stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    expert_E = torch.arange(len(down_EDI), device=sorted_R.device)
    end_E = torch.searchsorted(sorted_R, expert_E, right=True).int()  # bincount would wait for the GPU
    x_RD: Tensor = _Dispatch.apply(x_ND, order_R, place_R)
    weight_R: Tensor = _Dispatch.apply(weight_NK.flatten().to(x_ND.dtype), order_R, place_R)
    gate_up_R2I = F.grouped_mm(x_RD, gate_up_E2ID.transpose(1, 2), offs=end_E)
    out_RD = F.grouped_mm(_swiglu(gate_up_R2I) * weight_R[:, None], down_EDI.transpose(1, 2), offs=end_E)
    back_RD: Tensor = _Dispatch.apply(out_RD, place_R, order_R)
    return back_RD.unflatten(0, ids_NK.shape).sum(1)


def _swiglu(gate_up_R2I: Tensor) -> Tensor:
    if gate_up_R2I.is_cuda:
        from trimtab.kernels.swiglu import swiglu

        return swiglu(gate_up_R2I)
    return reference.swiglu(gate_up_R2I)


def gated_mlp(mlp: nn.Module, x_ND: Tensor) -> Tensor:
    """transformers' SwiGLU block; on a GPU its activation is one launch that keeps nothing but its inputs."""
    m: Any = mlp
    if not x_ND.is_cuda:
        return m(x_ND)
    from trimtab.kernels.swiglu import gated

    return m.down_proj(gated(m.gate_proj(x_ND), m.up_proj(x_ND)))


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


class Router(nn.Module):
    """transformers' gate with its parameters, in fp32 whatever the rest computes in. Each family has its scores, its
    choice and what becomes of the chosen scores.
    """

    def __init__(self, gate: nn.Module, config: Any) -> None:
        super().__init__()
        self.weight: Any = gate.weight
        self.top_k: int = config.num_experts_per_tok
        self.normalise: bool = config.norm_topk_prob
        self.scale: float = getattr(config, "routed_scaling_factor", 1.0)

    def scores(self, logit_NE: Tensor) -> Tensor:
        return logit_NE.softmax(-1)

    def choose(self, score_NE: Tensor) -> Tensor:
        return top_experts(score_NE, self.top_k)

    def forward(self, x_ND: Tensor, routes_NK: Tensor | None) -> tuple[Tensor, Tensor]:
        """The experts used [N, K], which are routes_NK or the router's own choice, and their weights [N, K] fp32."""
        score_NE = self.scores(F.linear(x_ND.float(), self.weight.float()))
        ids_NK = self.choose(score_NE.detach()) if routes_NK is None else routes_NK
        return ids_NK, gate_weights(score_NE, ids_NK, normalise=self.normalise, scale=self.scale)


class DeepseekV2Router(Router):
    """Softmax scores, the best of all or of the best groups; never normalised."""

    def __init__(self, gate: nn.Module, config: Any) -> None:
        super().__init__(gate, config)
        limited = config.topk_method == "group_limited_greedy"
        self.groups: int = config.n_group if limited else 1
        self.kept_groups: int = config.topk_group if limited else 1

    def choose(self, score_NE: Tensor) -> Tensor:
        return top_experts_in_best_groups(score_NE, self.top_k, groups=self.groups, kept_groups=self.kept_groups)


class DeepseekV3Router(Router):
    """Sigmoid scores, the best of the best groups under a load-balancing bias."""

    def __init__(self, gate: nn.Module, config: Any) -> None:
        super().__init__(gate, config)
        self.groups: int = config.n_group
        self.kept_groups: int = config.topk_group
        bias_E: Any = gate.e_score_correction_bias
        self.register_buffer("e_score_correction_bias", bias_E)

    def scores(self, logit_NE: Tensor) -> Tensor:
        return logit_NE.sigmoid()

    def choose(self, score_NE: Tensor) -> Tensor:
        bias_E: Any = self.e_score_correction_bias
        return top_experts_in_groups(score_NE, bias_E, self.top_k, groups=self.groups, kept_groups=self.kept_groups)


def routed_mlp(mlp: nn.Module, x_ND: Tensor, routes_NK: Tensor | None) -> tuple[Tensor, Tensor]:
    """A block of routed experts, and of the shared ones that some families add.

    Returns:
        The output [N, D] and the experts used [N, K]: routes_NK, or the router's own choice.
    """
    m: Any = mlp
    ids_NK, weight_NK = m.gate(x_ND, routes_NK)
    mixed_ND = mix_experts(x_ND, ids_NK, weight_NK, m.experts.gate_up_proj, m.experts.down_proj)
    return mixed_ND + gated_mlp(m.shared_experts, x_ND) if hasattr(m, "shared_experts") else mixed_ND, ids_NK
