"""FLOPs by hand, and against those that torch counts."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV32Config, LlamaConfig, LlamaForCausalLM

from trimtab.grpo.cost.flops import PEAK_TFLOPS, Work, forward, mfu, pairs, recomputed, training
from trimtab.grpo.cost.shape import shape_of
from trimtab.grpo.policy.policy import Policy
from trimtab.kernels import reference

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}


def deepseek_shape(**overrides):
    config: DeepseekV32Config = tiny.tiny_deepseek_config(**overrides)
    return shape_of(json.loads(config.to_json_string()) | {"architectures": ["DeepseekV32ForCausalLM"]})


def test_pairs_by_hand():
    """Three tokens see 1, 2 and 3 keys; with two keys at most 1, 2, 2; five see 1, 2, 2, 2, 2."""
    assert pairs([3]) == 6
    assert pairs([3, 5], topk=2) == 5 + 9
    assert pairs([2], topk=2) == pairs([2], topk=100) == 3


def test_a_dense_model_by_hand():
    """A token of a layer meets 64*96 + 2*64*48 + 96*64 + 3*64*96 = 36864 weights; a pair costs 2 * 2 * 4 * 24 = 384."""
    work = Work(lengths=[3, 1], sampled=2)
    expected = 3 * (2 * 36864 * 4 + 384 * 7) + 2 * 2 * 64 * 384
    assert forward(shape_of(LLAMA), work) == expected
    assert training(shape_of(LLAMA), work) == 3 * expected


def test_kept_ids_alone_pass_through_the_head():
    whole = forward(shape_of(LLAMA), Work(lengths=[9], sampled=4))
    kept = forward(shape_of(LLAMA), Work(lengths=[9], sampled=4, kept=10))
    assert whole - kept == 2 * 64 * (4 * 384 - 10)


def test_adapters_spare_the_gradients_of_the_weights_but_not_those_of_attention():
    shape, work = shape_of(LLAMA), Work(lengths=[7], sampled=7)
    attention = 3 * 384 * 28
    assert training(shape, work, learns="adapters") == 2 * (forward(shape, work) - attention) + 3 * attention


def test_of_experts_the_chosen_ones_alone_count():
    """Two more experts of 3 * 64 * 32 weights for each token in each of the two MoE layers."""
    two, four = deepseek_shape(num_experts_per_tok=2), deepseek_shape(num_experts_per_tok=4)
    work = Work(lengths=[5], sampled=0)
    assert forward(four, work) - forward(two, work) == 2 * 2 * 5 * 2 * 3 * 64 * 32


def test_sparse_attention_grows_with_its_keys_and_the_indexer_with_all():
    """Beyond 16 keys one more token costs each layer 16 pairs of 4 * (16 + 8 + 16) and N of the indexer's 4 * 16."""
    shape = deepseek_shape()
    per_token = 2 * sum(layer.active + layer.indexer_weights for layer in shape.layers)
    longer, shorter = (forward(shape, Work(lengths=[length], sampled=0)) for length in (101, 100))
    assert longer - shorter == per_token + 3 * (2 * 16 * 160 + 2 * 101 * 64)


def test_an_indexer_that_learns_alone_costs_a_forward_pass_without_a_head_and_its_own_way_back():
    """Two more passes through its weights; of each pair that attention sees its score three times, and q times k."""
    shape = deepseek_shape()
    dense = replace(shape, layers=tuple(replace(layer, topk=None) for layer in shape.layers))
    own = sum(4 * layer.indexer_weights * 100 for layer in shape.layers)
    for one, seen in ((shape, pairs([100], 16)), (dense, 5050)):
        before = forward(one, Work(lengths=[100], sampled=0))
        learnt = training(one, Work(lengths=[100], sampled=50), learns="indexer")
        assert learnt - before == own + 3 * 2 * (3 * 64 + 4 * 24) * seen


def test_the_selection_has_no_backward_pass():
    """Without its KL the indexer's part counts once, everything else three times. The KL adds two more passes through
    the indexer's weights, and of each selected pair its score three times and q times k of 4 * (16 + 8) once."""
    shape, work = deepseek_shape(), Work(lengths=[100], sampled=3)
    products = sum(2 * layer.indexer_weights * 100 for layer in shape.layers)
    indexer = products + 3 * 2 * 64 * 5050
    without = training(shape, work, learn_indexer=False)
    assert without == 3 * (forward(shape, work) - indexer) + indexer
    selected = 16 * 17 // 2 + 84 * 16
    assert training(shape, work) == without + 2 * products + 3 * 2 * (3 * 64 + 96) * selected


def test_recomputation_is_the_layers_forward_pass():
    shape = shape_of(LLAMA)
    assert recomputed(shape, Work(lengths=[9], sampled=9)) == forward(shape, Work(lengths=[9], sampled=0))


def test_torch_counts_the_same_products_forward_and_backward():
    """On a CPU torch does not count fused attention: 384 a pair and layer, three times."""
    torch.manual_seed(0)
    policy = Policy(LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "architectures"})))
    ids, predict = torch.arange(20), torch.arange(5, 20)
    with FlopCounterMode(display=False) as counter:
        hidden = policy(ids, torch.tensor([0, 20])).hidden_ND
        reference.full_logp(hidden[predict], policy.head_weight, ids[predict], 1.0).sum().backward()
    work = Work(lengths=[20], sampled=len(predict))
    assert counter.get_total_flops() == training(shape_of(LLAMA), work) - 3 * 3 * 384 * pairs([20])


def test_torch_counts_the_same_products_of_latent_attention_and_experts():
    """Products with a weight, but for those of the experts: torch does not count grouped ones on every machine."""
    policy = Policy(tiny.tiny_deepseek())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy(torch.arange(20), torch.tensor([0, 20]))
    layers = deepseek_shape().layers
    weights = sum(i * o for layer in layers for i, o in layer.matrices.values())
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert counted == 2 * 20 * (weights + sum(layer.indexer_weights for layer in layers))


def test_mfu_is_a_share_of_a_known_peak_and_nothing_else():
    assert mfu(989.4e12, 2.0, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)
    assert mfu(1e12, 1.0, "NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert mfu(1e12, 1.0, "") is None
    assert mfu(1e12, 0.0, "NVIDIA H200") is None
    assert all(50 < peak < 3000 for peak in PEAK_TFLOPS.values())
