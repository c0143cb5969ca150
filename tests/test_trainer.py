"""The trainer on recorded trajectories, without engines: what it must not depend on."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from tiny import tiny_deepseek

from trimtab.grpo.batch import Trajectory
from trimtab.grpo.config import Config, Domain, LossSettings
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.policy.policy import Policy, load_policy
from trimtab.grpo.schedule import lr_factor
from trimtab.grpo.trainer import Trainer
from trimtab.rollout.types import Segment

CONFIG = Config(domains={"any": Domain(task="x:y", loss=LossSettings(beta=0.1, delta=0.5))}, minibatches=2, lr=1e-3)


def trajectory(i: int) -> Trajectory:
    """Random tokens with kept sets of one to five ids; every third has two segments."""
    rng = np.random.default_rng(i)

    def segment(j: int) -> Segment:
        prompt, sampled = int(rng.integers(3, 30)), int(rng.integers(1, 9))
        ids = rng.integers(0, 360, prompt + sampled).astype(np.int32)
        kept = [np.unique(np.append(rng.integers(0, 360, rng.integers(0, 5)), token)) for token in ids[prompt:]]
        return Segment(
            name=f"{i}.{j}",
            token_ids=ids,
            sampled=np.arange(len(ids)) >= prompt,
            logp=np.array([-math.log(len(ids)) for ids in kept], np.float32),
            kept_ids=np.concatenate(kept).astype(np.int32),
            kept_offsets=np.cumsum([0, *map(len, kept)]).astype(np.int64),
            routes=np.stack([rng.permutation(8)[:2] for _ in range(2 * (len(ids) - 1))])
            .reshape(-1, 2, 2)
            .astype(np.uint8),
            weight_version=np.zeros(sampled, np.int32),
        )

    segments = tuple(segment(j) for j in range(2 if i % 3 == 0 else 1))
    return Trajectory(
        name=str(i), domain="any", segments=segments, advantage=(-1.0) ** i * 0.7, settings=CONFIG.domains["any"].loss
    )


BATCH = [trajectory(i) for i in range(12)]


@pytest.fixture(scope="module", autouse=True)
def processes_of_this_file() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def start(config: Config) -> Trainer:
    reference = Policy(tiny_deepseek(1, initializer_range=0.1))
    policy = Policy(tiny_deepseek(0, initializer_range=0.1), checkpointing=config.checkpoint_activations)
    return Trainer(config, policy, reference, Accelerator(cpu=True), Clock())


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.to("cpu", copy=True) for name, weight in trainer.stream()}


def updated(config: Config) -> dict[str, torch.Tensor]:
    """The weights after one step of training on the same twelve trajectories."""
    trainer = start(config)
    # SGD, because Adam's first step divides by the gradient's size and so hides or inflates its differences
    trainer.optimizers = [torch.optim.SGD(trainer.learning, lr=1e-3)]
    metrics = trainer.train_on(BATCH, step=5)
    assert metrics["kl"] > 0 and metrics["indexer_kl"] > 0 and math.isfinite(metrics["grad_norm"])
    return weights(trainer)


@pytest.mark.parametrize("changes", [{"tokens_per_microbatch": 40}, {"checkpoint_activations": True}])
def test_neither_microbatches_nor_checkpointing_change_the_update(changes):
    whole, other = updated(CONFIG), updated(replace(CONFIG, **changes))
    start = Policy(tiny_deepseek(0, initializer_range=0.1)).weights()
    moved = [name for name in whole if not torch.equal(whole[name], start[name])]
    assert len(moved) > 0.9 * len(list(Policy(tiny_deepseek()).parameters()))
    for name in whole:
        torch.testing.assert_close(other[name] - start[name], whole[name] - start[name], rtol=2e-3, atol=1e-7)


def test_routing_replay_and_the_kept_sets_matter():
    whole = updated(CONFIG)
    for changes in ({"keep_routing": False}, {"keep_sampling_mask": False}):
        other = updated(replace(CONFIG, **changes))
        assert any((other[name] - whole[name]).abs().max() > 1e-5 for name in whole)


@pytest.mark.parametrize(
    ("steps", "warmup", "end"), [(10, 3, 0.1), (50, 2, 0.0), (2, 0, 0.5), (3, 2, 0.1), (7, 0, 1.0)]
)
def test_the_learning_rate_reaches_lr_and_its_end_share_at_steps_that_are_trained(steps, warmup, end):
    factors = [lr_factor(step, steps=steps, warmup_steps=warmup, end_share=end) for step in range(steps)]
    assert factors[:warmup] == [(step + 1) / (warmup + 1) for step in range(warmup)]
    assert factors[warmup] == 1.0 == max(factors)
    assert factors[-1] == (end if steps - 1 > warmup else 1.0)
    falls = [earlier - later for earlier, later in pairwise(factors[warmup:])]
    assert falls == pytest.approx([(1 - end) / max(steps - 1 - warmup, 1)] * len(falls))


def test_a_run_that_is_all_warm_up_rises_to_its_end():
    factors = [lr_factor(step, steps=2, warmup_steps=5, end_share=0.1) for step in range(2)]
    assert factors == [1 / 6, 2 / 6]


def test_a_batch_without_signal_is_refused():
    policy = Policy(tiny_deepseek())
    with pytest.raises(ValueError, match="nothing to learn from"):
        Trainer(CONFIG, policy, None, Accelerator(cpu=True)).train_on([], step=0)


def test_resting_in_host_memory_changes_no_bit_of_training():
    whole, other = updated(CONFIG), start(replace(CONFIG, offload="all"))
    other.optimizers = [torch.optim.SGD(other.learning, lr=1e-3)]
    other.rest()
    assert all(weight.untyped_storage().nbytes() == 0 for weight in other.policy.parameters())
    assert all(weight.untyped_storage().nbytes() == 0 for weight in other.references[""].parameters())
    assert weights(other).keys() == whole.keys()
    other.resume()
    other.train_on(BATCH, step=5)
    other.rest()
    found = weights(other)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert all(weight.untyped_storage().nbytes() == 0 for weight in other.policy.parameters())


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_resumes_goes_on_as_if_it_had_not_stopped(precision, offload, tmp_path):
    """Two updates in a row, and two with a checkpoint of everything between them."""
    config = replace(CONFIG, precision=precision, offload=offload)
    straight, stopped = start(config), start(config)
    for step in (0, 1):
        straight.train_on(BATCH, step)
    stopped.train_on(BATCH, 0)
    stopped.rest()
    stopped.save(tmp_path)
    reference = Policy(tiny_deepseek(1, initializer_range=0.1))
    resumed = Trainer(config, load_policy(tmp_path), reference, Accelerator(cpu=True))
    resumed.load_optimizer(tmp_path)
    resumed.train_on(BATCH, 1)
    expected, found = weights(straight), weights(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {parameter.dtype for parameter in resumed.learning} == {torch.float32}


def test_bf16_updates_are_near_those_in_fp32_and_the_same_twice():
    exact, once, twice = (updated(replace(CONFIG, precision=p)) for p in ("fp32", "bf16", "bf16"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert {weight.dtype for name, weight in once.items() if "bias" not in name} == {torch.bfloat16, torch.float32}
    near = [(once[name].float() - exact[name]).norm() < 0.01 * exact[name].norm() for name in exact]
    assert all(near)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_score_is_what_the_first_update_compares_with_the_sampler(precision):
    config = replace(CONFIG, precision=precision, minibatches=1)
    trainer = start(config)
    scores = [trainer.score(segment) for t in BATCH for segment in t.segments]
    olds = [torch.from_numpy(segment.logp) for t in BATCH for segment in t.segments]
    log_ratio_S = torch.cat(scores) - torch.cat(olds)
    metrics = trainer.train_on(BATCH, step=0)
    tolerance = {"fp32": 1e-4, "bf16": 5e-2}[precision]
    assert metrics["mismatch_kl"] == pytest.approx(float((log_ratio_S.expm1() - log_ratio_S).mean()), rel=tolerance)
    assert metrics["mismatch_log_ratio_max"] == pytest.approx(float(log_ratio_S.abs().max()), rel=tolerance)


def test_a_score_is_what_an_engine_records_whatever_the_loss_replays():
    replayed, not_replayed = start(CONFIG), start(replace(CONFIG, keep_sampling_mask=False, keep_routing=False))
    for segment in (segment for t in BATCH[:3] for segment in t.segments):
        assert torch.equal(not_replayed.score(segment), replayed.score(segment))


def test_an_update_is_timed_by_phase():
    trainer = start(CONFIG)
    trainer.train_on(BATCH, step=0)
    assert trainer.clock.seconds().keys() == {"packing", "reference", "forward and backward", "optimiser"}
