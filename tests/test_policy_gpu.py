"""Every family on a GPU: half precision without padding, no waits, no tensor of a length squared."""

import copy
from contextlib import nullcontext

import pytest
import torch
from kernel_checks import needs_gpu, relative_error, waits_are_errors
from tiny import tiny_model
from torch import Tensor

from trimtab.grpo.policy.families import ARCHITECTURES
from trimtab.grpo.policy.parts import LONG, Block, Pack
from trimtab.grpo.policy.policy import Policy

LENGTHS = (9, 40, 38, 16, 1, 60)


def _pack(lengths: tuple[int, ...] = LENGTHS, device: str = "cpu") -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    ids_N = torch.randint(0, 384, (sum(lengths),))
    return ids_N.to(device), torch.tensor([0, *lengths]).cumsum(0).to(device)


def _run(policy: Policy, device: str, routes_NLK: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """All keys are attended to: a selection that flips would be no small difference."""
    ids_N, cu_seqlens = _pack(device=device)
    routes_NLK = None if routes_NLK is None else routes_NLK.to(device)
    out = policy(ids_N, cu_seqlens, lengths=LENGTHS, routes_NLK=routes_NLK, dense_attention=True)
    torch.manual_seed(8)
    (out.hidden_ND.float() * torch.randn(out.hidden_ND.shape).to(device)).sum().backward()
    return out.hidden_ND.detach(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gpu_computes_what_a_cpu_does(name, dtype, tolerance):
    model = tiny_model(name, initializer_range=0.05)
    plain = Policy(copy.deepcopy(model))
    routes_NLK = plain(*_pack(), dense_attention=True).routes_NLK
    expected_ND, expected = _run(plain, "cpu", routes_NLK)
    hidden_ND, gradients = _run(Policy(model.to("cuda", dtype)), "cuda", routes_NLK)
    assert relative_error(hidden_ND, expected_ND) < tolerance
    assert gradients.keys() == expected.keys()
    for key, grad in expected.items():
        assert relative_error(gradients[key], grad) < 4 * tolerance, key


@needs_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_and_backward_never_wait_for_the_gpu(name, checkpointing):
    policy = Policy(tiny_model(name).to("cuda", torch.bfloat16), checkpointing=checkpointing)
    ids_N, cu_seqlens = _pack(device="cuda")
    losses = []
    for allowed in (nullcontext(), waits_are_errors()):  # the first time, kernels are compiled
        with allowed:
            out = policy(ids_N, cu_seqlens, lengths=LENGTHS, with_indexer_kl=policy.sparse)
            loss = out.hidden_ND.float().square().mean()
            loss = loss + (0.0 if out.indexer_kl_N is None else out.indexer_kl_N.mean())
            loss.backward()
            losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0.0)
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert gradients and all(bool(gradient.isfinite().all()) for gradient in gradients)


@needs_gpu
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_of_64k_tokens_needs_no_square_of_its_length(name, dtype):
    """One square of 65536 tokens is 4 GiB at a byte a pair."""
    model = tiny_model(name, num_hidden_layers=1, max_position_embeddings=1 << 16, first_k_dense_replace=1)
    policy = Policy(model.to("cuda", dtype), checkpointing=True)
    ids_N, cu_seqlens = _pack((1 << 16,), "cuda")
    torch.cuda.reset_peak_memory_stats()
    policy(ids_N, cu_seqlens, lengths=(1 << 16,)).hidden_ND.float().mean().backward()
    assert torch.cuda.max_memory_allocated() < 2 << 30


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, (LONG, LONG + 907)])
@needs_gpu
def test_fused_attention_over_a_pack_equals_the_padded_form(lengths, kv_heads):
    torch.manual_seed(0)
    parts = [Pack(lengths, torch.device("cuda")), Block(lengths, torch.device("cuda"))]
    tensors = [torch.randn(sum(lengths), heads, 64, device="cuda").bfloat16() for heads in (4, kv_heads, kv_heads)]
    results = []
    for part in parts:
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out = part.causal_mha(q, k, v, 0.125)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    assert all(relative_error(ours, expected) < 1e-2 for ours, expected in zip(*results, strict=True))
