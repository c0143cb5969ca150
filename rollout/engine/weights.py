"""New weights for a running engine: tensors of this host's memory, copied into the model in place."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from trimtab.rollout.engine.dsa_model import DsaForCausalLM

BACKEND = "trimtab"


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing to set up: the tensors come with the update."""


@dataclass
class TensorUpdate(WeightTransferUpdateInfo):
    """Weights by the names transformers gives them."""

    weights: list[tuple[str, Tensor]] = field(default_factory=list)


class TensorTransfer(WeightTransferEngine[NoInit, TensorUpdate]):
    """vLLM's side of an update. Our model takes weights in place; vLLM's own have repacked theirs and load anew."""

    init_info_cls = NoInit
    update_info_cls = TensorUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        if isinstance(self.model, DsaForCausalLM):
            return
        if not torch.cuda.is_available():
            forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: TensorUpdate) -> None:
        in_place = isinstance(self.model, DsaForCausalLM)
        self.model.load_weights(update_info.weights if in_place else one_by_one(update_info.weights))

    def finish_weight_update(self) -> None:
        if not isinstance(self.model, DsaForCausalLM):
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def forget_expert_kernels(model: nn.Module) -> None:
    """Make the experts of a CPU pack the weights that come.

    With a kernel in place they take the update for one that keeps its layout, skip the packing, and are silently wrong.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def one_by_one(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights by a checkpoint's names: a trainer's stacked experts become one weight an expert."""
    for name, weight in weights:
        before, _, projection = name.partition(".experts.")
        if projection == "gate_up_proj":
            for i, (gate, up) in enumerate(one.chunk(2) for one in weight):
                yield f"{before}.experts.{i}.gate_proj.weight", gate
                yield f"{before}.experts.{i}.up_proj.weight", up
        elif projection == "down_proj":
            yield from ((f"{before}.experts.{i}.down_proj.weight", one) for i, one in enumerate(weight))
        else:
            yield name, weight


def register() -> None:
    """Make the backend known to vLLM; once is enough, more does no harm."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, TensorTransfer)
