"""Weights between trainer and engine: chunks, buffers, arrays and sums, without an engine."""

import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.rollout.engine.weights import ALIGNMENT, checksums, fill, tensor_group, to_arrays, to_tensors, views

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=GENERATOR).to(dtype)


def zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


MIXED = [
    ("a", random(3, dtype=torch.bfloat16)),  # 6 bytes: what follows must not begin there
    ("b", random(2, 5)),
    ("c", torch.tensor(1.5)),
    ("d", torch.tensor([[1, -2]], dtype=torch.int64)),
    ("e", random(4, 3, dtype=torch.bfloat16).T),  # not contiguous
]


@pytest.mark.parametrize("size", [1, 40, 80, 1 << 12])
def test_what_is_laid_into_a_buffer_is_found_there_whatever_its_size(size):
    found = {}
    for buffer, layout in fill(MIXED, zeros, size):
        assert all(offset % ALIGNMENT == 0 for offset in layout.offsets) and layout.size <= len(buffer)
        found |= {name: tensor.clone() for name, tensor in views(buffer, layout)}
    assert list(found) == [name for name, _ in MIXED]
    for name, tensor in MIXED:
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_tensor_is_copied_before_the_next_is_asked_for():
    """A sharded trainer lets go of a layer's weights as soon as the next layer's are gathered."""

    def source() -> Iterator[tuple[str, Tensor]]:
        memory = torch.zeros(4)
        for i in range(3):
            yield f"w{i}", memory.fill_(i)

    ((buffer, layout),) = fill(source(), zeros, 1 << 10)
    assert [tensor.tolist() for _, tensor in views(buffer, layout)] == [[float(i)] * 4 for i in range(3)]
    assert [tensor.tolist() for _, tensor in to_tensors(to_arrays(source()))] == [[float(i)] * 4 for i in range(3)]


def test_chunks_stay_within_the_buffer_but_for_a_single_tensor_that_is_larger():
    """Of 96 bytes, and with a buffer of 200: two and two, then a larger buffer for 400, then the last."""
    weights = [(f"w{i}", random(24)) for i in range(4)] + [("large", random(100)), ("last", random(24))]
    sizes = [(len(buffer), layout.names) for buffer, layout in fill(weights, zeros, 200)]
    assert sizes == [(200, ["w0", "w1"]), (200, ["w2", "w3"]), (400, ["large"]), (400, ["last"])]


def test_a_stack_of_experts_that_does_not_fit_goes_expert_by_expert():
    gate_up, down = random(3, 8, 4), random(3, 4, 4)  # 384 and 192 bytes
    weights = [("l.experts.gate_up_proj", gate_up), ("l.experts.down_proj", down)]
    found = {}
    for buffer, layout in fill(weights, zeros, 256):
        assert len(buffer) == 256
        found |= {name: tensor.clone() for name, tensor in views(buffer, layout)}
    assert list(found) == [
        *(f"l.experts.{i}.{half}_proj.weight" for i in range(3) for half in ("gate", "up")),
        "l.experts.down_proj",
    ]
    assert torch.equal(found["l.experts.2.up_proj.weight"], gate_up[2, 4:])
    assert torch.equal(found["l.experts.down_proj"], down)


def test_nothing_to_send_is_no_chunk():
    assert list(fill([], zeros, 64)) == []


def test_arrays_hold_every_bit_and_are_not_pickled():
    arrays = to_arrays(MIXED)
    for (name, sent), (came, tensor) in zip(MIXED, to_tensors(arrays), strict=True):
        assert name == came and tensor.dtype == sent.dtype and torch.equal(tensor, sent)
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(to_arrays([("w", random(1 << 16, dtype=torch.bfloat16))]), 5, buffer_callback=buffers.append)
    assert len(pickled) < 1000 and sum(buffer.raw().nbytes for buffer in buffers) == 1 << 17


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embed"),
        ("model.layers.3.self_attn.qkv_proj.weight", "layers.3.attention"),
        ("model.layers.3.self_attn.indexer.k_norm.bias", "layers.3.attention"),
        ("model.layers.3.self_attn.q_norm.weight", "layers.3.attention"),
        ("model.layers.12.mlp.gate_up_proj.weight", "layers.12.mlp"),
        ("model.layers.12.mlp.gate_proj.weight", "layers.12.mlp"),
        ("model.layers.12.mlp.experts.w13_weight", "layers.12.mlp"),
        ("model.layers.12.mlp.gate.e_score_correction_bias", "layers.12.router"),
        ("model.layers.12.mlp.shared_experts.down_proj.weight", "layers.12.mlp"),
        ("model.layers.0.post_attention_layernorm.weight", "layers.0.norm"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "head"),
        ("score.weight", "score.weight"),
    ],
)
def test_a_weight_belongs_to_a_part_of_the_model(name, group):
    assert tensor_group(name) == group


def test_fused_weights_sum_as_their_parts_do():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    parts = dict(LlamaForCausalLM(config).to(torch.bfloat16).named_parameters())
    fused = {}
    for name, weight in parts.items():
        for old, new in (("q_proj", "qkv_proj"), ("k_proj", "qkv_proj"), ("v_proj", "qkv_proj")):
            name = name.replace(old, new)
        fused[name] = torch.cat([fused[name], weight]) if name in fused else weight
    assert len(fused) < len(parts)
    ours, theirs = checksums(parts.items()), checksums(fused.items())
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)
    assert ours["layers.0.norm"] == 64  # two norms of 32 ones


def test_a_group_with_a_weight_that_cannot_be_read_is_left_out():
    weights = [
        ("model.layers.0.mlp.a", random(2)),
        ("model.layers.0.mlp.b", torch.empty(0)),
        ("lm_head.weight", torch.ones(3)),
    ]
    assert checksums(weights) == {"head": 3.0}
