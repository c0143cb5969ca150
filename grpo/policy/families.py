"""The supported families of models: what differs between them, and what of a configuration none of them can do.

A new family is an entry of ARCHITECTURES, here and in the engine's list, and a row of the tables in
tests/test_policy_families.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import (
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    DeepseekV32ForCausalLM,
    GlmMoeDsaForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from trimtab.grpo.policy.attention import Rotate, rotate_halves, rotate_pairs
from trimtab.grpo.policy.moe import DeepseekV2Router, DeepseekV3Router, Router

Objections = Callable[[Any], Iterator[str]]
"""(config) -> what of it is not supported, a clause each, with the remedy where there is one."""

GROUPED_ROPE = ("default", "linear", "llama3", "yarn")
LATENT_ROPE = ("default", "yarn")
INDEXED_ROPE = ("default", "linear", "yarn")


def _grouped(config: Any) -> Iterator[str]:
    yield from _rope(config, GROUPED_ROPE)
    if getattr(config, "use_sliding_window", False):
        yield "use_sliding_window is true: sliding-window attention is not supported, set it to false"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        yield "layer_types names sliding_attention, which is not supported"


def _qwen3(config: Any) -> Iterator[str]:
    yield from _grouped(config)
    if config.attention_bias:
        yield "attention_bias is true, which vLLM computes without the output's bias"


def _mistral(config: Any) -> Iterator[str]:
    yield from _grouped(config)
    window, positions = config.sliding_window, config.max_position_embeddings
    if window is not None and window < positions:
        yield (
            f"sliding_window is {window}, below max_position_embeddings = {positions}: sliding-window attention is not "
            f"supported; within {window} tokens it changes nothing, so set max_position_embeddings to {window}"
        )


def _latent(config: Any) -> Iterator[str]:
    if config.attention_bias:
        yield "attention_bias is true, which latent attention does not have in the engine"
    if getattr(config, "mlp_bias", False):
        yield "mlp_bias is true, which the experts of this family do not have"


def _deepseek_dense(config: Any) -> Iterator[str]:
    yield from _latent(config)
    yield from _rope(config, LATENT_ROPE)
    if config.rms_norm_eps != 1e-6:
        yield f"rms_norm_eps is {config.rms_norm_eps}: transformers and vLLM agree on this family at 1e-6 only"


def _deepseek_v2(config: Any) -> Iterator[str]:
    yield from _deepseek_dense(config)
    if config.norm_topk_prob:
        yield "norm_topk_prob is true, which transformers ignores and vLLM does not; DeepSeek-V2 has false"
    if config.n_group is None or config.topk_group is None:
        yield "n_group or topk_group is missing: set both, to 1 where experts have no groups"
    elif config.topk_method == "greedy" and config.n_group != 1:
        yield f"topk_method is greedy with n_group = {config.n_group}: set n_group and topk_group to 1"
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        yield f"topk_method is {config.topk_method!r}; supported are greedy and group_limited_greedy"


def _deepseek_v3(config: Any) -> Iterator[str]:
    yield from _deepseek_dense(config)
    if not config.rope_interleave:
        yield "rope_interleave is false, which vLLM does not know for this family"


def _indexed(config: Any) -> Iterator[str]:
    yield from _latent(config)
    yield from _rope(config, INDEXED_ROPE)


def _glm(config: Any) -> Iterator[str]:
    yield from _indexed(config)
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        yield "indexer_types names layers that share the selection of an earlier one, which is not supported"


def _rope(config: Any, known: tuple[str, ...]) -> Iterator[str]:
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in known:
        yield f"the RoPE type {kind!r} is not supported; supported are {', '.join(known)}"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor is below 1, which this family does not have in transformers"


def _any(config: Any) -> Iterator[str]:
    if getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantised (quantization_config); dequantise them to bfloat16 first"
    if config.hidden_act != "silu":
        yield f"hidden_act is {config.hidden_act!r}; supported is silu"
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping"):
        if getattr(config, name, None):
            yield f"{name} is {getattr(config, name)}, which is not supported"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between the supported models."""

    model: type[PreTrainedModel]
    objections: Objections
    latent: bool = False
    """Multi-head latent attention; else grouped-query attention."""
    index_rotate: Rotate | None = None
    """RoPE of the indexer that selects what attention sees; None: there is none."""
    router: type[Router] | None = None
    """Of the layers that have experts."""

    @property
    def sparse(self) -> bool:
        return self.index_rotate is not None


ARCHITECTURES = {
    "DeepseekV2ForCausalLM": Architecture(DeepseekV2ForCausalLM, _deepseek_v2, latent=True, router=DeepseekV2Router),
    "DeepseekV3ForCausalLM": Architecture(DeepseekV3ForCausalLM, _deepseek_v3, latent=True, router=DeepseekV3Router),
    "DeepseekV32ForCausalLM": Architecture(
        DeepseekV32ForCausalLM, _indexed, latent=True, index_rotate=rotate_halves, router=DeepseekV3Router
    ),
    "GlmMoeDsaForCausalLM": Architecture(
        GlmMoeDsaForCausalLM, _glm, latent=True, index_rotate=rotate_pairs, router=DeepseekV3Router
    ),
    "LlamaForCausalLM": Architecture(LlamaForCausalLM, _grouped),
    "MistralForCausalLM": Architecture(MistralForCausalLM, _mistral),
    "Qwen2ForCausalLM": Architecture(Qwen2ForCausalLM, _grouped),
    "Qwen3ForCausalLM": Architecture(Qwen3ForCausalLM, _qwen3),
    "Qwen3MoeForCausalLM": Architecture(Qwen3MoeForCausalLM, _qwen3, router=Router),
}
"""By the name in config.json. Classes are named, never looked up by model type: vLLM re-maps deepseek_v32 there."""


def architecture(name: str) -> Architecture:
    """What is known of an architecture.

    Raises:
        ValueError: it is not supported.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def check_config(name: str, config: Any) -> None:
    """Refuse what of a model's configuration neither we nor the engine can do.

    Raises:
        ValueError: in one sentence, naming the architecture and the field.
    """
    for objection in (*_any(config), *architecture(name).objections(config)):
        raise ValueError(f"{name}: {objection}")
