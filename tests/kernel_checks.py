"""Where kernel tests run: on the GPU if there is one, else in Triton's interpreter on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if HAS_GPU else torch.float16]
"""The interpreter multiplies bf16 as raw bits, so the CPU tests half precision in fp16."""

FORWARD = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
GRADIENT = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error against float64."""

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


def relative_error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected||; infinite if result holds a NaN. Equal infinities count as equal."""
    result, expected = result.detach().double().cpu(), expected.detach().double().cpu()
    assert result.shape == expected.shape, (result.shape, expected.shape)
    same = (result == expected) & expected.isinf()
    result, expected = result.masked_fill(same, 0.0), expected.masked_fill(same, 0.0)
    error = ((result - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Inside, the host fails where it would wait for the GPU; that it does is shown first."""
    value = torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            value.item()
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN, or the largest integer, inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
