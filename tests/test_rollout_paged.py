"""The GPU's step over the paged cache: the plan against positions counted one by one, attention against the CPU's."""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_rollout_engine import SAMPLING, config, prompt, run
from tiny import save_tiny_deepseek
from torch import Tensor

from trimtab.kernels import reference
from trimtab.rollout.engine.dsa import model as dsa_model
from trimtab.rollout.engine.dsa.model import DsaAttention, DsaMetadata, Indexer, buckets
from trimtab.rollout.engine.dsa.modules import Experts, Norm
from trimtab.rollout.engine.dsa.paged import DecodeStep, plan_step
from trimtab.rollout.engine.engine import Engine
from trimtab.rollout.types import Request

BLOCK = 4


@dataclass
class Batch:
    """Sequences of a step, as the engine describes them: (tokens so far, new ones) each, in scattered blocks."""

    sequences: list[tuple[int, int]]
    seed: int = 0

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.start_B1 = torch.tensor([0, *(new for _, new in self.sequences)], dtype=torch.int32).cumsum(0).int()
        self.length_B = torch.tensor([length for length, _ in self.sequences], dtype=torch.int32)
        widest = -(-int(self.length_B.max()) // BLOCK) + 2
        blocks = rng.sample(range(1, 200), len(self.sequences) * widest)
        self.table = torch.tensor(blocks, dtype=torch.int32).view(-1, widest)
        self.slot_N = torch.tensor([rows[-new + i] for rows, new in self._rows() for i in range(new)])

    def _rows(self) -> list[tuple[list[int], int]]:
        """The cache rows of each sequence's tokens, and how many are new."""
        return [
            ([int(self.table[b, i // BLOCK]) * BLOCK + i % BLOCK for i in range(length)], new)
            for b, (length, new) in enumerate(self.sequences)
        ]

    def described(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.start_B1, self.length_B, self.table

    def visible(self) -> list[list[int]]:
        """The cache rows that each new token sees."""
        return [rows[: len(rows) - new + i + 1] for rows, new in self._rows() for i in range(new)]


BATCHES = {
    "one token of one sequence": [(1, 1)],
    "prompts": [(5, 5), (9, 9), (1, 1)],
    "decoding": [(7, 1), (30, 1), (1, 1), (16, 1)],
    "a chunk, a prefix hit, a prompt and decoding": [(40, 13), (21, 3), (8, 8), (33, 1), (4, 1)],
}


@pytest.mark.parametrize("topk", [3, 64])
@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
def test_the_plan_leads_every_token_to_the_rows_it_sees(sequences, topk):
    batch = Batch(sequences)
    step = plan_step(batch.start_B1, batch.length_B, batch.table, batch.slot_N, BLOCK, topk)
    ranges = zip(step.start_N.tolist(), step.end_N.tolist(), strict=True)
    assert [step.row_M[start:end].tolist() for start, end in ranges] == batch.visible()
    assert step.slot_N.tolist() == batch.slot_N.tolist() and step.slot_N.dtype == step.row_M.dtype == torch.int64
    assert step.slot_M1.tolist() == [*step.row_M.tolist(), -1]
    assert step.start_N.dtype == step.end_N.dtype == step.slot_M1.dtype == torch.int32
    if max(length for length, _ in sequences) > topk:
        assert step.visible_NK is None
    else:
        assert step.visible_NK is not None and step.visible_NK.shape[1] <= topk
        assert [[row for row in rows if row >= 0] for rows in step.visible_NK.tolist()] == batch.visible()


def index_topk(
    q_NHD: Tensor, k: Tensor, w_NH: Tensor, start_N: Tensor, end_N: Tensor, topk: int, *, longest: int, row_M: Tensor
) -> Tensor:
    """The kernel's stand-in."""
    assert longest == int((end_N - start_N).max()), (longest, start_N, end_N)
    position_M = torch.arange(len(row_M))
    visible_NM = (start_N[:, None] <= position_M) & (position_M < end_N[:, None])
    score_NM = reference.index_scores(q_NHD, k[row_M], w_NH, visible_NM)
    ids_NK = reference.selected_ids(reference.select(score_NM, topk), topk)
    return torch.nn.functional.pad(ids_NK, (0, topk - ids_NK.shape[1]), value=-1).int()


def paged_topk(
    q_BHD: Tensor,
    k: Tensor,
    w_BH: Tensor,
    page_BP: Tensor,
    length_B: Tensor,
    topk: int,
    *,
    page_size: int,
    width: int,
    rows: bool = True,
) -> Tensor:
    """The kernel's stand-in."""
    position_L = torch.arange(width)
    row_BL = page_BP[:, position_L // page_size].long() * page_size + position_L % page_size
    visible_BL = position_L < length_B[:, None]
    score_B1L = reference.index_scores(q_BHD[:, None], k[row_BL], w_BH[:, None], visible_BL[:, None])
    ids_BK = reference.selected_ids(reference.select(score_B1L[:, 0], topk), topk)
    row_BK = torch.where(ids_BK < 0, -1, row_BL.gather(1, ids_BK.clamp(min=0))) if rows else ids_BK
    return torch.nn.functional.pad(row_BK, (0, topk - row_BK.shape[1]), value=-1).int()


def decode_mla(q: Tensor, kv: Tensor, ids: Tensor, used: Tensor, value_dim: int, scale: float) -> Tensor:
    """The kernel's stand-in."""
    assert ((ids >= 0).sum(1) <= used).all(), (ids, used)
    return sparse_mla(q, kv, ids, value_dim, scale)[0]


def sparse_mla(q: Tensor, kv: Tensor, ids: Tensor, value_dim: int, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel's stand-in."""
    assert ids.dtype == torch.int32 and kv.stride(0) > kv.shape[1], "a view of the wider cache, not a copy"
    return reference.sparse_mla(q, kv, ids.long(), value_dim, scale)


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with the kernels' stand-ins, and with the kernels themselves in Triton's interpreter."""
    if request.param == "reference":
        stand_in(monkeypatch)
    return request.param


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    selection: Any = SimpleNamespace(index_topk=index_topk, paged_topk=paged_topk)
    attention: Any = SimpleNamespace(sparse_mla=sparse_mla, decode_mla=decode_mla)
    monkeypatch.setitem(sys.modules, "trimtab.kernels.indexer", selection)
    monkeypatch.setitem(sys.modules, "trimtab.kernels.sparse_mla", attention)


H, INDEX_H, C, R, D = 3, 2, 16, 8, 16


def attention_layer(topk: int) -> Any:
    layer: Any = DsaAttention.__new__(DsaAttention)
    torch.nn.Module.__init__(layer)
    layer.C, layer.R, layer.D, layer.topk, layer.scale = C, R, D, topk, 0.2
    return layer


def inputs(N: int) -> tuple[Tensor, ...]:
    """Cache, queries, index queries and index weights."""
    torch.manual_seed(0)
    cache = torch.randn(200, BLOCK, C + R + D)
    return cache, torch.randn(N, H, C + R), torch.randn(N, INDEX_H, D), torch.rand(N, INDEX_H)


@pytest.mark.parametrize("topk", [6, 64])
@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
def test_attention_over_the_cache_equals_that_over_buckets(sequences, topk, kernels):
    batch, layer = Batch(sequences), attention_layer(topk)
    layer.kv_cache, *parts = inputs(len(batch.slot_N))
    plan = buckets(batch.start_B1.tolist(), batch.length_B.tolist(), batch.table, BLOCK)
    steps = [plan_step(batch.start_B1, batch.length_B, batch.table, batch.slot_N, BLOCK, topk)]
    if all(new == 1 for _, new in sequences):
        steps.append(DecodeStep(batch.slot_N, batch.length_B, batch.table, BLOCK, int(batch.length_B.max()) + 3))
    expected = layer._attend(*parts, DsaMetadata(batch.slot_N, buckets=plan))
    for step in steps:
        out = layer._attend(*parts, DsaMetadata(batch.slot_N, step))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
def test_recorded_selections_are_those_of_buckets_and_change_no_bit(sequences, kernels):
    topk = 6
    batch, layer = Batch(sequences), attention_layer(topk)
    layer.kv_cache, *parts = inputs(len(batch.slot_N))
    plan = buckets(batch.start_B1.tolist(), batch.length_B.tolist(), batch.table, BLOCK)
    steps = [DsaMetadata(batch.slot_N, buckets=plan)]
    steps.append(DsaMetadata(batch.slot_N, plan_step(*batch.described(), batch.slot_N, BLOCK, topk)))
    if all(new == 1 for _, new in sequences):
        width = int(batch.length_B.max()) + 3
        steps.append(DsaMetadata(batch.slot_N, DecodeStep(batch.slot_N, batch.length_B, batch.table, BLOCK, width)))
    choose_N = torch.tensor([len(rows) > topk for rows in batch.visible()])
    found: list[Tensor] = []
    for step in steps:
        without = layer._attend(*parts, step)
        recorded: list[Tensor] = []
        layer.records, layer.capture_fn = True, recorded.append
        assert torch.equal(layer._attend(*parts, step), without)
        layer.records = False
        if choose_N.any():
            (ids_NK,) = recorded
            found.append(ids_NK[choose_N].long())
    for ids_NK in found:
        assert torch.equal(ids_NK, found[0]) and (ids_NK >= 0).all() and (ids_NK.diff(dim=1) > 0).all()


def test_sequences_that_pad_a_decoding_step_give_zero(kernels):
    batch, layer = Batch(BATCHES["decoding"]), attention_layer(6)
    layer.kv_cache, *parts = inputs(7)
    pad = torch.nn.functional.pad
    padded = pad(batch.slot_N, (0, 3), value=-1), pad(batch.length_B, (0, 3)), pad(batch.table, (0, 0, 0, 3))
    alone, together = (
        layer._attend(*(x[:n] for x in parts), DsaMetadata(tensors[0], DecodeStep(*tensors, BLOCK, 32)))
        for n, tensors in ((4, (batch.slot_N, batch.length_B, batch.table)), (7, padded))
    )
    assert torch.equal(together[:4], alone) and not together[4:].any()


def test_projections_in_kernels_are_the_plain_ones_and_cache_the_same_rows():
    layer, hidden, nope, Q = attention_layer(6), 24, 12, 20
    layer.H, layer.nope, layer.index_H = H, nope, INDEX_H
    layer._down_sizes, layer._up_sizes = [Q, C, R, D], [H * (nope + R), INDEX_H * D]
    torch.manual_seed(0)
    layer._down, layer._up = torch.randn(sum(layer._down_sizes), hidden), torch.randn(sum(layer._up_sizes), Q)
    layer.indexer = Indexer(layer._up, layer._down[-D:], torch.empty(0))
    layer.q_a_layernorm, layer.kv_a_layernorm = Norm(Q, 1e-6), Norm(C, 1e-6)
    for weight in (layer.q_a_layernorm.weight, layer.kv_a_layernorm.weight, *layer.indexer.k_norm.parameters()):
        weight.data.normal_()
    x, w_uk, angle = torch.randn(5, hidden), torch.randn(H, nope, C), torch.randn(5, 1, R // 2)
    turn, slot_N = torch.polar(torch.ones_like(angle), angle), torch.tensor([3, 9, -1, 40, 8])
    results = []
    for project in (layer._project, layer._project_in_kernels):
        layer.kv_cache = torch.zeros(12, BLOCK, C + R + D)
        results.append((*project(x, w_uk, turn, slot_N), layer.kv_cache[1:]))  # the first block is nobody's
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    assert layer._project_in_kernels(x, w_uk, turn, None)[0].shape == (5, H, C + R)


@pytest.mark.parametrize(
    ("dtype", "kinds", "possible"),
    [
        (torch.float32, ["dense", "sparse"], False),
        (torch.float32, ["dense", "dense"], True),
        (torch.bfloat16, ["dense", "sparse"], True),
    ],
)
def test_graphs_hold_every_policy_but_one_with_experts_of_fp32(dtype, kinds, possible):
    config = {"num_hidden_layers": 2, "mlp_layer_types": kinds}
    assert dsa_model.graphs_possible(config, dtype) == possible


def test_experts_take_ids_of_either_width():
    config = SimpleNamespace(n_routed_experts=5, moe_intermediate_size=8, hidden_size=16)
    experts = Experts(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_()
    x, ids, gate = torch.randn(7, 16), torch.randint(0, 5, (7, 2)), torch.rand(7, 2)
    assert torch.equal(experts(x, ids, gate), experts(x, ids.int(), gate))


def test_a_whole_engine_samples_the_same_over_the_paged_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Chunked prompts, prefix hits and decoding, within and beyond index_topk = 16."""
    save_tiny_deepseek(tmp_path)
    prompts = [prompt(5), prompt(40, 1), prompt(100, 2), prompt(100, 2) + prompt(30, 3)]
    requests = [Request(name=f"p{i}", prompt_ids=ids, sampling=SAMPLING, n=3, seed=i) for i, ids in enumerate(prompts)]
    results = []
    for paged in (False, True):
        if paged:
            stand_in(monkeypatch)
            monkeypatch.setattr(dsa_model, "_has_kernels", lambda device: True)
        engine = Engine(config(tmp_path))
        results.append(run(engine, requests))
        engine.close()
    for one, two in zip(*results, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), rtol=0, atol=1e-5)
