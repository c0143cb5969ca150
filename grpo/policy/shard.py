"""Parameters over processes and in two precisions: fp32 masters that learn, copies that compute.

torch's `fully_shard` does both, with one process as with many: each layer is gathered in the compute dtype before it
runs and let go behind it, and its gradient is added up in fp32. What must not be rounded has units of its own.
Gradients are summed over processes, never averaged: divisors are the caller's.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trimtab.grpo.policy.attention import HeadWeights
from trimtab.grpo.policy.lora import is_adapted, merged
from trimtab.grpo.policy.moe import Router
from trimtab.grpo.policy.policy import Policy, PolicyLayer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compute_dtype(precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a precision; None: bf16 on a GPU, else fp32."""
    return DTYPES[precision or ("bf16" if device.type == "cuda" else "fp32")]


def shard(policy: Policy, *, dtype: torch.dtype, device: torch.device) -> Policy:
    """Move a policy in fp32 to the device so that it computes in dtype, its parameters shared out over all processes.

    One process in fp32 has nothing to share out and nothing to round: its policy stays plain.

    Raises:
        ValueError: a parameter that learns is not in fp32.
    """
    learning = ((name, weight) for name, weight in policy.named_parameters() if weight.requires_grad)
    if rounded := [name for name, weight in learning if weight.dtype != torch.float32]:
        raise ValueError(f"{rounded[0]} is to learn but is not in float32; load the policy in float32")
    policy.to(device)
    if dtype == torch.float32 and _world_size() == 1:
        return policy
    return fully_sharded(policy, mesh=process_mesh(device), dtype=dtype)


def fully_sharded(policy: Policy, *, mesh: DeviceMesh, dtype: torch.dtype) -> Policy:
    """The same policy in units of `fully_shard`: the fp32 units, each layer around them, the rest."""
    for layer in layers(policy):
        for unit in fp32_units(layer):
            _unit(unit, mesh, torch.float32)
        _unit(layer, mesh, dtype)
    _unit(policy, mesh, dtype)
    return policy


def layers(policy: Policy) -> list[PolicyLayer]:
    return list(policy.model.model.layers)


def fp32_units(layer: PolicyLayer) -> list[nn.Module]:
    """The modules of a layer that compute in fp32 whatever the rest does."""
    return [module for module in layer.modules() if isinstance(module, (Router, HeadWeights))]


def _unit(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    unit: Any = fully_shard(module, mesh=mesh, mp_policy=precision)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)  # gloo cannot sum and scale in one


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def process_mesh(device: torch.device) -> DeviceMesh:
    """All processes in a row, started as torchrun starts them, or this one alone."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if _world_size() == 1:  # alone: no address to meet at
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    return init_device_mesh(device.type, (_world_size(),))


def round_frozen(policy: Policy, dtype: torch.dtype) -> Policy:
    """Round the parameters that do not learn, but for the fp32 units'. Buffers stay."""
    exempt = {id(weight) for layer in layers(policy) for unit in fp32_units(layer) for weight in unit.parameters()}
    for weight in policy.parameters():
        if not weight.requires_grad and id(weight) not in exempt:
            weight.data = weight.data.to(dtype)
    return policy


def stream(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The weights as the policy computes with them, under transformers' names: what an engine must have.

    Parameters in their compute dtype and persistent buffers: the embedding, layer by layer, the rest. A tied head comes
    once, as the embedding. Every process must go through all of it. A tensor is whole, and good until the next one is
    asked for.
    """
    modules = dict(policy.model.named_modules())
    inner = {f"model.layers.{i}": layer for i, layer in enumerate(layers(policy))}
    outer = {name: module for name, module in modules.items() if not f"{name}.".startswith("model.layers.")}
    embedding = {name: module for name, module in outer.items() if module is policy.model.get_input_embeddings()}
    seen: set[int] = set()
    with _whole([policy]):
        yield from _tensors(embedding, seen)
        for prefix, layer in inner.items():
            with _whole(layer.modules()):
                yield from _tensors(dict(layer.named_modules(prefix=prefix)), seen)
        yield from _tensors(outer, seen)


@contextmanager
def without_gradient(policy: Policy) -> Iterator[None]:
    """For passes without gradient: they leave the outermost unit whole, which would go stale in the next step."""
    with torch.no_grad():
        yield
    if isinstance(policy, FSDPModule):
        policy.reshard()


@contextmanager
def _whole(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the parameters of units whole, as their masters are now."""
    units: list[Any] = [module for module in modules if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


@torch.no_grad()
def _tensors(modules: Mapping[str, nn.Module], seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of modules by name, none twice; an adapter is merged into what it adapts."""
    adapted = tuple(f"{name}." for name, module in modules.items() if is_adapted(module))
    for name, module in modules.items():
        if is_adapted(module):
            yield from ((f"{name}.{key}", tensor) for key, tensor in merged(module).items())
        elif not name.startswith(adapted):
            kept = {key: b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set}
            for key, tensor in {**module._parameters, **kept}.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{name}.{key}".removeprefix("."), tensor.detach()


def masters(policy: Policy) -> dict[str, Tensor]:
    """What `stream` gives, unrounded and on the CPU: for checkpoints. Every process must call it."""
    for unit in policy.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    return {name: whole(tensor) for name, tensor in _tensors(dict(policy.model.named_modules()), set())}


def whole(tensor: Tensor) -> Tensor:
    """A tensor of all processes on the CPU of each."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that the norm of all of them, over all processes, is at most max_norm. Returns the norm.

    torch.nn.utils.clip_grad_norm_ in its arithmetic, without its pass through DTensor for each parameter.
    """
    sharded: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (sharded if isinstance(parameter.grad, DTensor) else plain).append(local(parameter.grad))
    if not sharded and not plain:
        return torch.zeros(())
    norm = torch.nn.utils.get_total_norm([*sharded, *plain])
    if sharded and dist.get_world_size() > 1:
        square = torch.nn.utils.get_total_norm(sharded).square()
        dist.all_reduce(square)
        norm = (square + torch.nn.utils.get_total_norm(plain).square() if plain else square).sqrt()
    torch._foreach_mul_([*sharded, *plain], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state on the CPU, whole whatever the number of processes. Every process must call it."""
    state = optimizer.state_dict()
    moments = {
        index: {key: whole(value) if isinstance(value, Tensor) else value for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser what `optimizer_state` returned, shared out as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {key: _like(parameters[index], value) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(parameter: nn.Parameter, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value  # a count of steps
    value = value.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
