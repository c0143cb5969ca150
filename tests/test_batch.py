"""What is packed is what was recorded: checked against the segments, token by token."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.grpo.batch import Packed, Trajectory, minibatches, pack, trajectories
from trimtab.grpo.config import LossSettings
from trimtab.grpo.estimators import grpo_loss
from trimtab.kernels.reference import kept_logp
from trimtab.rollout.types import Episode, Group, Segment

SETTINGS = {"agent": LossSettings(beta=0.2, delta=None), "reasoning": LossSettings(beta=0.0, delta=0.3)}


def segment(name: str, prompt: int, sampled: int, *, layers: int = 2, dtype: type = np.uint8) -> Segment:
    """A valid recording of `prompt` given and `sampled` sampled tokens; its numbers follow from its name."""
    rng = np.random.default_rng(list(name.encode()))
    N = prompt + sampled
    ids_N = rng.integers(0, 50, N).astype(np.int32)
    kept = [np.unique(np.append(rng.integers(0, 50, 3), token)) for token in ids_N[prompt:]]
    return Segment(
        name=name,
        token_ids=ids_N,
        sampled=np.arange(N) >= prompt,
        logp=-rng.random(sampled).astype(np.float32),
        kept_ids=np.concatenate([np.empty(0), *kept]).astype(np.int32),
        kept_offsets=np.cumsum([0, *map(len, kept)]).astype(np.int64),
        routes=np.argsort(rng.random((N - 1, layers, 6)), axis=-1)[..., :2].astype(dtype),
        weight_version=np.zeros(sampled, dtype=np.int32),
    )


def trajectory(name: str, *shapes: tuple[int, int], domain: str = "reasoning", advantage: float = 1.0) -> Trajectory:
    segments = tuple(segment(f"{name}/{i}", *shape) for i, shape in enumerate(shapes))
    return Trajectory(name=name, domain=domain, segments=segments, advantage=advantage, settings=SETTINGS[domain])


def group(name: str, rewards: list[float], domain: str = "reasoning") -> Group:
    episodes = tuple(
        Episode(
            name=f"{name}/{i}",
            domain=domain,
            messages=(),
            segments=(segment(f"{name}/{i}", 3, 2),),
            rewards={"outcome": reward},
            reward=reward,
            ended="done",
        )
        for i, reward in enumerate(rewards)
    )
    return Group(name=name, domain=domain, episodes=episodes)


# Groups


def test_trajectories_carry_centred_advantages_and_the_settings_of_their_domain():
    result = trajectories([group("a", [1.0, 0.0]), group("b", [0.0, 0.0, 3.0], "agent")], SETTINGS)
    assert [(t.name, t.advantage) for t in result] == [
        ("a/0", 0.5),
        ("a/1", -0.5),
        ("b/0", -1.0),
        ("b/1", -1.0),
        ("b/2", 2.0),
    ]
    assert [t.settings for t in result] == [SETTINGS["reasoning"]] * 2 + [SETTINGS["agent"]] * 3


@pytest.mark.parametrize("domain", ["reasoning", "agent"])
def test_groups_with_equal_rewards_stay_unless_their_domain_drops_them(domain):
    equal = [group("a", [0.1, 0.1, 0.1], domain)]
    assert [t.advantage for t in trajectories(equal, SETTINGS)] == [0.0] * 3
    dropping = {name: replace(one, drop_equal_groups=True) for name, one in SETTINGS.items()}
    assert trajectories(equal, dropping) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (group("g", [1.0, math.nan]), "group 'g' holds a reward that is not finite"),
        (replace(group("g", [0.0, 1.0]), domain="poetry"), "domain 'poetry' has no loss settings"),
    ],
)
def test_groups_that_cannot_train_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        trajectories([bad], SETTINGS)


def test_an_episode_in_which_nothing_was_sampled_is_refused():
    good = group("g", [0.0, 1.0])
    silent = replace(good.episodes[0], segments=())
    with pytest.raises(ValueError, match="episode 'g/0' holds no segment"):
        trajectories([replace(good, episodes=(silent, good.episodes[1]))], SETTINGS)


# Mini-batches


@given(st.lists(st.sampled_from(["agent", "reasoning"]), max_size=30), st.integers(1, 6), st.integers(0, 100))
def test_minibatches_hold_every_trajectory_once_with_domains_spread_evenly(domains, count, seed):
    batch = [
        Trajectory(name=str(i), domain=d, segments=(), advantage=1.0, settings=SETTINGS[d])
        for i, d in enumerate(domains)
    ]
    result = minibatches(batch, count, seed)
    assert sorted(t.name for part in result for t in part) == sorted(t.name for t in batch)
    assert len(result) == min(count, len(batch))
    for chosen in ({"agent"}, {"reasoning"}, {"agent", "reasoning"}):
        sizes = [sum(t.domain in chosen for t in part) for part in result]
        assert not sizes or max(sizes) - min(sizes) <= 1


def test_minibatches_depend_on_the_seed_alone():
    batch = [trajectory(str(i), (1, 1)) for i in range(20)]

    def names(seed: int) -> list[list[str]]:
        return [[t.name for t in part] for part in minibatches(batch, 4, seed)]

    assert names(1) == names(1)
    assert names(1) != names(2)


def test_fewer_than_one_minibatch_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1 mini-batch, got 0"):
        minibatches([], 0, 0)


# Packs

shapes = st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), max_size=12)


@given(shapes, st.integers(1, 60))
def test_every_trajectory_is_packed_once_whole_and_within_the_limit(shapes, max_tokens):
    batch = [trajectory(str(i), *shape) for i, shape in enumerate(shapes)]
    packs = pack(batch, max_tokens)
    by_name = {t.name: t for t in batch}
    assert sorted(name for packed in packs for name in packed.names) == sorted(by_name)
    longest = [max(int(n) for n in packed.cu_seqlens.diff()) for packed in packs]
    assert longest == sorted(longest)
    for packed in packs:
        assert len(packed.ids_N) <= max_tokens or len(packed.names) == 1
        check_against_recording(packed, [by_name[name] for name in packed.names])


def check_against_recording(packed: Packed, members: list[Trajectory]) -> None:
    """Walk the recorded segments and compare with the pack at running offsets."""
    n, s, q = 0, 0, 0
    for b, member in enumerate(members):
        assert int(packed.length_B[b]) == member.num_sampled
        for seg in member.segments:
            N, S = len(seg.token_ids), len(seg.logp)
            assert packed.cu_seqlens[q : q + 2].tolist() == [n, n + N]
            assert packed.ids_N[n : n + N].tolist() == seg.token_ids.tolist()
            assert packed.routes_NLK[n : n + N - 1].tolist() == seg.routes.tolist()
            assert torch.equal(packed.routes_NLK[n + N - 1], packed.routes_NLK[n + N - 2])
            assert (packed.predict_S[s : s + S] - n).tolist() == (np.flatnonzero(seg.sampled) - 1).tolist()
            assert packed.token_S[s : s + S].tolist() == seg.token_ids[seg.sampled].tolist()
            assert packed.old_logp_S[s : s + S].tolist() == seg.logp.tolist()
            assert packed.sequence_S[s : s + S].tolist() == [b] * S
            for i in range(S):
                kept = packed.kept_id_E[packed.kept_offset_S[s + i] : packed.kept_offset_S[s + i + 1]]
                assert kept.tolist() == seg.kept_ids[seg.kept_offsets[i] : seg.kept_offsets[i + 1]].tolist()
            n, s, q = n + N, s + S, q + 1
    assert (n, s, q) == (len(packed.ids_N), len(packed.token_S), len(packed.cu_seqlens) - 1)
    assert len(packed.kept_offset_S) == s + 1
    assert int(packed.kept_offset_S[-1]) == len(packed.kept_id_E)


def test_a_pack_carries_each_trajectorys_own_advantage_and_settings():
    batch = [trajectory("a", (2, 2), advantage=-0.5), trajectory("b", (3, 2), (4, 1), domain="agent", advantage=2.0)]
    (packed,) = pack(batch, 100)
    assert packed.domains == ("reasoning", "agent")
    assert packed.advantage_B.tolist() == [-0.5, 2.0]
    assert packed.length_B.tolist() == [2, 3]
    assert packed.beta_B.tolist() == pytest.approx([0.0, 0.2])
    assert packed.delta_B.tolist() == pytest.approx([0.3, math.inf])
    assert packed.clip_low_B.tolist() == pytest.approx([0.2, 0.2])
    assert packed.clip_high_B.tolist() == pytest.approx([0.28, 0.28])


def test_tensors_have_the_types_that_training_indexes_with():
    (packed,) = pack([trajectory("a", (2, 2))], 100)
    indices = ("ids_N", "cu_seqlens", "predict_S", "token_S", "kept_id_E", "kept_offset_S", "sequence_S", "length_B")
    assert {getattr(packed, name).dtype for name in indices} == {torch.int64}
    assert packed.routes_NLK.dtype == torch.uint8
    assert packed.old_logp_S.dtype == packed.advantage_B.dtype == torch.float32
    wide = replace(trajectory("w", (2, 2)), segments=(segment("w", 2, 2, dtype=np.uint16),))
    assert pack([wide], 100)[0].routes_NLK.dtype == torch.uint16


def test_a_policy_without_experts_has_no_routes():
    dense = replace(trajectory("d", (2, 2)), segments=(segment("d", 2, 2, layers=0),))
    assert pack([dense], 100)[0].routes_NLK is None


def test_packs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        pack([], 0)
    mixed = replace(trajectory("a", (2, 2)), segments=(segment("a", 2, 2), segment("b", 2, 2, layers=3)))
    with pytest.raises(ValueError, match="routes of different shapes"):
        pack([mixed], 10)


def test_moving_a_pack_keeps_all_of_it():
    (packed,) = pack([trajectory("a", (2, 2))], 100)
    moved = packed.to("meta")
    assert moved.names == ("a",)
    assert moved.ids_N.device.type == moved.routes_NLK.device.type == moved.delta_B.device.type == "meta"


@pytest.mark.parametrize("max_tokens", [1, 20, 1000])
def test_the_gradient_does_not_depend_on_how_the_batch_was_packed(max_tokens):
    batch = [
        trajectory("a", (2, 3), (4, 2), domain="agent", advantage=-1.0),
        trajectory("b", (3, 2), advantage=-2.0),
        trajectory("c", (5, 4), domain="agent", advantage=2.0),
        trajectory("d", (1, 1), advantage=1.0),
    ]
    generator = torch.Generator().manual_seed(0)
    leaves = torch.randn(3, 50, 8, generator=generator).requires_grad_()

    def gradient(packs: list[Packed]) -> torch.Tensor:
        total = torch.zeros(())
        for packed in packs:
            embedding_VD, head_VD, ref_head_VD = leaves
            hidden_SD = embedding_VD[packed.ids_N][packed.predict_S]
            kept = (packed.token_S, packed.kept_id_E, packed.kept_offset_S, 1.3)
            loss = grpo_loss(
                kept_logp(hidden_SD, head_VD, *kept),
                packed.old_logp_S,
                kept_logp(hidden_SD, ref_head_VD, *kept).detach(),
                sequence_S=packed.sequence_S,
                advantage_B=packed.advantage_B,
                length_B=packed.length_B,
                num_trajectories=4,
                clip_low_B=packed.clip_low_B,
                clip_high_B=packed.clip_high_B,
                beta_B=packed.beta_B,
                delta_B=packed.delta_B,
            )
            total = total + loss.loss
        return torch.autograd.grad(total, leaves)[0]

    torch.testing.assert_close(gradient(pack(batch, max_tokens)), gradient(pack(batch, 50)), rtol=1e-5, atol=1e-7)
