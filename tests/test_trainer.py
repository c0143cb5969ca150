"""The trainer on recorded trajectories, without engines: what it must not depend on."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_deepseek

from trimtab.grpo.batch import Trajectory
from trimtab.grpo.config import Config, Domain, LossSettings
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.recipes import quickstart
from trimtab.grpo.trainer import Trainer, schedule
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


def updated(config: Config) -> dict[str, torch.Tensor]:
    """The weights after one step of training on the same twelve trajectories."""
    reference = Policy(tiny_deepseek(1, initializer_range=0.1)).requires_grad_(False)
    policy = Policy(tiny_deepseek(0, initializer_range=0.1), checkpointing=config.checkpoint_activations)
    trainer = Trainer(config, policy, reference, Accelerator(cpu=True))
    # SGD, because Adam's first step divides by the gradient's size and so hides or inflates its differences
    trainer.optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
    metrics = trainer.train_on([trajectory(i) for i in range(12)], step=5)
    assert metrics["kl"] > 0 and metrics["indexer_kl"] > 0 and math.isfinite(metrics["grad_norm"])
    return trainer.weights()


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


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_its_end_share():
    config = replace(quickstart(), steps=10, warmup_steps=3, lr_end_share=0.1)
    factors = [schedule(step, config) for step in range(10)]
    assert factors[0] == pytest.approx(0.25) and factors[3] == max(factors)
    assert schedule(10, config) == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(factors[3:]))


def test_a_batch_without_signal_is_refused():
    policy = Policy(tiny_deepseek())
    with pytest.raises(ValueError, match="nothing to learn from"):
        Trainer(CONFIG, policy, None, Accelerator(cpu=True)).train_on([], step=0)
