"""Muon: momentum whose matrices are made orthogonal, in fp32.

torch.optim.Muon computes in bf16, which a CPU without bf16 units runs many times slower than fp32.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(update_BMN: Tensor) -> Tensor:
    """The nearest matrices with all singular values about 1 (between 0.7 and 1.2).

        X <- a X + (b A + c A A) X,   A = X X^T,   from X = G / |G|

    [Jordan et al., Muon, 2024: quintic Newton-Schulz iteration].

    Returns:
        [B, M, N].
    """
    tall = update_BMN.shape[-2] > update_BMN.shape[-1]
    x = update_BMN.mT if tall else update_BMN
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, at the size of an AdamW step (0.2 per entry), with decoupled weight decay.

    For matrices only; matrices of one shape are computed together. A matrix that is shared out over processes is made
    whole for its step, on each of them.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonalise(torch.stack([_whole(self._momentum(p, group["momentum"])) for p in parameters]))
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(_as(parameter, update), alpha=-size)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None and parameter.ndim == 2
        buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, shared out as the parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
