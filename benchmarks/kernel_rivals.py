"""Other people's kernels behind our signatures, for comparison. Each function raises where theirs cannot be loaded.

FlashMLA and DeepGEMM come in vLLM's wheel. TileLang's examples (its folder examples/deepseek_v32) must be given.
Shape suffixes as in trimtab.kernels.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor

LOG2E = 1.4426950408889634
Forward = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(q_NHC, kv_MC, ids_NK, scale) -> O [N, H, 512]."""
Scores = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q_NHD and k_MD in e4m3, k_scale_M, w_NH with q's scale, start_N, end_N) -> [N, M]."""


def flashmla() -> Forward:
    """Heads are padded to a multiple of 64, the least it takes."""
    importlib.import_module("vllm._flashmla_C")
    sparse_forward = importlib.import_module("vllm.third_party.flashmla.flash_mla_interface").flash_mla_sparse_fwd

    def forward(q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, scale: float) -> Tensor:
        H = q_NHC.shape[1]
        padded = q_NHC if H % 64 == 0 else F.pad(q_NHC, (0, 0, 0, -H % 64))
        return sparse_forward(padded, kv_MC[:, None], ids_NK[:, None], scale, d_v=512)[0][:, :H]

    return forward


def tilelang_forward(folder: Path) -> Forward:
    """Its causal mask lets every query see every key if the queries begin after the last key."""
    interface = _example(folder, "sparse_mla_fwd_pipelined").sparse_mla_fwd_interface

    def forward(q_NHC: Tensor, kv_MC: Tensor, ids_NK: Tensor, scale: float) -> Tensor:
        q, kv, ids = q_NHC[None], kv_MC[None, :, None], ids_NK[None, :, None]
        return interface(q, kv, ids, len(kv_MC), 1, sm_scale=scale)[0][0]

    return forward


def tilelang_backward(
    folder: Path,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """(q, kv, O, dO, ids, lse in nats, scale) -> (dq, dkv); it masks ids above the index of their query."""
    interface = _example(folder, "sparse_mla_bwd").sparse_mla_bwd

    def backward(
        q_NHC: Tensor, kv_MC: Tensor, out: Tensor, grad: Tensor, ids_NK: Tensor, lse_NH: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        kv, ids = kv_MC[None, :, None], ids_NK[None, :, None]
        dq, dkv = interface(q_NHC[None], kv, out[None], grad[None], ids, lse_NH[None] * LOG2E, sm_scale=scale)
        return dq[0], dkv[0, :, 0]

    return backward


def deepgemm_scores() -> Scores:
    logits = importlib.import_module("vllm.third_party.deep_gemm").fp8_mqa_logits
    return lambda q, k, k_scale, w, start, end: logits(q, (k, k_scale), w, start, end)


def tilelang_scores(folder: Path) -> Scores:
    interface = _example(folder, "fp8_lighting_indexer").mqa_attn_return_logits_interface
    return lambda q, k, k_scale, w, start, end: interface(q, k, k_scale, w, start, end, clean_logits=False)


def tilelang_topk(folder: Path) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    """(score_NM, start_N, end_N, topk) -> ids [N, topk] in no fixed order."""
    return _example(folder, "topk_selector").tl_topk


def _example(folder: Path, name: str) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # they import each other by plain names
    return importlib.import_module(name)
