"""Engines that hold other weights than they were sent are found, and the error says where."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from trimtab.grpo.sampling.sync import PROBE_ANSWER, WeightMismatch, check, differing, probe_of
from trimtab.rollout.attempt import recorded
from trimtab.rollout.types import Completion, Request, Sampling

SUMS = {"embed": 3.0, "layers.0.attention": -1.0, "layers.0.mlp": 1e-9, "head": 2.0}


def completion(logp: list[float]) -> Completion:
    S = len(logp)
    return Completion(
        token_ids=np.arange(S, dtype=np.int32),
        logp=np.array(logp, np.float32),
        kept_ids=np.arange(S, dtype=np.int32),
        kept_offsets=np.arange(S + 1),
        routes=np.zeros((0, 0, 0), np.uint8),
        weight_version=3,
        finish="length",
    )


@dataclass
class Engines:
    """Two engines that answer the probe with these log-probabilities."""

    logp: list[list[float]]
    held: list[int] = field(default_factory=lambda: [3, 3])
    sums: dict[str, float] = field(default_factory=lambda: dict(SUMS))

    def versions(self):
        return self.held

    def probe(self, request):
        return [completion(logp) for logp in self.logp]

    def checksums(self):
        return [SUMS, self.sums]


def checked(engines: Engines, precision: str = "fp32") -> float:
    probe = Request(name="probe", prompt_ids=(5, 6), sampling=Sampling(max_tokens=2))
    score = lambda segment: torch.tensor([-0.5, -1.0])  # noqa: E731 - the policy's log-probabilities
    return check(engines, 3, probe, precision=precision, score=score, checksums=lambda: SUMS)


def test_engines_that_agree_pass_with_the_largest_mean_difference():
    # |(-0.5, -1.0) - (-0.5002, -1.0004)| has the mean 0.0003
    assert checked(Engines([[-0.5, -1.0], [-0.5002, -1.0004]])) == pytest.approx(3e-4, rel=1e-3)


def test_an_engine_of_another_version_is_named():
    with pytest.raises(WeightMismatch, match=r"version 3: \{1: 2\}"):
        checked(Engines([[-0.5, -1.0]] * 2, held=[3, 2]))


@pytest.mark.parametrize("other", [-3.0, float("nan")])
def test_an_engine_that_computes_something_else_is_named_with_the_tensors_that_differ(other):
    sums = SUMS | {"layers.0.attention": -1.01}
    with pytest.raises(WeightMismatch, match=r"engine 1 .* version 3.*what differs: layers\.0\.attention$"):
        checked(Engines([[-0.5, -1.0], [-0.5, other]], sums=sums))


def test_bf16_explains_more_than_fp32():
    engines = Engines([[-0.5, -1.0], [-0.6, -1.1]])
    assert checked(engines, "bf16") == pytest.approx(0.1)
    with pytest.raises(WeightMismatch, match="no tensor of which the engine gives sums"):
        checked(engines, "fp32")


def test_sums_in_another_order_agree_and_a_group_that_an_engine_cannot_sum_is_not_accused():
    reordered = SUMS | {"embed": 3.0 + 1e-12, "layers.0.mlp": 1.5e-12 + 1e-9}
    assert differing(reordered, SUMS) == []
    assert differing({"embed": 3.0}, {"embed": 3.0, "head": 2.0}) == []


def test_the_probe_is_the_beginning_of_a_prompt_that_was_played():
    segment = recorded("a", tuple(range(300)), completion([-1.0, -2.0]))
    request = probe_of(segment, Sampling(top_k=5))
    assert request.prompt_ids == tuple(range(256)) and request.sampling == Sampling(top_k=5, max_tokens=PROBE_ANSWER)
    assert probe_of(recorded("b", (7, 8), completion([-1.0])), Sampling(max_tokens=4)).prompt_ids == (7, 8)
