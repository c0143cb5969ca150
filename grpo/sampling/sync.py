"""New weights for the engines, and proof that they arrived: the version is asked back, and a probe is compared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab.grpo.policy.selection import Chosen, agreement
from trimtab.rollout.attempt import recorded
from trimtab.rollout.types import Completion, RecordingError, Request, Sampling, Segment

PROBE_PROMPT = 256
"""Tokens of the probe's prompt, at most."""
PROBE_ANSWER = 4
"""Tokens that the probe samples."""
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}
"""Mean absolute difference of the probe's log-probabilities, in nats, that rounding explains. Weights that did not
arrive differ by much more, or by less than matters."""
SUMS_AGREE = 1e-6
"""Relative difference of two sums over the same numbers in another order."""


class Engines(Protocol):
    """What a check needs of the pool."""

    def versions(self) -> list[int]: ...
    def probe(self, request: Request) -> list[Completion]: ...
    def checksums(self) -> Sequence[Mapping[str, float]]: ...


class WeightMismatch(RuntimeError):
    """An engine does not hold the weights that it was sent: what it samples would not be the policy's."""


def probe_of(segment: Segment, sampling: Sampling) -> Request:
    """A request whose answer is compared after every update: the beginning of a prompt that was played."""
    prompt = segment.token_ids[: int(segment.sampled.argmax())][:PROBE_PROMPT]
    limit = min(PROBE_ANSWER, sampling.max_tokens or PROBE_ANSWER)
    return Request(name="probe", prompt_ids=tuple(prompt.tolist()), sampling=replace(sampling, max_tokens=limit))


def check(
    engines: Engines,
    version: int,
    probe: Request,
    *,
    precision: str,
    score: Callable[[Segment], Tensor],
    checksums: Callable[[], Mapping[str, float]],
) -> float:
    """Compare every engine with the policy and return the largest mean difference of log-probabilities, in nats.

    Args:
        score: log-probabilities [S] of a segment's sampled tokens under the policy.
        checksums: sums of the policy's weights by tensor group, as the engines give theirs.

    Raises:
        WeightMismatch: an engine has another version, or other log-probabilities; names the tensor groups that differ.
    """
    if late := {i: found for i, found in enumerate(engines.versions()) if found != version}:
        raise WeightMismatch(f"engines have other weights than version {version}: {late}")
    largest = 0.0
    for i, completion in enumerate(engines.probe(probe)):
        difference = _difference(probe, completion, score)
        if not difference <= TOLERANCE[precision]:
            where = differing(engines.checksums()[i], checksums()) or ["no tensor of which the engine gives sums"]
            raise WeightMismatch(
                f"engine {i} does not compute with the weights of version {version}: log-probabilities of the probe "
                f"differ by {difference:.3g} nats ({TOLERANCE[precision]} is explained by rounding); "
                f"what differs: {', '.join(where)}"
            )
        largest = max(largest, difference)
    return largest


def selection_agreement(engines: Sequence[np.ndarray], chosen: Chosen) -> dict[str, float]:
    """The share of the policy's selected keys that the engines select too, and of its attention that falls on them:
    means over layers, of the engine that agrees least. The same of the policy's own indexer in FP8.

    Args:
        engines: what Engine.selection gives, of each.
    """
    length = chosen.selected[0].shape[-1]
    found = []
    for packed in engines:
        theirs = torch.from_numpy(np.unpackbits(packed, axis=-1, count=length).astype(bool))
        ids, mass = agreement(chosen, list(theirs))
        found.append((fmean(ids), fmean(mass)))
    ids_share, mass_share = min(found)
    shares = {"selection/ids": ids_share, "selection/mass": mass_share}
    if chosen.in_fp8:
        ids, mass = agreement(chosen, chosen.in_fp8)
        shares |= {"selection/fp8_ids": fmean(ids), "selection/fp8_mass": fmean(mass)}
    return shares


def _difference(probe: Request, completion: Completion, score: Callable[[Segment], Tensor]) -> float:
    """Mean absolute difference of log-probabilities; infinite where the engine's are not even complete."""
    try:
        segment = recorded("probe", probe.prompt_ids, completion)
    except RecordingError:
        return float("inf")
    return float(np.abs(score(segment).cpu().numpy() - segment.logp).mean())


def differing(engine: Mapping[str, float], policy: Mapping[str, float]) -> Sequence[str]:
    """The tensor groups whose sums are not the same on both sides, of those that the engine can sum: a CPU has packed
    others (weights.checksums)."""
    scale = max(map(abs, policy.values()), default=0.0)

    def agree(group: str) -> bool:
        return abs(engine[group] - policy[group]) <= SUMS_AGREE * max(abs(policy[group]), SUMS_AGREE * scale)

    return sorted(group for group in engine.keys() & policy.keys() if not agree(group))
