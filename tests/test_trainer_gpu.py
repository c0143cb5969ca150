"""The trainer on a GPU: bits that repeat, a host that does not wait, memory that is given back."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from kernel_checks import needs_gpu, waits_are_errors
from test_lora import DENSE
from test_trainer import BATCH, CONFIG, weights
from tiny import tiny_model

from trimtab.grpo.config import Config
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.trainer import Record, Trainer

pytestmark = needs_gpu
CASES = [("Qwen3ForCausalLM", DENSE), ("LlamaForCausalLM", DENSE), ("DeepseekV32ForCausalLM", BATCH)]


@pytest.fixture(scope="module", autouse=True)
def processes_of_this_file() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def start(name: str, config: Config = CONFIG) -> Trainer:
    policy, reference = (
        Policy(tiny_model(name, seed, initializer_range=0.05), checkpointing=config.checkpoint_activations)
        for seed in (0, 1)
    )
    return Trainer(config, policy, reference, Accelerator())


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_updates_in_bf16_repeat_bit_by_bit_and_offloading_changes_none(name, batch):
    runs = []
    for offload in ("none", "none", "all"):
        trainer = start(name, replace(CONFIG, offload=offload, checkpoint_activations=offload == "all"))
        metrics = [trainer.train_on(batch, step) for step in (0, 1)]
        trainer.rest()
        runs.append(weights(trainer))
        assert all(0 < m["grad_norm"] < 1e3 and m["entropy"] > 0 for m in metrics)
    assert all(torch.equal(runs[0][key], other[key]) for other in runs[1:] for key in runs[0])


@pytest.mark.parametrize("keep_sampling_mask", [True, False])
@pytest.mark.parametrize(("name", "batch"), CASES)
def test_bf16_is_near_fp32(name, batch, keep_sampling_mask):
    config = replace(CONFIG, minibatches=1, keep_sampling_mask=keep_sampling_mask)
    exact, rounded = (
        start(name, replace(config, precision=precision)).train_on(batch, 0) for precision in ("fp32", "bf16")
    )
    assert rounded["kl"] == pytest.approx(exact["kl"], rel=0.05)
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
    assert rounded["mismatch_kl"] == pytest.approx(exact["mismatch_kl"], rel=0.05)


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_the_host_does_not_wait_within_a_pack(name, batch):
    trainer = start(name)
    trainer.train_on(batch, 0)  # compiles the kernels, fills the caches of pinned memory
    (packed, *_) = trainer._packs(batch)
    ref_logp_S = trainer._references([[packed]])[0][0]
    record = Record()
    with waits_are_errors():
        log_ratio_S = trainer._backward(packed.to(trainer.device), ref_logp_S, len(batch), 1000, record)
    assert len(log_ratio_S) == len(packed.token_S) and log_ratio_S.isfinite().all() and len(record.losses) == 1
    trainer.optimizers[0].zero_grad()


def test_what_rests_leaves_the_gpu_and_comes_back():
    trainer = start("Qwen3ForCausalLM", replace(CONFIG, offload="all"))
    trainer.train_on(DENSE, 0)
    torch.cuda.synchronize()
    trainer.rest()
    at_rest = torch.cuda.memory_allocated()
    trainer.resume()
    masters = sum(weight.numel() * 4 for weight in trainer.learning)
    assert torch.cuda.memory_allocated() - at_rest >= masters
    trainer.rest()
    assert torch.cuda.memory_allocated() == at_rest
