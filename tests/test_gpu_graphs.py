"""Decoding of the DSA policy in CUDA graphs: the same bits as outside, whatever the engine writes before a replay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, needs_gpu
from test_rollout_engine import prompt, run
from tiny import save_tiny_deepseek
from torch import Tensor

from trimtab.kernels import decoder, reference
from trimtab.kernels.swiglu import swiglu
from trimtab.rollout.engine.dsa.paged import DecodeStep, plan_step
from trimtab.rollout.types import Request, Sampling

BLOCK, C, R, D, INDEX_H = 16, 512, 64, 128, 16


class Step:
    """A decoding step's buffers as the engine keeps them, and what a layer computes from them."""

    def __init__(self, B: int, H: int, width: int, topk: int, dtype: torch.dtype):
        torch.manual_seed(B + H)
        self.topk, self.dtype, self.B, self.width = topk, dtype, B, width
        blocks = width // BLOCK
        self.cache = torch.randn(B * blocks * BLOCK, C + R + D, device=DEVICE, dtype=dtype)
        self.table = torch.zeros(B, blocks, device=DEVICE, dtype=torch.int32)
        self.length = torch.ones(B, device=DEVICE, dtype=torch.int32)
        self.slot = torch.full((B,), -1, device=DEVICE)
        self.q = torch.randn(B, H, C + R, device=DEVICE, dtype=dtype)
        self.index_q = torch.randn(B, INDEX_H, D, device=DEVICE, dtype=dtype)
        self.weight = torch.rand(B, INDEX_H, device=DEVICE)
        self.step = DecodeStep(self.slot, self.length, self.table, BLOCK, width)

    def fill(self, lengths: list[int], seed: int) -> None:
        """What the engine writes between two steps; the sequences that are missing pad the batch."""
        torch.manual_seed(seed)
        n, blocks = len(lengths), self.table.shape[1]
        self.table.zero_()
        self.table[:n] = torch.randperm(self.B * blocks, device=DEVICE)[: n * blocks].view(n, blocks)
        self.length.zero_()
        self.length[:n] = torch.tensor(lengths)
        self.q.normal_()
        self.index_q.normal_()

    def attend(self) -> Tensor:
        return self.step.attend(
            self.q, self.index_q, self.weight, self.cache, value_dim=C, topk=self.topk, scale=(C + R) ** -0.5
        )


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("B", "H", "topk"), [(1, 16, 64), (32, 16, 2048), (8, 128, 64), (200, 16, 64)])
def test_attention_replayed_has_the_bits_of_eager_attention(B, H, topk, dtype):
    width = 6144 if B <= 32 else 1024
    step = Step(B, H, width, topk, dtype)
    step.fill([1] * B, 0)
    step.attend()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.attend()
    for seed, longest in ((1, width), (2, topk), (3, 2 * topk)):
        n = max(1, B - seed)
        lengths = [1 + (longest - 1) * i // max(1, n - 1) for i in range(n)] if n > 1 else [longest]
        step.fill([min(length, width) for length in lengths], seed)
        eager = step.attend()
        graph.replay()
        assert torch.equal(out, eager) and out.isfinite().all() and not out[n:].any()


@needs_gpu
@pytest.mark.parametrize("lengths", [[700, 3, 64, 65, 1], [40, 64]])
def test_a_decoding_step_is_the_mixed_step_of_one_token_a_sequence(lengths):
    step = Step(len(lengths), 16, 1024, 64, torch.float32)
    step.fill(lengths, 1)
    start_B1, length_B = torch.arange(len(lengths) + 1), torch.tensor(lengths)
    mixed = plan_step(start_B1, length_B, step.table, step.slot, BLOCK, step.topk)
    expected = mixed.attend(
        step.q, step.index_q, step.weight, step.cache, value_dim=C, topk=step.topk, scale=(C + R) ** -0.5
    )
    torch.testing.assert_close(step.attend(), expected, rtol=1e-5, atol=1e-5)
    row = step.cache[step.table[0].long().repeat_interleave(BLOCK)[: lengths[0]] * BLOCK
                     + torch.arange(lengths[0], device=DEVICE) % BLOCK].double()  # fmt: skip
    visible = torch.ones(1, lengths[0], dtype=torch.bool, device=DEVICE)
    score = reference.index_scores(step.index_q[:1].double(), row[:, C + R :], step.weight[:1].double(), visible)
    ids = reference.selected_ids(reference.select(score, step.topk), step.topk)
    out, _ = reference.sparse_mla(step.q[:1].double(), row[:, : C + R], ids, C, (C + R) ** -0.5)
    torch.testing.assert_close(expected[:1].double(), out, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_the_launches_of_a_layer_can_be_captured():
    x, gain = torch.randn(7, 1536, device=DEVICE).bfloat16(), torch.ones(1536, device=DEVICE).bfloat16()
    logit, bias = torch.randn(7, 48, device=DEVICE), torch.zeros(48, device=DEVICE)

    def layer() -> tuple[Tensor, ...]:
        routes = decoder.route(logit, bias, 6, groups=1, groups_kept=1, normalise=True, scale=1.0)
        return *decoder.add_norm(x, x, gain, 1e-6), swiglu(x), *routes

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = layer()
    x.normal_()
    logit.normal_()
    eager = layer()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outs, eager, strict=True))


@needs_gpu
@pytest.mark.parametrize("length", [9, 150])
def test_an_engine_samples_the_same_bits_with_graphs_and_without(length, tmp_path: Path):
    """One request of eight samples: they decode and end together, so both engines multiply matrices of one size."""
    from trimtab.rollout.engine.engine import Engine, EngineConfig

    save_tiny_deepseek(tmp_path, initializer_range=0.1)
    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=64, max_tokens=60)
    request = Request(name="p", prompt_ids=prompt(length), sampling=sampling, n=8, seed=1)
    results = []
    for graphs in (False, True):
        options: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_bytes": 64 << 20}
        engine = Engine(EngineConfig(model=str(tmp_path), dtype="bfloat16", graphs=graphs, **options))
        results.append(run(engine, [request])[0])
        engine.close()
    for eager, graph in zip(*results, strict=True):
        for name in ("token_ids", "logp", "kept_ids", "kept_offsets", "routes"):
            assert np.array_equal(getattr(eager, name), getattr(graph, name)), name
