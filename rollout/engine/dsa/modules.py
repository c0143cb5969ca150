"""The parts of DeepSeek-V3.2 that need no engine: norms, rotations, feed-forwards, routing. Plain PyTorch.

Parameters bear the names transformers gives them; weights that read the same input are views of one tensor, so
one product reads them all. They hold nothing until loaded.

Shape suffixes: N = tokens, H = heads, W = latent and rope width of a cached row, E = experts, K = experts a
token, B = sequences, T = their queries (padded), L = their keys (padded).
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _kernels() -> ModuleType:
    """The same computations on a GPU, each in one launch. A machine without a GPU need not have Triton."""
    from trimtab.kernels import decoder

    return decoder


class Weight(nn.Module):
    """A parameter called weight, which may be a view of a stacked one."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Norm(Weight):
    """Root-mean-square norm."""

    def __init__(self, width: int, eps: float):
        super().__init__(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def after(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x + delta, its norm, and the norm again in float32."""
        if x.is_cuda:
            return _kernels().add_norm(x, delta, self.weight, self.eps)
        x = x if delta is None else x + delta
        normed = self(x)
        return x, normed, normed.float()


class Mlp(nn.Module):
    """The gated unit of a dense layer, and of the shared expert."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self._gate_up = torch.empty(2 * inner, width)
        gate, up = self._gate_up.chunk(2)
        self.gate_proj, self.up_proj = Weight(gate), Weight(up)
        self.down_proj = Weight(torch.empty(width, inner))

    def forward(self, x: Tensor, _: Tensor | None = None) -> Tensor:
        """x [N, hidden]; what a routed layer reads beside it is ignored."""
        gate_up = F.linear(x, self._gate_up)
        if x.is_cuda:
            from trimtab.kernels.swiglu import swiglu

            return F.linear(swiglu(gate_up), self.down_proj.weight)
        gate, up = gate_up.chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down_proj.weight)


def rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE on neighbouring channels (x0, x1), (x2, x3), ..., which is the convention of MLA's queries and keys."""
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE on channels half a rope width apart, which is the convention of the indexer; channels behind stay."""
    half = turn.shape[-1]
    pairs = torch.complex(x[..., :half].float(), x[..., half : 2 * half].float()) * turn
    return torch.cat([pairs.real.to(x.dtype), pairs.imag.to(x.dtype), x[..., 2 * half :]], -1)


def masked_mqa(q_BTHW: Tensor, row_BLW: Tensor, mask_BTL: Tensor, value_dim: int, scale: float) -> Tensor:
    """sparse_mla over all rows with a mask of the selected ones: the same sum in another order.

    Returns:
        [B, T, H, value_dim].
    """
    T, H = q_BTHW.shape[1:3]
    score = torch.bmm(q_BTHW.flatten(1, 2), row_BLW.transpose(1, 2)).unflatten(1, (T, H)).float() * scale
    probability = score.masked_fill_(~mask_BTL[:, :, None], float("-inf")).softmax(-1).to(q_BTHW.dtype)
    return torch.bmm(probability.flatten(1, 2), row_BLW[..., :value_dim]).unflatten(1, (T, H))


class Router(nn.Module):
    """Grouped sigmoid routing; the bias takes part in the choice only."""

    def __init__(self, config: Any):
        super().__init__()
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)  # as it is multiplied
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        self.groups, self.groups_kept = config.n_group, config.topk_group
        self.K, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.scale = config.routed_scaling_factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [N, K] and their gate weights [N, K] float32, from x [N, hidden] float32."""
        logit = F.linear(x, self.weight)
        if x.is_cuda:
            return _kernels().route(
                logit, self.e_score_correction_bias, self.K, groups=self.groups, groups_kept=self.groups_kept,
                normalise=self.normalise, scale=self.scale,
            )  # fmt: skip
        score = logit.sigmoid()
        choice = score + self.e_score_correction_bias
        if self.groups_kept < self.groups:
            grouped = choice.unflatten(-1, (self.groups, -1))
            best = grouped.topk(2, -1).values.sum(-1).topk(self.groups_kept, -1).indices
            out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
            choice = grouped.masked_fill(out[..., None], float("-inf")).flatten(1)
        ids = choice.topk(self.K, -1).indices
        gate = score.gather(1, ids)
        if self.normalise:
            gate = gate / (gate.sum(-1, keepdim=True) + 1e-20)
        return ids, gate * self.scale


class Experts(nn.Module):
    """Routed experts, each on the tokens sent to it."""

    def __init__(self, config: Any):
        super().__init__()
        E, inner, width = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, width), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(E, width, inner), requires_grad=False)

    def forward(self, x: Tensor, ids_NK: Tensor, gate_NK: Tensor) -> Tensor:
        K = ids_NK.shape[1]
        expert, order = ids_NK.flatten().sort(stable=True)
        last = torch.arange(len(self.down_proj), dtype=expert.dtype, device=x.device)
        ends = torch.searchsorted(expert, last, right=True).int()
        gate, up = F.grouped_mm(x[order // K], self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
        sorted_out = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        out = torch.empty_like(sorted_out)
        out[order] = sorted_out
        return torch.bmm(gate_NK[:, None].to(x.dtype), out.unflatten(0, (-1, K)))[:, 0]


class Moe(nn.Module):
    """Routed and shared experts. vLLM finds layer_id and capture_fn and records the routes through them."""

    def __init__(self, config: Any, layer_id: int, experts: Experts):
        super().__init__()
        self.layer_id = layer_id
        self.capture_fn: Callable[[Tensor], None] | None = None
        self.gate, self.experts = Router(config), experts
        self.shared_experts = Mlp(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: Tensor, wide: Tensor) -> Tensor:
        """x [N, hidden]; wide is x in float32, which the router reads."""
        ids, gate = self.gate(wide)
        if self.capture_fn is not None:
            self.capture_fn(ids)
        return self.experts(x, ids, gate) + self.shared_experts(x)
