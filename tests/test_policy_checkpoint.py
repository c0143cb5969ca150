"""Checkpoints that cannot be used end in one sentence, before anything large is read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from trimtab.grpo.policy.checkpoint import check_checkpoint
from trimtab.grpo.policy.families import ARCHITECTURES
from trimtab.grpo.policy.policy import load_policy

MOE, LLAMA = "DeepseekV3ForCausalLM", "LlamaForCausalLM"


def _save(path: Path, name: str = LLAMA, **config: Any) -> Path:
    """A good checkpoint, then what config.json is made to say."""
    tiny_model(name).save_pretrained(path)
    return _say(path, **config)


def _say(path: Path, **config: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


def assert_refused(path: Path, sentence: str) -> None:
    for read in (check_checkpoint, load_policy):
        with pytest.raises(ValueError, match=re.escape(sentence)) as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_good_checkpoints_pass_whole_and_in_shards(name, shard, tmp_path):
    tiny_model(name).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").is_file() == (shard == "5GB")
    assert check_checkpoint(tmp_path) == name


ROPE = {"rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are DeepseekV2"),
        (LLAMA, {"architectures": []}, "architecture none is not supported"),
        (LLAMA, {"architectures": None}, "architecture none is not supported"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        (LLAMA, {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "the RoPE type 'dynamic' is not supported"),
        (LLAMA, {"rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is silu"),
        (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        (LLAMA, {"hidden_size": 128}, "with shape (384, 64), but config.json wants (384, 128)"),
        (LLAMA, {"num_hidden_layers": 2}, "9 weights that its model lacks, such as model.layers.2."),
        (LLAMA, {"num_hidden_layers": 4}, "lacks 9 weights, such as model.layers.3.input_layernorm.weight"),
        (LLAMA, {"attention_bias": True}, "lacks 12 weights, such as model.layers.0.self_attn.k_proj.bias"),
        (LLAMA, {"num_attention_heads": "four"}, "does not fit LlamaForCausalLM"),
        ("MistralForCausalLM", {"sliding_window": 128}, "set max_position_embeddings to 128"),
        ("Qwen2ForCausalLM", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias is true"),
        ("DeepseekV2ForCausalLM", {"topk_method": "greedy"}, "greedy with n_group = 4"),
        ("DeepseekV2ForCausalLM", {"topk_method": "best"}, "topk_method is 'best'"),
        ("DeepseekV2ForCausalLM", {"n_group": None}, "n_group or topk_group is missing"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob is true"),
        (MOE, {"rope_interleave": False}, "rope_interleave is false"),
        (MOE, {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
        (MOE, {"n_routed_experts": 9}, "lacks 6 weights, such as model.layers.1.mlp.experts.8.down_proj.weight"),
        (MOE, {"moe_intermediate_size": 16}, "gate_proj.weight with shape (32, 64), but config.json wants (16, 64)"),
        ("GlmMoeDsaForCausalLM", {"indexer_types": ["full", "full", "shared"]}, "share the selection"),
    ],
)
def test_settings_and_weights_that_do_not_fit_are_named(name, config, sentence, tmp_path):
    assert_refused(_save(tmp_path, name, **config), sentence)


def test_no_checkpoint_and_no_configuration_are_named(tmp_path):
    assert_refused(tmp_path / "nowhere", "no checkpoint at")
    (tmp_path / "config.json").write_text("{")
    assert_refused(tmp_path, "names no architecture")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_refused(tmp_path, "names no architecture")


def test_missing_torn_and_foreign_files_are_named(tmp_path):
    _save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert_refused(tmp_path, f"cut off at {len(whole) - 4} of {len(whole)} bytes")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert_refused(tmp_path, "is not a safetensors file")
    weights.unlink()
    assert_refused(tmp_path, "no weights at")


def test_missing_shards_and_weights_missing_in_one_are_named(tmp_path):
    tiny_model(LLAMA).save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / index["model.norm.weight"]
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    assert_refused(tmp_path, "lacks model.norm.weight, which the index says it holds")
    shard.unlink()
    assert_refused(tmp_path, f"1 of {len(set(index.values()))} files of the checkpoint")


def test_heads_that_draft_further_tokens_may_be_left_over(tmp_path):
    """DeepSeek-V3 is released with one more layer than num_hidden_layers, which predicts the token after the next."""
    _save(tmp_path, MOE, num_nextn_predict_layers=1)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights) | {"model.layers.3.eh_proj.weight": torch.zeros(64, 128)}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert check_checkpoint(tmp_path) == MOE
    load_policy(tmp_path)
    assert_refused(
        _say(tmp_path, num_nextn_predict_layers=0), "1 weights that its model lacks, such as model.layers.3.eh"
    )


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    _save(tmp_path, "Qwen3ForCausalLM")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, weights, metadata={"format": "pt"})
    policy = load_policy(tmp_path)
    assert policy.head_weight is policy.model.model.embed_tokens.weight and torch.equal(policy.head_weight, embedding)
