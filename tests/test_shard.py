"""Masters, compute copies and what leaves them: with one process, and with two."""

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_model
from torch import Tensor

from trimtab.grpo.policy.families import ARCHITECTURES
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.policy.shard import (
    clip_gradients,
    compute_dtype,
    fully_sharded,
    load_optimizer_state,
    masters,
    optimizer_state,
    process_mesh,
    round_frozen,
    shard,
    stream,
    whole,
    without_gradient,
)

CPU = torch.device("cpu")
LENGTHS = (9, 23)


@pytest.fixture(scope="module", autouse=True)
def processes_of_this_file() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def tied(name: str) -> Policy:
    model = tiny_model(name, initializer_range=0.1, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return Policy(model)


def logp(policy: Policy) -> Tensor:
    torch.manual_seed(1)
    ids_N = torch.randint(0, 384, (sum(LENGTHS),))
    hidden_ND = policy(ids_N, torch.tensor([0, *LENGTHS]).cumsum(0), lengths=LENGTHS).hidden_ND
    return (hidden_ND @ policy.head_weight.T).float().log_softmax(-1)[torch.arange(len(ids_N)), ids_N]


def step(policy: Policy, optimizer: torch.optim.Optimizer) -> Tensor:
    """One optimiser step with clipped gradients. Returns their norm."""
    logp(policy).mean().backward()
    norm = clip_gradients(policy.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def test_one_process_in_fp32_stays_plain():
    policy = tied("Qwen3ForCausalLM")
    assert type(shard(policy, dtype=torch.float32, device=CPU)) is Policy


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "DeepseekV32ForCausalLM"])
def test_a_sharded_policy_in_fp32_takes_the_steps_of_a_plain_one(name):
    plain = tied(name)
    sharded = fully_sharded(copy.deepcopy(plain), mesh=process_mesh(CPU), dtype=torch.float32)
    for policy in (plain, sharded):
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        norms = [float(step(policy, optimizer)) for _ in range(3)]
        if policy is plain:
            expected = norms
    assert norms == pytest.approx(expected, rel=1e-6) and norms[0] > 0.5
    ours, theirs = masters(sharded), masters(plain)
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=1e-7)


