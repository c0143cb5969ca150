"""Keep Routing: choice and weights against transformers' routers, replay, recomputation."""

import copy

import pytest
import torch
from tiny import tiny_deepseek, tiny_deepseek_config
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

from trimtab.grpo.policy import moe
from trimtab.grpo.policy.policy import Policy

LENGTHS = (30, 41, 12)


def _qwen_config(**overrides) -> Qwen3MoeConfig:
    values = {
        "vocab_size": 384,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen3MoeConfig(**(values | overrides))


def _model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_deepseek() if name == "deepseek" else Qwen3MoeForCausalLM(_qwen_config())


def _pack() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randint(0, 384, (sum(LENGTHS),)), torch.tensor([0, *LENGTHS]).cumsum(0)


def _other_routes(routes_NLK: Tensor) -> Tensor:
    """Every token's experts moved on by one: other than the router's choice, but distinct, as uint8."""
    return ((routes_NLK + 1) % 8).to(torch.uint8)


def _run(policy: Policy, routes_NLK: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    policy.zero_grad()
    hidden_ND = policy(*_pack(), routes_NLK=routes_NLK).hidden_ND
    torch.manual_seed(5)
    (hidden_ND * torch.randn_like(hidden_ND)).sum().backward()
    return hidden_ND.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def _assert_identical(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(grad, other[1][name]) for name, grad in one[1].items())


@pytest.mark.parametrize("normalise", [True, False])
def test_deepseek_choice_and_weights_equal_transformers_router(normalise):
    torch.manual_seed(0)
    config = tiny_deepseek_config(
        n_routed_experts=24, n_group=6, topk_group=2, num_experts_per_tok=5, norm_topk_prob=normalise
    )
    gate = deepseek.DeepseekV32TopkRouter(config)
    torch.nn.init.normal_(gate.weight)
    gate.e_score_correction_bias.copy_(0.3 * torch.randn(24))
    x_ND = torch.randn(500, config.hidden_size)
    logit_NE, weight_NK, ids_NK = gate(x_ND)
    score_NE = logit_NE.sigmoid()
    ours_NK = moe.top_experts_in_groups(score_NE, gate.e_score_correction_bias, 5, groups=6, kept_groups=2)
    assert torch.equal(ours_NK.sort(-1).values, ids_NK.sort(-1).values)
    ours_without_bias = moe.top_experts_in_groups(score_NE, torch.zeros(24), 5, groups=6, kept_groups=2)
    assert not torch.equal(ours_without_bias.sort(-1).values, ids_NK.sort(-1).values)
    ours = moe.gate_weights(score_NE, ids_NK, normalise=normalise, scale=config.routed_scaling_factor)
    torch.testing.assert_close(ours, weight_NK, rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_qwen_choice_and_weights_equal_transformers_router(normalise):
    torch.manual_seed(0)
    gate = qwen.Qwen3MoeTopKRouter(_qwen_config(norm_topk_prob=normalise))
    torch.nn.init.normal_(gate.weight)
    x_ND = torch.randn(500, 32)
    logit_NE, weight_NK, ids_NK = gate(x_ND)
    score_NE = logit_NE.softmax(-1)
    assert torch.equal(moe.top_experts(score_NE, 2), ids_NK)
    torch.testing.assert_close(moe.gate_weights(score_NE, ids_NK, normalise=normalise), weight_NK, rtol=0, atol=1e-6)


def test_mixing_experts_equals_transformers_forward_and_backward_with_idle_experts():
    torch.manual_seed(0)
    config = _qwen_config(num_experts=16, num_experts_per_tok=3)
    experts = qwen.Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x_ND = torch.randn(63, 32, requires_grad=True)
    ids_NK = torch.rand(63, 10).topk(3).indices + 2  # experts 0, 1 and 12 to 15 stay idle
    weight_NK = torch.rand(63, 3, requires_grad=True)
    ours_ND = moe.mix_experts(x_ND, ids_NK, weight_NK, experts.gate_up_proj, experts.down_proj)
    theirs_ND = experts(x_ND, ids_NK, weight_NK)
    torch.testing.assert_close(ours_ND, theirs_ND, rtol=1e-5, atol=1e-3)
    inputs = (x_ND, weight_NK, experts.gate_up_proj, experts.down_proj)
    for ours, expected in zip(
        torch.autograd.grad(ours_ND.square().sum(), inputs),
        torch.autograd.grad(theirs_ND.square().sum(), inputs),
        strict=True,
    ):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["deepseek", "qwen"])
def test_replaying_a_models_own_routes_changes_nothing_bit_for_bit(name):
    policy = Policy(_model(name))
    routes_NLK = policy(*_pack()).routes_NLK
    assert routes_NLK.shape == (sum(LENGTHS), 2, 2)
    _assert_identical(_run(policy, routes_NLK.to(torch.uint8)), _run(policy, None))


@pytest.mark.parametrize("name", ["deepseek", "qwen"])
def test_replayed_routes_are_the_experts_used(name):
    policy = Policy(_model(name))
    own = policy(*_pack())
    replayed = policy(*_pack(), routes_NLK=_other_routes(own.routes_NLK))
    assert torch.equal(replayed.routes_NLK, _other_routes(own.routes_NLK).long())
    assert (replayed.hidden_ND - own.hidden_ND).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["deepseek", "qwen"])
@pytest.mark.parametrize("replay", [True, False])
def test_checkpointing_changes_neither_output_nor_gradients(name, replay):
    policy = Policy(_model(name))
    routes_NLK = _other_routes(policy(*_pack()).routes_NLK) if replay else None
    kept = _run(policy, routes_NLK)
    policy.checkpointing = True
    _assert_identical(_run(policy, routes_NLK), kept)


def test_recomputation_uses_the_replayed_experts():
    """An expert that no route names gets no gradient, and every named one does, also when layers are recomputed."""
    policy = Policy(_model("deepseek"), checkpointing=True)
    routes_NLK = torch.tensor([1, 6]).expand(sum(LENGTHS), 2, 2)
    _, grads = _run(policy, routes_NLK)
    for layer in policy.moe_layers:
        grad_E = grads[f"model.model.layers.{layer}.mlp.experts.down_proj"].flatten(1).abs().sum(1)
        assert grad_E.nonzero().flatten().tolist() == [1, 6]


@pytest.mark.parametrize("name", ["deepseek", "qwen"])
def test_the_router_learns_under_replay(name):
    policy = Policy(_model(name))
    _, grads = _run(policy, _other_routes(policy(*_pack()).routes_NLK))
    gates = [grad for name, grad in grads.items() if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2 and all(grad.any() for grad in gates)


def test_the_gradient_of_a_replayed_gate_is_that_of_its_live_weights():
    """One token, two kept experts with sigmoid scores s1, s2 and expert values v1, v2: d out / d s1 = s2 (v1 - v2) /
    (s1 + s2)^2."""
    score_NE = torch.tensor([[0.2, 0.9, 0.6]], requires_grad=True)
    weight_NK = moe.gate_weights(score_NE, torch.tensor([[0, 2]]), normalise=True, scale=2.0)
    assert weight_NK.tolist() == [pytest.approx([0.5, 1.5])]
    (weight_NK * torch.tensor([[5.0, 3.0]])).sum().backward()
    s1, s2, difference = 0.2, 0.6, 5.0 - 3.0
    expected = [2.0 * s2 * difference / (s1 + s2) ** 2, 0.0, -2.0 * s1 * difference / (s1 + s2) ** 2]
    assert score_NE.grad[0].tolist() == pytest.approx(expected)


def test_policies_do_not_share_modules_with_a_copied_model():
    model = _model("deepseek")
    policy = Policy(copy.deepcopy(model))
    with torch.no_grad():
        next(policy.parameters()).zero_()
    assert next(model.parameters()).any()
