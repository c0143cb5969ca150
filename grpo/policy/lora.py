"""Low-rank adapters by peft on a policy: the base rests frozen, and what learns is small."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab.grpo.policy.families import architecture
from trimtab.grpo.policy.policy import Policy

ADAPTER = "default"
ALL = "all-linear"
FILES = ("adapter_config.json", "adapter_model.safetensors")
PREFIX = "base_model.model."  # of peft's names in a file
UNFIT = {
    "kv_b_proj": "attention reads its weight in absorbed form",
    "gate": "a router stays as it is",
    "weights_proj": "the indexer stays as it is",
    "wq_b": "the indexer stays as it is",
    "wk": "the indexer stays as it is",
}
"""Linear layers that take no adapter."""
ROUTED = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "in a policy with experts, peft means the experts by it")
"""... of a policy with experts, which are one tensor for all and take none: its attention alone is adapted."""


def adapt(policy: Policy, *, rank: int, alpha: float, targets: Sequence[str], seed: int = 0) -> Policy:
    """Freeze a policy and give the linear layers that targets name an adapter, W + alpha / rank * B A, in fp32.

    [Hu et al., LoRA, 2021]. B starts at 0, so the policy is at first what it was.

    Args:
        targets: last parts of module names such as q_proj, or "all-linear". Embeddings and head are never adapted.

    Raises:
        ValueError: a rank below 1; a target that matches nothing, or a module that takes no adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise ValueError(f"lora.rank must be at least 1, got {rank}")
    chosen = resolve(policy, targets)
    scale: Any = alpha  # peft says int and takes any number
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=chosen)
    policy.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, policy.model)
    return policy


def check_targets(config: Mapping[str, Any], targets: Sequence[str]) -> None:
    """Find out from a config.json alone, on the meta device, whether `adapt` will take these targets.

    Raises:
        ValueError: it will not, or peft is not installed.
    """
    if find_spec("peft") is None:
        raise ValueError("lora.rank asks for adapters, which need the package peft: pip install 'trimtab[lora]'")
    model_class: Any = architecture(config["architectures"][0]).model
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(dict(config)))
    resolve(Policy(model), targets)


def resolve(policy: Policy, targets: Sequence[str]) -> list[str]:
    """The last parts of the names of the modules to adapt. Raises what adapt does."""
    layers: nn.Module = policy.model.model.layers
    names = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    unfit = UNFIT | (ROUTED if policy.moe_layers else {})
    fit = sorted(names - unfit.keys())
    chosen = [name for target in targets for name in (fit if target == ALL else [target])]
    for name in chosen:
        if name in unfit and name in names:
            raise ValueError(f"lora.targets names {name}, which takes no adapter ({unfit[name]}); take from {fit}")
        if name not in fit:
            raise ValueError(f"lora.targets names {name!r}, and no linear layer is called that; take from {fit}")
    if not chosen:
        raise ValueError(f"lora.targets is empty; take from {fit}, or {ALL}")
    return sorted(set(chosen))


def is_adapted(module: nn.Module) -> bool:
    """Whether this module is a linear layer with an adapter."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def adapters(policy: Policy) -> list[nn.Module]:
    return [module for module in policy.modules() if is_adapted(module)]


def merged(module: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of an adapted layer with the adapter in them: multiplied and added in fp32, rounded once."""
    m: Any = module
    base, a_RD, b_FR = m.base_layer, m.lora_A[ADAPTER].weight, m.lora_B[ADAPTER].weight
    weight_FD = base.weight.float() + m.scaling[ADAPTER] * (b_FR.float() @ a_RD.float())
    return {"weight": weight_FD.to(base.weight.dtype), **({} if base.bias is None else {"bias": base.bias})}


@contextmanager
def without_adapters(policy: Policy) -> Iterator[None]:
    """The base inside: what the policy was before it learnt."""
    modules: list[Any] = adapters(policy)
    for module in modules:
        module._disable_adapters = (
            True  # enable_adapters would also touch requires_grad, which a sharded policy is past
        )
    try:
        yield
    finally:
        for module in modules:
            module._disable_adapters = False


def save_adapter(policy: Policy, weights: dict[str, Tensor], path: Path) -> None:
    """Write an adapter that peft loads on the base model.

    Args:
        weights: the adapter's, under the policy's names.
    """
    policy.model.peft_config[ADAPTER].save_pretrained(path)
    save_file(
        {PREFIX + name.replace(f".{ADAPTER}.", "."): w.contiguous() for name, w in weights.items()}, path / FILES[1]
    )


def load_adapter(policy: Policy, path: Path) -> None:
    """Read into an adapted policy, before it is sharded, what `save_adapter` wrote.

    Raises:
        ValueError: no adapter there, or one of other layers or another rank.
    """
    if not (path / FILES[1]).is_file():
        raise ValueError(f"{path} holds no adapter: it needs {' and '.join(FILES)}")
    found = {name.removeprefix(PREFIX): weight for name, weight in load_file(path / FILES[1]).items()}
    own = {name: weight for name, weight in policy.model.named_parameters() if ".lora_" in name}
    expected = {name.replace(f".{ADAPTER}.", "."): weight for name, weight in own.items()}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected or found[name].shape != expected[name].shape:
            raise ValueError(f"the adapter at {path} does not fit lora.rank and lora.targets: it differs at {name}")
        expected[name].data.copy_(found[name])
