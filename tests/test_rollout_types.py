"""Records fail closed: what lacks or contradicts something never becomes a Segment."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from trimtab.rollout.types import UNSELECTED, Group, PolicyShape, RecordingError, Sampling, Segment


def fields(**changes: Any) -> dict[str, Any]:
    """A valid segment of 5 tokens, the last two of them sampled, over 2 MoE layers of 2 experts a token."""
    values = {
        "name": "task#3",
        "token_ids": np.array([7, 8, 9, 4, 5], np.int32),
        "sampled": np.array([False, False, False, True, True]),
        "logp": np.array([-0.5, -1.0], np.float32),
        "kept_ids": np.array([4, 6, 5], np.int32),
        "kept_offsets": np.array([0, 2, 3], np.int64),
        "routes": np.tile(np.array([[1, 0], [3, 2]], np.uint8), (4, 1, 1)),
        "weight_version": np.array([2, 2], np.int32),
    }
    return values | changes


def with_row(row: list[list[int]]) -> np.ndarray:
    routes = fields()["routes"].copy()
    routes[2] = row
    return routes


def selections(last: list[int] | None = None) -> np.ndarray:
    """Of three layers, two keys each; the first two tokens have no choice, and their rows hold anything."""
    rows = np.zeros((4, 3, 2), np.uint16)
    rows[2:] = [0, 2]
    rows[3, 1] = [1, 3] if last is None else last
    return rows


def test_a_complete_record_is_accepted():
    assert Segment(**fields()).name == "task#3"
    assert Segment(**fields(selected=selections())).selected.shape == (4, 3, 2)


def test_selections_are_those_of_the_policy():
    shape = PolicyShape(vocabulary=10, moe_layers=2, experts_per_token=2, experts=4, version=2, selected=(3, 2))
    whole = fields(logp=np.array([-0.5, 0.0], np.float32))
    Segment(**whole | {"selected": selections()}).check_against(shape)
    for found, wanted in ((UNSELECTED, (3, 2)), (selections(), (0, 0)), (selections(), (3, 4))):
        with pytest.raises(RecordingError, match="layers and keys a token, not"):
            Segment(**whole | {"selected": found}).check_against(replace(shape, selected=wanted))


def test_a_model_without_experts_has_no_routes_to_miss():
    assert Segment(**fields(routes=np.zeros((4, 0, 0), np.uint8))).routes.nbytes == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sampled": np.array([False, False, False, True])}, "one bool a token"),
        ({"sampled": np.array([0, 0, 0, 1, 1])}, "one bool a token"),
        ({"sampled": np.zeros(5, bool)}, "no token was sampled"),
        ({"sampled": np.array([True, False, False, False, True])}, "first token"),
        ({"logp": np.array([-0.5], np.float32)}, "1 log-probabilities for 2"),
        ({"logp": np.array([-0.5, np.nan], np.float32)}, "not finite"),
        ({"logp": np.array([-0.5, -np.inf], np.float32)}, "not finite"),
        ({"weight_version": np.array([2], np.int32)}, "1 versions for 2"),
        ({"kept_offsets": np.array([0, 3], np.int64)}, "1 kept sets for 2"),
        ({"kept_offsets": np.array([0, 2, 2], np.int64)}, "do not delimit"),
        ({"kept_offsets": np.array([0, 0, 3], np.int64)}, "is empty"),
        ({"kept_offsets": np.array([1, 2, 3], np.int64)}, "do not delimit"),
        ({"kept_ids": np.array([], np.int32)}, "do not delimit"),
        ({"kept_ids": np.array([6, 7, 5], np.int32)}, "in its kept set"),
        ({"kept_ids": np.array([5, 6, 4], np.int32)}, "in its kept set"),
        ({"kept_ids": np.array([4, 4, 5], np.int32)}, "in its kept set"),
        ({"routes": fields()["routes"][:3]}, "routes of shape (3, 2, 2) for 5 tokens"),
        ({"routes": fields()["routes"].astype(np.int64)}, "uint8 or uint16"),
        ({"routes": with_row([[0, 0], [0, 0]])}, "repeats an expert"),
        ({"routes": with_row([[1, 0], [0, 0]])}, "repeats an expert"),
        ({"selected": selections()[:3]}, "selections of 3 tokens for 5"),
        ({"selected": selections()[:0]}, "selections of 0 tokens for 5"),
        ({"selected": selections().astype(np.int32)}, "selections must be uint16"),
        ({"selected": selections([1, 1])}, "not of earlier tokens, each once"),
        ({"selected": selections([2, 1])}, "not of earlier tokens, each once"),
        ({"selected": selections([1, 4])}, "not of earlier tokens, each once"),
        ({"selected": selections([0, 0])}, "not of earlier tokens, each once"),
    ],
)
def test_an_incomplete_record_is_refused_with_its_name(changes, reason):
    with pytest.raises(RecordingError) as refusal:
        Segment(**fields(**changes))
    assert str(refusal.value).startswith("task#3: ") and reason in str(refusal.value)


@pytest.mark.parametrize(
    "impossible",
    [{"temperature": 0}, {"temperature": 2.1}, {"top_p": 0}, {"top_p": 1.2}, {"top_k": 0}, {"max_tokens": 0}],
)
def test_sampling_that_has_no_kept_set_is_refused(impossible):
    with pytest.raises(ValueError, match=next(iter(impossible))):
        Sampling(**impossible)


def test_a_group_of_one_has_no_advantages():
    with pytest.raises(ValueError, match="at least 2 episodes"):
        Group(name="g", domain="d", episodes=())
