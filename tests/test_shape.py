"""A model's sizes from its config.json, against transformers' models without their weights."""

import json

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trimtab.grpo.cost.shape import shape_of

BASE = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
GROUPED = BASE | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
LATENT = BASE | {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
INDEXED = LATENT | {"index_n_heads": 3, "index_head_dim": 16, "index_topk": 8}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED)),
    "llama, biased, tied": (
        LlamaForCausalLM,
        LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**GROUPED, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**BASE, num_attention_heads=4, num_key_value_heads=2)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, tie_word_embeddings=True)),
    "qwen3-moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**GROUPED, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=20, mlp_only_layers=[2]),
    ),
    "deepseek-v2": (DeepseekV2ForCausalLM, DeepseekV2Config(**LATENT)),
    "deepseek-v2-lite": (DeepseekV2ForCausalLM, DeepseekV2Config(**(LATENT | {"q_lora_rank": None}))),
    "deepseek-v3": (DeepseekV3ForCausalLM, DeepseekV3Config(**LATENT, attention_bias=True)),
    "deepseek-v3.2": (DeepseekV32ForCausalLM, DeepseekV32Config(**INDEXED)),
    "glm-moe-dsa": (
        GlmMoeDsaForCausalLM,
        GlmMoeDsaConfig(**INDEXED, indexer_types=["full", "shared", "full"]),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_exactly(name, tmp_path):
    model_class, config = MODELS[name]
    with torch.device("meta"):
        model = model_class(config)
    model.config.architectures = [model_class.__name__]
    model.config.save_pretrained(tmp_path)
    shape = shape_of(json.loads((tmp_path / "config.json").read_text()))
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())


def test_a_layer_in_numbers():
    """Hidden 64, 4 query and 2 key heads of 24: 64*96 + 2*64*48 + 96*64 = 18432; MLP 3*64*96 = 18432; norms 2*64."""
    layer = shape_of(GROUPED | {"architectures": ["LlamaForCausalLM"]}).layers[0]
    assert layer.active == 18432 + 18432 and layer.parameters == 18432 + 18432 + 128


def test_active_parameters_are_those_of_one_token():
    """Qwen3-30B-A3B: 30.5 B parameters, 3.3 B active with the embedding [model card]; ours leaves out the look-up."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    shape = shape_of(config)
    assert shape.parameters == pytest.approx(30.5e9, rel=0.01)
    assert shape.active + shape.head == pytest.approx(3.35e9, rel=0.01)


def test_an_unknown_architecture_and_a_missing_size_are_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported"):
        shape_of({"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(ValueError, match="lacks 'vocab_size'"):
        shape_of({"architectures": ["LlamaForCausalLM"]})
