"""The architectures that an engine runs, by the name in config.json, and what vLLM must be told about each.

The list is that of grpo/policy/families.py, which trains them; tests hold the two together.
"""

from typing import Any

OURS = "TrimtabDsaForCausalLM"
"""The name under which vLLM knows our model of DeepSeek Sparse Attention."""
DSA = ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
"""What our model runs; the rest are vLLM's own."""
SUPPORTED = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    *DSA,
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
CPU_ENVIRONMENT = {"VLLM_MLA_DISABLE": "1"}
"""vLLM has latent attention for GPUs only: on a CPU it then runs it as multi-head attention."""


def options(architecture: str) -> dict[str, Any]:
    """Options of vLLM's LLM that an architecture needs.

    Our model goes by a model type of its own, since vLLM bars those it knows as MLA from prefix caching on a CPU, and
    has small blocks, since only whole ones are shared between requests. GLM's indexer pairs neighbours. A DeepSeek-V3
    that transformers wrote does not say how it routes, and vLLM would take it for a DeepSeek-V2.
    """
    if architecture in DSA:
        ours = {"architectures": [OURS], "model_type": "trimtab_dsa"}
        neighbours = architecture == "GlmMoeDsaForCausalLM"
        return {"hf_overrides": ours | {"indexer_rope_interleave": neighbours}, "block_size": 16}
    if architecture == "DeepseekV3ForCausalLM":
        routing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_router_dtype": "float32"}
        return {"hf_overrides": routing}
    if architecture == "DeepseekV2ForCausalLM":
        return {"hf_overrides": {"scoring_func": "softmax", "moe_router_dtype": "float32"}}
    return {}
