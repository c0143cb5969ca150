"""New weights for a running engine, as vLLM takes them: the receiving end of weights.py."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from trimtab.rollout.engine.dsa.model import DsaForCausalLM
from trimtab.rollout.engine.weights import Handle, Layout, Named, one_by_one, views

BACKEND = "trimtab"
DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""vLLM's models that load into place on a GPU: others are loaded anew, layer by layer, which takes longer."""


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing to set up: everything comes with the update."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """A chunk of weights by the names transformers gives them: tensors, or a layout of a buffer on this GPU."""

    weights: list[Named] = field(default_factory=list)
    layout: Layout | None = None
    handle: Handle = ()


class Transfer(WeightTransferEngine[NoInit, Update]):
    """vLLM's side of an update. Models that hold their weights as they came take them in place; the others load anew,
    layer by layer, into the memory they have."""

    init_info_cls = NoInit
    update_info_cls = Update

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._importer = PackedBufferImporter()

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        if loads_in_place(self.model):
            return
        if not torch.cuda.is_available():
            forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        weights = update_info.weights
        if update_info.layout is not None:
            weights = views(self._mapped(update_info.handle), update_info.layout)
            if not loads_in_place(self.model):  # which keeps what came until a layer is complete
                weights = [(name, weight.clone()) for name, weight in weights]
        stacked = isinstance(self.model, DsaForCausalLM)
        self.model.load_weights(weights if stacked else one_by_one(weights))

    def _mapped(self, handle: Handle) -> Tensor:
        mine = list(handle)
        mine[6] = self.device.index
        return self._importer.rebuild(mine)

    def finish_weight_update(self) -> None:
        if not loads_in_place(self.model):
            finalize_layerwise_reload(self.model, self.model_config)
        self._importer.close()

    def shutdown(self) -> None:
        self._importer.close()


def loads_in_place(model: nn.Module) -> bool:
    """Whether a model computes with its parameters as they were loaded. On a CPU, and where there are experts or latent
    attention, vLLM's own derive others from them."""
    return isinstance(model, DsaForCausalLM) or (torch.cuda.is_available() and type(model).__name__ in DENSE)


def _expert_kernel(module: nn.Module) -> bool:
    return hasattr(getattr(module, "quant_method", None), "moe_kernel")


def forget_expert_kernels(model: nn.Module) -> None:
    """Make the experts of a CPU pack the weights that come.

    With a kernel in place they take the update for one that keeps its layout, skip the packing, and are silently wrong.
    """
    for module in model.modules():
        if _expert_kernel(module):
            method: Any = module.quant_method
            method.moe_kernel = None


def register() -> None:
    """Make the backend known to vLLM; once is enough, more does no harm."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, Transfer)
