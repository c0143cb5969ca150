"""Shapes of models that start from nothing: (vocab_size, bos_id, eos_id) -> transformers' configuration."""

from transformers import DeepseekV3Config, DeepseekV32Config


def quickstart_policy(vocab_size: int, bos_id: int, eos_id: int) -> DeepseekV32Config:
    """DeepSeek-V3.2 in small: MLA, DSA that is sparse beyond 24 keys, grouped experts; about 2 M parameters."""
    return DeepseekV32Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=24,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
        max_position_embeddings=2048,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        tie_word_embeddings=False,
    )


def quickstart_dense(vocab_size: int, bos_id: int, eos_id: int) -> DeepseekV3Config:
    """The quickstart's policy before its conversion: latent attention to all keys, the same experts."""
    sparse = quickstart_policy(vocab_size, bos_id, eos_id).to_dict()
    left_out = ("architectures", "model_type", "transformers_version")
    kept = {key: value for key, value in sparse.items() if not key.startswith("index_") and key not in left_out}
    return DeepseekV3Config(**kept, architectures=["DeepseekV3ForCausalLM"], rope_interleave=True)
