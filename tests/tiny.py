"""Checkpoints small enough to make within a test: random weights, real architectures."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trimtab.grpo.policy.families import architecture
from trimtab.rollout.formats.chat import BOS, EOS, MARKUP, SPECIAL_TOKENS

CORPUS = (
    "What is 12 + 35? The sum of apple and pear is 47. Write a note to Anna about the river.",
    "Greet her. Mention the boat. End with thanks. yes no get put calculate key value",
    "请用中文思考 答案是 谢谢",
)


def tiny_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; the chat format's special tokens and markup are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(MARKUP),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in MARKUP])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2, "head_dim": 32}
LATENT: dict[str, Any] = SMALL | {
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
}
INDEXED: dict[str, Any] = LATENT | {
    "qk_nope_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 16,
}
TINY: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": LATENT | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    "DeepseekV3ForCausalLM": LATENT,
    "DeepseekV32ForCausalLM": INDEXED,
    "GlmMoeDsaForCausalLM": INDEXED | {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5},
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED | {"sliding_window": None},
    "Qwen2ForCausalLM": {name: value for name, value in GROUPED.items() if name != "head_dim"} | {"hidden_size": 128},
    "Qwen3ForCausalLM": GROUPED | {"tie_word_embeddings": True},
    "Qwen3MoeForCausalLM": GROUPED
    | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}
"""Every family with every feature on, at sizes that vLLM takes on a CPU."""


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of TINY in fp32, with norms, biases and router biases away from their trivial start."""
    torch.manual_seed(seed)
    model_class: Any = architecture(name).model
    model = model_class(model_class.config_class(**(TINY[name] | overrides))).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in key or key.endswith("bias"):
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def save_tiny(path: Path | str, name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Write a checkpoint of tiny_model with its tokenizer to path and return the model."""
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(name, seed, **(ids | overrides))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def tiny_deepseek_config(**overrides: Any) -> DeepseekV32Config:
    """DeepSeek-V3.2 with every feature on: MLA, indexer with top 16, one dense layer, grouped routing with bias."""
    return DeepseekV32Config(**(TINY["DeepseekV32ForCausalLM"] | overrides))


def tiny_deepseek(seed: int = 0, **overrides: Any) -> DeepseekV32ForCausalLM:
    """The model of tiny_deepseek_config in fp32, with norms and router bias away from their trivial start."""
    torch.manual_seed(seed)
    model = DeepseekV32ForCausalLM(tiny_deepseek_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def save_tiny_deepseek(path: Path | str, seed: int = 0, **overrides: Any) -> DeepseekV32ForCausalLM:
    """Write a checkpoint with its tokenizer to path and return the model."""
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_deepseek(seed, **(ids | overrides))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model