def test_clipping_is_torchs():
    plain = tied("LlamaForCausalLM")
    logp(plain).mean().backward()
    gradients = [parameter.grad.clone() for parameter in plain.parameters()]
    ours = clip_gradients(plain.parameters(), 0.1)
    clipped = [parameter.grad.clone() for parameter in plain.parameters()]
    for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
        parameter.grad = gradient
    assert torch.equal(ours, torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
    assert all(torch.equal(a, parameter.grad) for a, parameter in zip(clipped, plain.parameters(), strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_stream_is_the_masters_rounded_with_exact_routers_and_a_tied_head_once(name):
    plain = tied(name)
    expected = {key: tensor.clone() for key, tensor in plain.model.state_dict().items() if key != "lm_head.weight"}
    policy = shard(plain, dtype=torch.bfloat16, device=CPU)
    with without_gradient(policy):
        logp(policy)  # leaves nothing whole behind
    found = {key: tensor.clone() for key, tensor in stream(policy)}
    assert next(iter(found)) == "model.embed_tokens.weight" and found.keys() == expected.keys()
    for key, tensor in found.items():
        exact = key.endswith((".gate.weight", ".weights_proj.weight", "e_score_correction_bias"))
        dtype = torch.float32 if exact else torch.bfloat16
        assert tensor.dtype == dtype and torch.equal(tensor, expected[key].to(dtype)), key
    kept = masters(policy)
    assert kept.keys() == expected.keys() and all(torch.equal(kept[key], expected[key]) for key in kept)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_the_stream_of_a_step_is_that_of_the_new_weights_and_repeats_bit_by_bit():
    streams = []
    for _ in range(2):
        policy = shard(tied("Qwen3MoeForCausalLM"), dtype=torch.bfloat16, device=CPU)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
        with without_gradient(policy):
            before = logp(policy)
        step(policy, optimizer)
        with without_gradient(policy):
            after = logp(policy)
        streams.append({key: tensor.clone() for key, tensor in stream(policy)})
        assert all(torch.equal(tensor, masters(policy)[key].to(tensor.dtype)) for key, tensor in streams[-1].items())
        assert (after - before).abs().max() > 1e-2
    assert all(torch.equal(streams[0][key], streams[1][key]) for key in streams[0])


def test_an_optimisers_state_moves_between_plain_and_sharded_policies():
    plain = tied("LlamaForCausalLM")
    sharded = fully_sharded(copy.deepcopy(plain), mesh=process_mesh(CPU), dtype=torch.float32)
    optimizers = [torch.optim.AdamW(policy.parameters(), lr=1e-3) for policy in (plain, sharded)]
    step(sharded, optimizers[1])
    with torch.no_grad():
        for weight, master in zip(plain.parameters(), sharded.parameters(), strict=True):
            weight.copy_(whole(master))
    load_optimizer_state(optimizers[0], optimizer_state(optimizers[1]))
    fresh = torch.optim.AdamW(sharded.parameters(), lr=1e-3)
    load_optimizer_state(fresh, copy.deepcopy(optimizer_state(optimizers[0])))
    step(plain, optimizers[0])
    step(sharded, fresh)
    for key, weight in masters(plain).items():
        torch.testing.assert_close(masters(sharded)[key], weight, rtol=0, atol=1e-7)


def test_frozen_weights_are_rounded_but_for_routers_and_buffers():
    policy = round_frozen(Policy(tiny_model("DeepseekV32ForCausalLM")).requires_grad_(False), torch.bfloat16)
    kinds = {key: tensor.dtype for key, tensor in policy.model.state_dict().items()}
    exact = {key for key, dtype in kinds.items() if dtype == torch.float32}
    assert exact == {key for key in kinds if key.endswith((".gate.weight", ".weights_proj.weight", "_bias"))}
    assert policy.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert logp(policy).isfinite().all()


def test_masters_that_are_rounded_already_are_refused():
    policy = Policy(tiny_model("LlamaForCausalLM").bfloat16())
    with pytest.raises(ValueError, match=r"embed_tokens.weight is to learn but is not in float32"):
        shard(policy, dtype=torch.bfloat16, device=CPU)


def test_the_compute_dtype_is_bf16_on_a_gpu_and_fp32_on_a_cpu_unless_it_is_set():
    assert compute_dtype(None, torch.device("cuda")) == compute_dtype("bf16", CPU) == torch.bfloat16
    assert compute_dtype(None, CPU) == compute_dtype("fp32", torch.device("cuda")) == torch.float32


TWO = """
import sys; sys.path.insert(0, "tests")
import torch, torch.distributed as dist
from test_shard import CPU, logp, masters, optimizer_state, shard, step, tied
from trimtab.grpo.policy.shard import stream
policy = shard(tied("DeepseekV32ForCausalLM"), dtype=getattr(torch, sys.argv[1]), device=CPU)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
norm = step(policy, optimizer)
result = masters(policy), dict((n, t.clone()) for n, t in stream(policy)), norm, optimizer_state(optimizer)
if dist.get_rank() == 0:
    torch.save(result, sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_processes_hold_halves_and_take_the_same_step(dtype, tmp_path):
    """Both read the same tokens, so the summed gradient is twice one process's: twice the norm, the same direction."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, dtype, str(tmp_path / "result.pt")],
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            | {"GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    assert [process.wait(240) for process in both] == [0, 0]
    weights, streamed, norm, state = torch.load(tmp_path / "result.pt")
    policy = fully_sharded(tied("DeepseekV32ForCausalLM"), mesh=process_mesh(CPU), dtype=getattr(torch, dtype))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    alone = step(policy, optimizer)
    assert float(norm) == pytest.approx(2 * float(alone), rel=1e-5) and float(alone) > 0.5
    for key, weight in masters(policy).items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=2e-7)
    assert weights.keys() == streamed.keys()
    assert all(torch.equal(tensor, weights[key].to(tensor.dtype)) for key, tensor in streamed.items())
    for index, moments in optimizer_state(optimizer)["state"].items():
        torch.testing.assert_close(state["state"][index]["exp_avg"], moments["exp_avg"], rtol=1e-3, atol=1e-6)
