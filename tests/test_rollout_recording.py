"""Truncation, sampling and batch plans, without an engine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.rollout.engine.dsa.model import buckets
from trimtab.rollout.engine.recording import draw, rewindable, truncate
from trimtab.rollout.engine.weights import one_by_one


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (4, None, {0, 1, 2, 3}),
        (2, None, {0, 1}),
        (9, None, {0, 1, 2, 3}),
        (4, 1.0, {0, 1, 2, 3}),
        (4, 0.9, {0, 1, 2}),  # 0.5 + 0.25 = 0.75 < 0.9, so the third is needed; 0.95 >= 0.9 ends it
        (4, 0.75, {0, 1}),  # what is better than the third already reaches 0.75
        (4, 0.01, {0}),
        (1, 1.0, {0}),
        (2, 0.7, {0, 1}),  # among the two best 2/3 and 1/3: the first alone does not reach 0.7
        (2, 0.6, {0}),
    ],
)
def test_the_kept_set_is_the_smallest_that_reaches_top_p_among_the_top_k(top_k, top_p, kept):
    probability = torch.tensor([[0.5, 0.25, 0.2, 0.05]])
    top_p_B = None if top_p is None else torch.tensor([top_p])
    logp, ids = truncate(probability.log(), torch.tensor([top_k]), top_p_B)
    assert set(ids[logp > float("-inf")].tolist()) == kept
    expected = probability[0, sorted(kept)] / probability[0, sorted(kept)].sum()
    torch.testing.assert_close(logp[logp > float("-inf")].exp(), expected)


def test_rows_of_a_batch_are_truncated_each_by_its_own_rule():
    logit = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(3, 1)
    logp, _ = truncate(logit, torch.tensor([1, 2, 4]), torch.tensor([1.0, 1.0, 0.01]))
    assert (logp > float("-inf")).sum(-1).tolist() == [1, 2, 1]


def test_samples_follow_the_kept_distribution_and_never_leave_it():
    torch.manual_seed(0)
    logp = torch.tensor([[0.6, 0.3, 0.1, 0.0]]).log().repeat(20000, 1)
    share = draw(logp, {})[:, 0].bincount(minlength=4) / 20000
    torch.testing.assert_close(share, torch.tensor([0.6, 0.3, 0.1, 0.0]), atol=0.015, rtol=0)
    assert share[3] == 0


def test_a_rows_own_generator_decides_alone():
    logp = torch.zeros(3, 50).log_softmax(-1)
    one, two = (draw(logp, {1: torch.Generator().manual_seed(7)}) for _ in range(2))
    assert one[1] == two[1]


def test_a_draw_of_an_unfinished_prompt_is_undone():
    generators = {0: torch.Generator().manual_seed(3)}
    logp = torch.zeros(1, 1000).log_softmax(-1)
    first = draw(logp, rewindable(generators))
    generators[0].set_offset(generators[0].get_offset() - 4)  # what vLLM does
    assert draw(logp, rewindable(generators)) == first
    assert draw(logp, rewindable(generators)) != first


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=8))
def test_a_step_is_planned_so_that_every_token_sees_its_own_past_and_no_more(sequences):
    block_size, start, starts, lengths = 4, 0, [0], []
    for new, past in sequences:
        start += new
        starts.append(start)
        lengths.append(past + new)
    table = torch.arange(len(sequences) * 8).view(-1, 8)
    covered = []
    for bucket in buckets(starts, lengths, table, block_size):
        flat = bucket.token_BT.flatten()
        real = torch.arange(len(flat)) if bucket.real is None else bucket.real
        covered += flat[real].tolist()
        for row, tokens in enumerate(bucket.token_BT.tolist()):
            i = next(i for i in range(len(sequences)) if starts[i] <= tokens[0] < starts[i + 1])
            assert bucket.block_BN[row].tolist() == table[i, : bucket.block_BN.shape[1]].tolist()
            for column, token in enumerate(tokens):
                position = lengths[i] - starts[i + 1] + token
                visible = bucket.visible_BTL[row, column].nonzero()[:, 0].tolist()
                assert visible == list(range(position + 1))
    assert sorted(covered) == list(range(start))


def test_stacked_experts_are_sent_one_by_one():
    stack, down = torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    weights = [("a.weight", down[0]), ("l.experts.gate_up_proj", stack), ("l.experts.down_proj", down)]
    sent = dict(one_by_one(weights))
    assert list(sent) == [
        "a.weight",
        *(f"l.experts.{i}.{name}_proj.weight" for i in range(2) for name in ("gate", "up")),
        *(f"l.experts.{i}.down_proj.weight" for i in range(2)),
    ]
    assert (sent["l.experts.1.up_proj.weight"] == stack[1, 3:]).all()
    assert (sent["l.experts.1.gate_proj.weight"] == stack[1, :3]).all()
