"""The policy under torch's fully_shard: the same gradients, fp32 where it matters, the head at hand."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from trimtab.grpo.policy.attention import HeadWeights
from trimtab.grpo.policy.families import ARCHITECTURES
from trimtab.grpo.policy.moe import Router
from trimtab.grpo.policy.policy import Policy

LENGTHS = (30, 41, 12)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _shard(policy: Policy, mesh: DeviceMesh, dtype: torch.dtype) -> Policy:
    """Units: what computes in fp32, each layer, the rest."""
    exact, rounded = (
        MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for kind in (torch.float32, dtype)
    )
    layers = list(policy.model.model.layers)
    fp32 = [module for module in policy.modules() if isinstance(module, (Router, HeadWeights))]
    for module, precision in [*((m, exact) for m in fp32), *((m, rounded) for m in layers), (policy, rounded)]:
        unit: Any = fully_shard(module, mesh=mesh, mp_policy=precision)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return policy


def _run(policy: Policy, routes_NLK: Tensor | None = None, dense: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    ids_N, cu_seqlens = torch.randint(0, 384, (sum(LENGTHS),)), torch.tensor([0, *LENGTHS]).cumsum(0)
    options = {"lengths": LENGTHS, "routes_NLK": routes_NLK, "dense_attention": dense}
    out = policy(ids_N, cu_seqlens, **options, with_indexer_kl=policy.sparse)
    logp_NV = (out.hidden_ND @ policy.head_weight.T).float().log_softmax(-1)
    loss = logp_NV[torch.arange(len(ids_N)), ids_N].mean()
    if out.indexer_kl_N is not None:
        loss = loss + out.indexer_kl_N.mean()
    loss.backward()
    full: Any = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return logp_NV.detach(), {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in full.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_sharded_policy_has_the_gradients_of_a_plain_one(name, checkpointing, mesh):
    model = tiny_model(name, initializer_range=0.1)
    expected_NV, expected = _run(Policy(copy.deepcopy(model)))
    logp_NV, ours = _run(_shard(Policy(model, checkpointing=checkpointing), mesh, torch.float32))
    assert torch.equal(logp_NV, expected_NV)
    assert ours.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(ours[key], grad, rtol=1e-5, atol=1e-7 * float(grad.abs().max()), msg=key)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_computes_near_fp32_and_leaves_routers_and_head_weights_in_it(name, mesh):
    model = tiny_model(name, initializer_range=0.05)
    plain = Policy(copy.deepcopy(model))
    torch.manual_seed(3)
    ids_N, cu_seqlens = torch.randint(0, 384, (sum(LENGTHS),)), torch.tensor([0, *LENGTHS]).cumsum(0)
    routes_NLK = plain(ids_N, cu_seqlens).routes_NLK
    expected_NV, expected = _run(plain, routes_NLK, dense=True)  # a selection that flips would be no small difference
    policy = _shard(Policy(model, checkpointing=True), mesh, torch.bfloat16)
    seen: dict[str, torch.dtype] = {}
    for key, module in policy.named_modules():
        if isinstance(module, (Router, HeadWeights, torch.nn.Linear)):
            module.register_forward_pre_hook(lambda m, _, key=key: seen.update({key: m.weight.dtype}))
    logp_NV, ours = _run(policy, routes_NLK, dense=True)
    fp32 = {key for key, dtype in seen.items() if dtype == torch.float32}
    assert fp32 == {key for key in seen if key.endswith(("mlp.gate", "indexer.weights_proj"))}
    assert (logp_NV - expected_NV).abs().max() < 0.1
    assert ours.keys() == expected.keys()
    for key, grad in ours.items():
        assert grad.dtype == torch.float32 and grad.isfinite().all(), key
        assert (grad - expected[key]).norm() < 0.2 * expected[key].norm(), key
