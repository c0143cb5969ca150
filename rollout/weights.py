"""New weights for a running engine: tensors of this host's memory, copied into the model in place."""

from dataclasses import dataclass, field

from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "trimtab"


@dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing to set up: the tensors come with the update."""


@dataclass
class TensorUpdate(WeightTransferUpdateInfo):
    """Weights by the names transformers gives them."""

    weights: list[tuple[str, Tensor]] = field(default_factory=list)


class TensorTransfer(WeightTransferEngine[NoInit, TensorUpdate]):
    """vLLM's side of an update."""

    init_info_cls = NoInit
    update_info_cls = TensorUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: TensorUpdate) -> None:
        self.model.load_weights(update_info.weights)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def register() -> None:
    """Make the backend known to vLLM; once is enough, more does no harm."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, TensorTransfer)
