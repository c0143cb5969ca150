"""What trains, with which weight: groups without signal, two objectives, recordings that no engine writes, names."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_trainer import BATCH, CONFIG, start, weights
from tiny import tiny_deepseek

from trimtab.environments.base import Message
from trimtab.grpo.batch import pack, trajectories
from trimtab.grpo.config import Config, Domain, LossSettings
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.policy.learner import Diverged
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.sampling.scores import ExpectedParts, PartMissing
from trimtab.grpo.schedule import lr_factor
from trimtab.grpo.train import domain_metrics
from trimtab.grpo.trainer import Trainer
from trimtab.kernels import reference
from trimtab.rollout.types import Episode, Group, PolicyShape, RecordingError, Sampling, Segment

ONE = replace(CONFIG, minibatches=1, max_grad_norm=1e9, indexer_kl=0.0, lr=1.0)


def sgd(config: Config) -> Trainer:
    """Adam would hide how large a gradient is."""
    trainer = start(config)
    trainer.optimizers = [torch.optim.SGD(trainer.learning, lr=1e-3)]
    return trainer


def moved(config: Config, batch) -> dict[str, torch.Tensor]:
    trainer = sgd(config)
    before = weights(trainer)
    trainer.train_on(batch, 5)
    return {name: weight - before[name] for name, weight in weights(trainer).items()}


def settled(beta: float, advantage: float, batch=BATCH):
    return [replace(one, advantage=advantage, settings=replace(one.settings, beta=beta)) for one in batch]


# ---- groups without signal


def group(*rewards: float) -> Group:
    episodes = tuple(
        Episode(
            name=f"g#{i}",
            domain="any",
            messages=(),
            segments=BATCH[i].segments,
            rewards={},
            reward=reward,
            ended="done",
        )
        for i, reward in enumerate(rewards)
    )
    return Group(name="g", domain="any", episodes=episodes)


def test_equal_rewards_keep_the_kl_unless_the_domain_drops_them():
    for drop, left in ((False, 4), (True, 2)):
        settings = {"any": LossSettings(beta=0.1, drop_equal_groups=drop)}
        assert len(trajectories([group(1.0, 0.0), group(0.5, 0.5)], settings)) == left


def test_groups_without_signal_count_in_the_divisor_whether_or_not_they_are_computed():
    signal, none = settled(0.0, 0.7, BATCH[:4]), settled(0.0, 0.0, BATCH[4:8])
    alone, diluted = moved(ONE, signal), moved(ONE, [*signal, *none])
    assert max(weight.abs().max() for weight in alone.values()) > 1e-5
    for name in alone:
        torch.testing.assert_close(diluted[name], alone[name] / 2, rtol=2e-3, atol=3e-7)


def test_the_kl_of_a_group_without_signal_is_what_it_is_in_one_with_signal():
    """The loss is linear in advantage and beta: KL alone, and signal alone, add up to both."""
    both, kl, signal = (
        moved(ONE, settled(beta, advantage)) for beta, advantage in ((0.5, 0.7), (0.5, 0.0), (0.0, 0.7))
    )
    assert max(weight.abs().max() for weight in kl.values()) > 1e-6
    for name in both:
        torch.testing.assert_close(both[name], kl[name] + signal[name], rtol=5e-3, atol=3e-7)


def test_a_minibatch_without_gradient_makes_no_step():
    trainer = start(replace(CONFIG, minibatches=12))
    trainer.train_on([*settled(0.0, 0.7, BATCH[:3]), *settled(0.0, 0.0, BATCH[3:])], 0)
    assert trainer.updates == 3
    with pytest.raises(ValueError, match="nothing to learn from"):
        trainer.train_on(settled(0.0, 0.0), 1)
    assert trainer.updates == 3


# ---- two objectives, two clips


def test_the_indexers_objective_does_not_scale_the_policys_nor_the_other_way_round():
    clipped = replace(CONFIG, minibatches=1, max_grad_norm=1e-2, lr=1.0)
    light, heavy, loud = (
        moved(replace(clipped, indexer_kl=weight), settled(0.1, advantage))
        for weight, advantage in ((1.0, 0.7), (100.0, 0.7), (1.0, 70.0))
    )
    indexer = {name for name in light if ".indexer." in name}
    assert indexer and indexer < light.keys()
    for name in light.keys() - indexer:
        torch.testing.assert_close(heavy[name], light[name], rtol=1e-3, atol=3e-7)
    for name in indexer:
        torch.testing.assert_close(loud[name], light[name], rtol=1e-3, atol=3e-7)
    lr = lr_factor(5, steps=CONFIG.steps, warmup_steps=CONFIG.warmup_steps, end_share=CONFIG.lr_end_share)
    for of_indexer in (False, True):
        steps = [weight for name, weight in light.items() if (name in indexer) == of_indexer]
        norm = math.sqrt(sum(float(weight.square().sum()) for weight in steps))
        assert norm == pytest.approx(1e-2 * lr, rel=1e-2), "each is clipped by itself"


def test_a_gradient_that_is_not_finite_is_named_before_the_step():
    trainer = sgd(ONE)
    segment = BATCH[0].segments[0]
    broken = replace(segment, logp=np.full_like(segment.logp, -1e30))
    with pytest.raises(Diverged, match="norm is"):
        trainer.train_on([replace(BATCH[0], segments=(broken,), advantage=-1.0)], 0)
    assert trainer.updates == 0


# ---- the whole KL, percentiles, entropy


def test_the_full_kl_has_the_value_and_the_gradient_of_the_sum_over_the_vocabulary():
    config = replace(ONE, kl="full")
    batch = settled(0.5, 0.0, BATCH[:5])
    trainer = sgd(config)
    before = weights(trainer)
    policy, other = Policy(tiny_deepseek(0, initializer_range=0.1)), Policy(tiny_deepseek(1, initializer_range=0.1))
    (packed,) = pack(batch, 10**6)

    def logits(model: Policy, routes) -> torch.Tensor:
        hidden = model(packed.ids_N, packed.cu_seqlens, lengths=packed.lengths, routes_NLK=routes).hidden_ND
        return hidden[packed.predict_S] @ model.head_weight.T

    logp, ref = logits(policy, packed.routes_NLK).log_softmax(-1), logits(other, None).log_softmax(-1).detach()
    kl_S = (logp.exp() * (logp - ref)).sum(-1)
    mean_B = torch.zeros(5).index_add(0, packed.sequence_S, kl_S) / packed.length_B
    (0.5 * mean_B.mean()).backward()
    metrics = trainer.train_on(batch, 5)
    assert metrics["kl"] == pytest.approx(float(mean_B.detach().mean()), rel=1e-5)
    expected = dict(policy.model.named_parameters())
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    seen = 0
    for name, weight in weights(trainer).items():
        if name in expected and expected[name].grad is not None and ".indexer." not in name:
            torch.testing.assert_close(weight - before[name], -lr * expected[name].grad, rtol=5e-3, atol=3e-7)
            seen += 1
    assert seen > 20


def test_delta_as_a_percentile_is_that_of_the_batch_before_and_goes_on_after_a_resume(tmp_path):
    loss = LossSettings(beta=0.1, delta="p75")
    config = replace(CONFIG, domains={"any": Domain(task="x:y", loss=loss)})
    batch = [replace(one, settings=loss) for one in BATCH]
    trainer = start(config)
    first = trainer.train_on(batch, 0)
    assert first["masked"] == 0.0, "nothing is known before the first batch"
    delta = trainer.deltas["any"]
    assert delta > 0
    trainer.save(tmp_path)
    second = trainer.train_on(batch, 1)
    again = Trainer(config, Policy(tiny_deepseek(0, initializer_range=0.1)), None, Accelerator(cpu=True), Clock())
    again.load_optimizer(tmp_path)
    assert again.deltas == {"any": delta}
    assert 0 < second["masked"] <= 0.5
    with pytest.raises(ValueError, match="a percentile; the trainer puts a number"):
        pack(batch, 1000)


@pytest.mark.parametrize("delta", ["99", "p101", "pp", "p-1", "p"])
def test_a_percentile_that_is_none_is_refused(delta):
    with pytest.raises(ValueError, match="a percentile such as p99"):
        LossSettings(delta=delta)


def test_the_entropy_is_that_of_the_kept_sets_and_every_metric_comes_by_domain():
    config = replace(ONE, domains={"any": CONFIG.domains["any"], "other": CONFIG.domains["any"]})
    batch = [replace(one, domain="other" if i % 3 else "any") for i, one in enumerate(BATCH)]
    trainer = start(config)
    (packed,) = pack(batch, 10**6)
    policy = Policy(tiny_deepseek(0, initializer_range=0.1))
    with torch.no_grad():
        hidden = policy(packed.ids_N, packed.cu_seqlens, lengths=packed.lengths, routes_NLK=packed.routes_NLK).hidden_ND
        entropy_S = reference.kept_entropy(
            hidden[packed.predict_S], policy.head_weight, packed.kept_id_E, packed.kept_offset_S, 1.0
        )
    mean_B = torch.zeros(len(batch)).index_add(0, packed.sequence_S, entropy_S) / packed.length_B
    of_other = torch.tensor([name == "other" for name in packed.domains])
    metrics = trainer.train_on(batch, 5)
    assert metrics["entropy"] == pytest.approx(float(mean_B.mean()), rel=1e-4)
    assert metrics["entropy/other"] == pytest.approx(float(mean_B[of_other].mean()), rel=1e-4)
    for name in ("kl", "masked", "clip_share", "clip_low_share", "drift_p99"):
        assert {f"{name}/any", f"{name}/other"} <= metrics.keys()
    assert metrics["kl"] == pytest.approx((4 * metrics["kl/any"] + 8 * metrics["kl/other"]) / 12, rel=1e-5)
    assert metrics["lr"] == pytest.approx(1 - 0.9 * 3 / 21)


def test_rewards_of_a_domain_are_told_by_group():
    found = domain_metrics("d", [group(1.0, 0.0), group(0.5, 0.5)])
    assert found["reward/d"] == 0.5 and found["reward_std/d"] == 0.25 and found["equal/d"] == 0.5
    assert found["length/d"] == np.mean([sum(len(s.logp) for s in BATCH[i].segments) for i in (0, 1)])
    assert domain_metrics("d", []) == {}


# ---- recordings


SHAPE = PolicyShape(vocabulary=384, moe_layers=2, experts_per_token=2, experts=8, version=0)
GOOD = BATCH[1].segments[0]


def changed(**fields) -> Segment:
    return replace(GOOD, **fields)


def doubled() -> Segment:
    counts = np.diff(GOOD.kept_offsets)
    i = int(np.argmax(counts > 1))
    token = GOOD.token_ids[GOOD.sampled][i]
    ids = [id for id in GOOD.kept_ids[GOOD.kept_offsets[i] : GOOD.kept_offsets[i + 1]] if id != token]
    kept = np.insert(GOOD.kept_ids, GOOD.kept_offsets[i], ids[0])
    return changed(kept_ids=kept, kept_offsets=GOOD.kept_offsets + (np.arange(len(GOOD.kept_offsets)) > i))


def alone(logp: float) -> Segment:
    counts = np.ones(len(GOOD.logp), np.int64)
    return changed(
        kept_ids=GOOD.token_ids[GOOD.sampled],
        kept_offsets=np.concatenate([[0], counts.cumsum()]),
        logp=np.full_like(GOOD.logp, logp),
    )


@pytest.mark.parametrize(
    ("segment", "reason"),
    [
        (lambda: changed(logp=GOOD.logp + 9), "above 0"),
        (doubled, "holds an id twice"),
        (lambda: alone(-1.0), "one id was kept, but its log-probability is -1"),
        (lambda: changed(routes=GOOD.routes[:, :0]), "routes of 0 layers and 2 experts"),
        (lambda: changed(routes=GOOD.routes[:, :, :1]), "routes of 2 layers and 1 experts"),
        (lambda: changed(routes=GOOD.routes + 7), "beyond 8"),
        (lambda: changed(weight_version=GOOD.weight_version + 1), r"version \[1\], not 0"),
        (lambda: changed(weight_version=np.arange(len(GOOD.logp), dtype=np.int32)), r"not 0"),
        (lambda: changed(token_ids=np.where(GOOD.sampled, GOOD.token_ids, 384).astype(np.int32)), "vocabulary of 384"),
        (lambda: changed(token_ids=np.where(GOOD.sampled, GOOD.token_ids, -1).astype(np.int32)), "vocabulary of 384"),
    ],
)
def test_what_no_engine_of_the_policy_records_is_refused(segment, reason):
    GOOD.check_against(SHAPE)
    alone(0.0).check_against(SHAPE)
    with pytest.raises(RecordingError, match=reason):
        segment().check_against(SHAPE)


def test_routes_that_were_never_written_are_refused_at_one_expert_a_token():
    one = replace(SHAPE, experts_per_token=1)
    changed(routes=GOOD.routes[:, :, :1]).check_against(one)
    with pytest.raises(RecordingError, match="the engine wrote none"):
        changed(routes=np.zeros_like(GOOD.routes[:, :, :1])).check_against(one)


def test_a_dense_policy_has_no_routes():
    dense = replace(SHAPE, moe_layers=0, experts_per_token=0, experts=0)
    changed(routes=np.zeros((len(GOOD.routes), 0, 0), np.uint8)).check_against(dense)
    with pytest.raises(RecordingError, match="routes of 2 layers"):
        GOOD.check_against(dense)


@pytest.mark.parametrize("temperature", [0.0, 0.005, 0.0099])
def test_a_temperature_that_vllm_would_raise_is_refused(temperature):
    Sampling(temperature=0.01)
    with pytest.raises(ValueError, match=r"vLLM raises what is below"):
        Sampling(temperature=temperature)


# ---- names of parts


@pytest.mark.parametrize("weights", [{}, {"outcome": 0.0}, {"outcome": math.nan}, {"outcome": math.inf}])
def test_weights_that_train_nothing_or_on_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights must"):
        Domain(task="x:y", weights=weights)


def answered(count: int, *, domain: str = "d", ended: str = "done", **rewards: float) -> list[Group]:
    episode = Episode(
        name="e", domain=domain, messages=(Message("user", "?"),), segments=(), rewards=rewards, reward=0.0, ended=ended
    )
    return [Group(name=f"g{i}", domain=domain, episodes=(episode, episode)) for i in range(count // 2)]


def expected(weights: dict[str, float], score: str = "outcome") -> ExpectedParts:
    return ExpectedParts(Config(domains={"d": Domain(task="x:y", weights=weights, score=score)}))


def test_a_part_whose_name_is_wrong_is_told_with_those_that_came():
    with pytest.raises(PartMissing, match=r"domain d: no answer of 2 .* 'outcom', .*came are 'length', 'outcome'"):
        expected({"outcom": 1.0}).add(answered(2, outcome=1.0, length=0.0))
    parts = expected({"outcome": 1.0, "lenght": 0.1})
    parts.add(answered(20, outcome=1.0, length=0.0))
    with pytest.raises(PartMissing, match="'lenght'"):
        parts.add(answered(12, outcome=1.0, length=0.0))
    with pytest.raises(PartMissing, match="'outcome'"):
        expected({"correct": 1.0}).add(answered(32, correct=1.0))


def test_a_part_that_comes_only_sometimes_is_none_that_is_missing():
    parts = expected({"outcome": 1.0, "bonus": 0.5, "length": 0.1})
    parts.add(answered(10, outcome=1.0))
    parts.add(answered(2, outcome=1.0, bonus=1.0))
    for _ in range(20):
        parts.add(answered(10, outcome=0.0))


def test_answers_that_were_cut_off_say_nothing_of_names():
    parts = expected({"rubric": 1.0}, score="rubric")
    for _ in range(10):
        parts.add(answered(10, ended="length", outcome=0.0))
