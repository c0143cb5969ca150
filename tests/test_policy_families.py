"""Every supported family against transformers' own model, in fp32: log-probabilities and gradients."""

import copy
from typing import Any

import pytest
import torch
from tiny import TINY, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.grpo.policy.families import ARCHITECTURES
from trimtab.grpo.policy.policy import Policy, load_policy

LENGTHS = (9, 40, 38, 16, 1, 60)  # index_topk is 16
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}
LITE = {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
ROWS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ARCHITECTURES),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("LlamaForCausalLM", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    ("MistralForCausalLM", {"sliding_window": 512, "num_key_value_heads": 1}),
    ("Qwen2ForCausalLM", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    ("Qwen3ForCausalLM", {"tie_word_embeddings": False, "rope_parameters": YARN | {"attention_factor": 1.3}}),
    ("Qwen3MoeForCausalLM", {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2}),
    ("DeepseekV2ForCausalLM", LITE),
    ("DeepseekV2ForCausalLM", LITE | {"rope_parameters": MSCALE}),
    ("DeepseekV3ForCausalLM", {"q_lora_rank": None, "norm_topk_prob": False, "rope_parameters": MSCALE}),
    ("DeepseekV32ForCausalLM", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    ("GlmMoeDsaForCausalLM", {"rope_parameters": MSCALE, "n_group": 4, "topk_group": 2}),
]
IDS = [" ".join([name.removesuffix("ForCausalLM"), *overrides]) for name, overrides in ROWS]


@pytest.fixture
def lower_position_wins(monkeypatch):
    """transformers' indexers use torch.topk, which leaves ties open: give them our total order."""

    def topk(scores: Tensor, k: int, dim: int = -1, **_: bool) -> torch.return_types.topk:
        values, indices = torch.sort(scores, dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values[..., :k], indices[..., :k]))

    monkeypatch.setattr(torch.Tensor, "topk", topk)


def _pack() -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return torch.randint(0, 384, (sum(LENGTHS),)), torch.tensor([0, *LENGTHS]).cumsum(0)


def _gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _their_logp(model: PreTrainedModel, ids_N: Tensor) -> Tensor:
    """[N, V], one sequence at a time."""
    return torch.cat([model(i[None], use_cache=False).logits[0].log_softmax(-1) for i in ids_N.split(list(LENGTHS))])


@pytest.mark.usefixtures("lower_position_wins")
@pytest.mark.parametrize(("name", "overrides"), ROWS, ids=IDS)
def test_a_pack_has_the_log_probabilities_and_gradients_of_transformers_on_single_sequences(name, overrides):
    model = tiny_model(name, **({"initializer_range": 0.1} | overrides))
    policy = Policy(copy.deepcopy(model))
    ids_N, cu_seqlens = _pack()
    weight_NV = torch.randn(len(ids_N), 384)
    expected_NV = _their_logp(model, ids_N)
    logp_NV = (policy(ids_N, cu_seqlens).hidden_ND @ policy.head_weight.T).log_softmax(-1)
    torch.testing.assert_close(logp_NV, expected_NV, rtol=0, atol=1e-5)
    expected = _gradients(model, (expected_NV * weight_NV).sum())
    ours = _gradients(policy.model, (logp_NV * weight_NV).sum())
    assert ours.keys() == expected.keys()
    assert len(expected) == sum(".indexer." not in key for key, _ in model.named_parameters())
    for key, grad in expected.items():
        assert (ours[key] - grad).abs().max() <= 1e-4 * grad.abs().max(), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_host_known_lengths_change_nothing(name):
    policy = Policy(tiny_model(name))
    ids_N, cu_seqlens = _pack()
    with torch.no_grad():
        read, given = policy(ids_N, cu_seqlens), policy(ids_N, cu_seqlens, lengths=LENGTHS)
    assert torch.equal(read.hidden_ND, given.hidden_ND)
    with pytest.raises(ValueError, match="ends at 165, but there are 164 tokens"):
        policy(ids_N, cu_seqlens, lengths=(*LENGTHS, 1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_policies_load_in_transformers_and_here_with_equal_outputs(name, tmp_path):
    model = tiny_model(name)
    policy = Policy(copy.deepcopy(model))
    assert policy.weights().keys() == model.state_dict().keys()
    policy.save(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    ids_N, cu_seqlens = _pack()
    with torch.no_grad():
        ours, again = policy(ids_N, cu_seqlens).hidden_ND, load_policy(tmp_path)(ids_N, cu_seqlens).hidden_ND
        theirs, expected = plain(ids_N[None, :9]).logits, model(ids_N[None, :9]).logits
    torch.testing.assert_close(again, ours, rtol=0, atol=1e-5)  # weights read from a file lie otherwise in memory
    torch.testing.assert_close(theirs, expected, rtol=0, atol=1e-5)


def test_the_table_of_tiny_models_is_that_of_the_families():
    assert list(TINY) == list(ARCHITECTURES)
