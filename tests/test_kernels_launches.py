"""What Triton would compile for a policy's decoding: counted, and compiled for Hopper, on a machine without a GPU."""

import json
import os
import subprocess
import sys

import pytest

RECORD = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
TYPES[torch.uint32] = "*u32"
seen = {}

def specialised(parameter, value):
    # Triton's rule: the type of an argument, whether 16 divides it, and an integer that is 1, unless told otherwise.
    if parameter.is_constexpr or value is None or isinstance(value, bool):
        return "constexpr", value
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    if parameter.do_not_specialize:
        return kind, False
    return ("constexpr", 1) if value == 1 else (kind, value % 16 == 0)

def record(self, *args, grid, warmup, num_warps=4, num_stages=3, **kwargs):
    names = [p.name for p in self.params]
    values = dict(zip(names, args)) | kwargs
    key = tuple((name, *specialised(p, values[name])) for name, p in zip(names, self.params))
    seen[(self.__name__, key, num_warps, num_stages)] = self

JITFunction.run = record

from trimtab.kernels import decoder, indexer, masked_mha, sparse_mla
from trimtab.kernels.swiglu import swiglu
from trimtab.rollout.engine.dsa.paged import DecodeStep

H, topk, width, dtype = int(sys.argv[1]), 2048, 8192, torch.bfloat16
nope, C, R, D, index_H, Q, hidden = 128, 512, 64, 128, 16, 768, 1536
processors = 132

def splits(programs, tiles, device):
    return 1 << (max(1, min(tiles, 2 * processors // max(1, programs))).bit_length() - 1)

sparse_mla._splits = splits
cache, table = torch.zeros(64, C + R + D, dtype=dtype), torch.zeros(256, width // 16, dtype=torch.int32)
lengths, slots = torch.zeros(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int64)
gains = [torch.ones(n, dtype=dtype) for n in (Q, C, D, D, hidden)]

def layer(n):
    x, turn = torch.zeros(n, hidden, dtype=dtype), torch.zeros(n, 1, R // 2, dtype=torch.complex64)
    decoder.add_norm(x, None, gains[4], 1e-6)
    decoder.add_norm(x, x, gains[4], 1e-6)
    decoder.latent_rows(torch.zeros(n, Q + C + R + D, dtype=dtype), *gains[:4], turn, slots[:n], cache, 1e-6)
    q, up = torch.zeros(n, H, C + R, dtype=dtype), torch.zeros(n, H * (nope + R) + index_H * D, dtype=dtype)
    index_q = decoder.rotate_queries(up, turn, q, nope, index_H)
    step = DecodeStep(slots[:n], lengths[:n], table[:n], 16, width)
    step.attend(q, index_q, torch.zeros(n, index_H), cache, value_dim=C, topk=topk, scale=0.07)
    decoder.route(torch.zeros(n, 48), torch.zeros(48), 6, groups=1, groups_kept=1, normalise=True, scale=1.0)
    swiglu(torch.zeros(n, 1024, dtype=dtype))

for n in range(256, 0, -1) if sys.argv[2:] == ["count"] else (256, 17):
    layer(n)
if sys.argv[2:] == ["compile"]:  # and what else a policy with groups of experts, its prompts and its training launch
    decoder.route(torch.zeros(9, 256), torch.zeros(256), 8, groups=8, groups_kept=4, normalise=True, scale=1.0)
    q, k, w = torch.zeros(9, index_H, D, dtype=dtype), torch.zeros(9, D, dtype=dtype), torch.zeros(9, index_H)
    start, end = torch.zeros(9, dtype=torch.int32), torch.arange(1, 10, dtype=torch.int32)
    indexer.index_topk(q, k, w, start, end, topk, longest=9)
    indexer.index_topk(q, k, w, start, end, topk, row_M=torch.arange(9))
    indexer.index_scores(q, k, w, start, end)
    q, kv = (torch.zeros(*shape, C + R, dtype=dtype, requires_grad=True) for shape in ((9, H), (9,)))
    sparse_mla.sparse_mla(q, kv, torch.zeros(9, topk, dtype=torch.int32), C, 0.07)[0].sum().backward()
    masked_mha.selection_bits(torch.zeros(9, topk, dtype=torch.int32), start, end, 9)
result = {}
for name, *_ in seen:
    result[name] = result.get(name, 0) + 1
if sys.argv[2:] == ["compile"]:
    for (name, key, warps, stages), kernel in seen.items():
        print(name, file=sys.stderr, flush=True)
        source = ASTSource(
            fn=kernel,
            signature={name: kind for name, kind, _ in key},
            constexprs={(i,): value for i, (_, kind, value) in enumerate(key) if kind == "constexpr"},
            attrs={(i,): [["tt.divisibility", 16]] for i, (_, kind, value) in enumerate(key)
                   if kind != "constexpr" and value},
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages}
        )
        result[name] = compiled.metadata.shared
print(json.dumps(result))
"""
SHARED_MEMORY = 227 * 1024


def record(*arguments: str, cache: str) -> dict[str, int]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", RECORD, *arguments],
        env=environment | {"TRITON_CACHE_DIR": cache, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("heads", ["16", "128"])
def test_a_draining_batch_compiles_each_kernel_of_attention_once_or_twice(heads, tmp_path):
    """From 256 sequences to one, every number: an argument that follows the batch must not make a kernel anew."""
    variants = record(heads, "count", cache=str(tmp_path))
    attention = ("_paged_scores_kernel", "_mark_kernel", "_write_kernel", "_forward_kernel", "_combine_kernel")
    assert sum(variants[name] for name in attention) <= 8, variants
    # a norm with and without a sum before it, attention whole (part of a CPU's count alone) and in parts
    assert {name: n for name, n in variants.items() if n > 1}.keys() <= {
        "_add_norm_kernel", "_forward_kernel", "_combine_kernel",
    }, variants  # fmt: skip


def test_the_kernels_of_a_policy_compile_for_hopper(tmp_path):
    shared = record("16", "compile", cache=str(tmp_path))
    assert len(shared) == 17 and max(shared.values()) <= SHARED_MEMORY, shared
