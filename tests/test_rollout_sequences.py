"""From what the engine says of each step to a completion, without an engine."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from trimtab.rollout.engine.engine import capture_sizes
from trimtab.rollout.engine.sequences import SequenceRecord


@dataclass
class Logprobs:
    logprobs: np.ndarray


@dataclass
class Mask:
    token_ids: np.ndarray


@dataclass
class Output:
    """One step of one sequence, as vLLM's EngineCoreOutput has it."""

    new_token_ids: list[int]
    new_logprobs: Any = None
    new_sampling_mask: Any = None
    routed_experts: Any = None
    finish_reason: str | None = None


def record(*outputs: Output) -> SequenceRecord:
    one = SequenceRecord()
    for output in outputs:
        one.add(output)
    return one


def step(token: int, logp: float, kept: list[int], routes: np.ndarray | None = None, end: str | None = None) -> Output:
    return Output([token], Logprobs(np.array([[logp, 9.0]], np.float32)), Mask(np.array(kept, np.int32)), routes, end)


def test_steps_become_arrays():
    """Three layers, of which 1 and 2 have experts; a prompt of two tokens, of which two rows come at once."""
    rows = np.arange(18, dtype=np.uint8).reshape(3, 3, 2)
    one = record(step(7, -0.5, [7, 3], rows[:2]), step(4, -0.25, [4], rows[2:], "stop"))
    done = one.completion(layers=[1, 2], experts_per_token=2, version=3)
    assert done.token_ids.tolist() == [7, 4] and done.token_ids.dtype == np.int32
    assert done.logp.tolist() == [-0.5, -0.25] and done.logp.dtype == np.float32
    assert done.kept_ids.tolist() == [7, 3, 4] and done.kept_ids.dtype == np.int32
    assert done.kept_offsets.tolist() == [0, 2, 3] and done.kept_offsets.dtype == np.int64
    assert done.routes.tolist() == rows[:, 1:].tolist() and done.routes.dtype == np.uint8
    assert (done.weight_version, done.finish) == (3, "stop")


def test_selections_lie_behind_the_experts():
    """Three layers, of which one has two experts a token, and selections of four keys."""
    rows = np.arange(54, dtype=np.uint16).reshape(3, 3, 6)
    one = record(step(7, -0.5, [7], rows[:2]), step(4, -0.25, [4], rows[2:], "stop"))
    done = one.completion(layers=[1], experts_per_token=2, selects=(3, 4), version=3)
    assert done.routes.tolist() == rows[:, 1:2, :2].tolist() and done.selected.tolist() == rows[:, :, 2:].tolist()
    alone = one.completion(layers=[], experts_per_token=0, selects=(3, 6), version=3)
    assert alone.routes.shape == (0, 0, 0) and alone.selected.tolist() == rows.tolist()


def test_what_the_engine_did_not_say_is_missing_and_not_made_up():
    done = record(Output([7]), Output([4], finish_reason="length")).completion(
        layers=[0], experts_per_token=2, version=0
    )
    assert len(done.logp) == len(done.kept_ids) == 0 and done.kept_offsets.tolist() == [0]
    assert done.routes.shape == (0, 1, 2) and done.finish == "length"
    silent = record(step(1, 0.0, [1])).completion(layers=[], experts_per_token=0, selects=(3, 4), version=0)
    assert silent.selected.shape == (0, 3, 4)
    assert record(step(1, 0.0, [1])).completion(layers=[], experts_per_token=0, version=0).routes.shape == (0, 0, 0)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 16, 60, 64, 100, 128, 256, 300, 1024])
def test_a_batch_is_hardly_padded_to_the_next_graph(most):
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) <= 48
    for batch in range(1, most + 1):
        padding = next(size for size in sizes if size >= batch) - batch
        assert padding <= max(7, batch / 8)


def test_the_graphs_of_256_sequences_are_few():
    assert capture_sizes(256) == [1, 2, 4, *range(8, 128, 8), *range(128, 257, 16)]
