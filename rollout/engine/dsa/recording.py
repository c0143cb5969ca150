"""The selections of the indexers, recorded as vLLM records routes: further columns of the same table.

That table has a row for every place of the cache, so what another request computed of a shared prefix is recorded too,
and it is written inside CUDA graphs. A row holds K experts and then the positions of the selected keys, in ascending
order, of each layer.
"""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe import routed_experts_capturer as capturer

from trimtab.rollout.types import POSITIONS

KEYS = "trimtab_selected_keys"
"""In vLLM's additional_config: how many selected keys a row has room for."""
SELECTS = 1 << 16
"""Added to the number of a layer: it is its selection that is recorded."""
_shape = capturer._get_routed_experts_shape


def _wider_shape(vllm_config: Any) -> tuple[int, int, int]:
    """Layers, different entries, and entries of a row."""
    keys = vllm_config.additional_config.get(KEYS, 0)
    if not keys:
        return _shape(vllm_config)
    model = vllm_config.model_config
    experts = model.get_num_experts_per_tok() if model.get_num_experts() > 0 else 0
    return model.get_total_num_hidden_layers(), POSITIONS, experts + keys


def _capture(self: Any, layer_id: int, ids: Tensor) -> None:
    """Write what the tokens of a step chose into their rows: experts in front, selected keys behind."""
    layer, width = layer_id % SELECTS, ids.shape[1]
    columns = slice(-width, None) if layer_id >= SELECTS else slice(width)
    self.device_buffer[: len(ids), layer, columns] = ids


def register() -> None:
    """Make vLLM's recording do so; one of routes alone stays as it is. Safe to repeat."""
    capturer._get_routed_experts_shape = _wider_shape
    capturer.RoutedExpertsCapturer.capture = _capture
