"""Attention in tiles, over visible or selected keys, against the plain reference in float64."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, FORWARD, GRADIENT, needs_gpu, poisoned, relative_error
from torch import Tensor

from trimtab.kernels import reference
from trimtab.kernels.masked_mha import masked_mha, selection_bits


def causal_ranges(*lengths: int) -> tuple[Tensor, Tensor]:
    """Ranges of packed sequences: from the sequence's start to the token itself."""
    start_N = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    return start_N.int().to(DEVICE), torch.arange(1, sum(lengths) + 1, dtype=torch.int32, device=DEVICE)


def random_ids(start_N: Tensor, end_N: Tensor, K: int) -> Tensor:
    """K random visible keys of each query in random order, -1 where there are fewer."""
    position_M = torch.arange(int(end_N.max()), device=start_N.device)
    visible_NM = (position_M >= start_N[:, None]) & (position_M < end_N[:, None])
    order_NM = torch.rand(visible_NM.shape, device=start_N.device).masked_fill(~visible_NM, 2.0).argsort(-1)[:, :K]
    ids_NK = order_NM.masked_fill(~visible_NM.gather(-1, order_NM), -1).int()
    return torch.nn.functional.pad(ids_NK, (0, K - ids_NK.shape[1]), value=-1)


def selected(ids_NK: Tensor | None, start_N: Tensor, end_N: Tensor, M: int) -> Tensor:
    position_M = torch.arange(M, device=start_N.device)
    visible_NM = (position_M >= start_N[:, None]) & (position_M < end_N[:, None])
    if ids_NK is None:
        return visible_NM
    return visible_NM & (ids_NK[:, :, None] == position_M).any(1)


def worst_error(
    N: int, M: int, H: int, D: int, V: int, ids_NK: Tensor | None, start_N: Tensor, end_N: Tensor, dtype: torch.dtype
) -> float:
    """The largest error of masked_mha and its gradients against float64; 1 is the most that is allowed."""
    scale = D**-0.5
    q, k, v = (torch.randn(n, H, d, device=DEVICE).to(dtype).requires_grad_() for n, d in ((N, D), (M, D), (M, V)))
    dout = torch.randn(N, H, V, device=DEVICE).to(dtype)
    with poisoned():
        out, lse = masked_mha(q, k, v, ids_NK, start_N, end_N, scale)
        grads = torch.autograd.grad(out, (q, k, v), dout)

    selected_NM = selected(ids_NK, start_N, end_N, M)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    score_NHM = torch.einsum("nhd,mhd->nhm", q64, k64) * scale
    score_NHM = score_NHM.masked_fill(~selected_NM[:, None], float("-inf"))
    lowest = torch.finfo(torch.float64).min
    prob_NHM = score_NHM.clamp(min=lowest).softmax(-1) * selected_NM[:, None]
    expected = torch.einsum("nhm,mhv->nhv", prob_NHM, v64)
    expected_grads = torch.autograd.grad(expected, (q64, k64, v64), dout.double())
    assert relative_error(reference.masked_mha(q64, k64, v64, selected_NM, scale), expected) < 1e-5
    values = (out, expected), (lse, score_NHM.logsumexp(-1))
    errors = [relative_error(*pair) / FORWARD[dtype] for pair in values]
    errors += [relative_error(*pair) / GRADIENT[dtype] for pair in zip(grads, expected_grads, strict=True)]
    return max(errors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "H", "D", "V", "K"),
    [
        ((63,), 3, 24, 16, None),
        ((63,), 3, 24, 16, 7),
        ((40, 1, 89), 1, 12, 8, None),
        ((40, 1, 89), 2, 48, 32, 64),
        ((130,), 1, 16, 24, 300),
    ],
)
def test_attention_and_its_gradients_match_float64_on_packed_sequences(lengths, H, D, V, K, dtype):
    torch.manual_seed(0)
    start_N, end_N = causal_ranges(*lengths)
    ids_NK = None if K is None else random_ids(start_N, end_N, K)
    assert worst_error(len(start_N), len(start_N), H, D, V, ids_NK, start_N, end_N, dtype) < 1


@pytest.mark.parametrize("K", [None, 5])
def test_ranges_need_not_be_causal_or_ordered_and_may_be_empty(K):
    torch.manual_seed(1)
    start_N = torch.tensor([70, 9, 35, 5, 90, 64, 3], dtype=torch.int32, device=DEVICE)
    end_N = torch.tensor([99, 4, 64, 6, 90, 97, 98], dtype=torch.int32, device=DEVICE)
    ids_NK = None if K is None else random_ids(start_N, end_N, K)
    assert worst_error(7, 99, 2, 16, 16, ids_NK, start_N, end_N, torch.float32) < 1
    assert worst_error(1, 99, 2, 16, 16, ids_NK[:1] if K else None, start_N[:1], end_N[:1], torch.float32) < 1


def test_queries_without_keys_give_zero_and_minus_infinity():
    q, k = torch.randn(5, 3, 16, device=DEVICE, requires_grad=True), torch.randn(300, 3, 16, device=DEVICE)
    start_N = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    ids_NK = torch.full((5, 4), -1, dtype=torch.int32, device=DEVICE)
    for ids, first_N, end_N in (
        (ids_NK, start_N, start_N + 5),
        (None, start_N, start_N),
        (None, start_N + 200, start_N + 200),
    ):
        with poisoned():
            out, lse = masked_mha(q, k, k, ids, first_N, end_N, 1.0)
            (grad,) = torch.autograd.grad(out.sum(), q)
        assert torch.equal(out, torch.zeros_like(out)) and torch.equal(grad, torch.zeros_like(grad))
        assert torch.equal(lse, torch.full_like(lse, float("-inf"))) and not lse.requires_grad


def test_bits_count_from_the_word_of_the_first_visible_key_and_drop_what_is_not_visible():
    start_N = torch.tensor([33, 0, 64], dtype=torch.int32, device=DEVICE)
    end_N = torch.tensor([100, 64, 66], dtype=torch.int32, device=DEVICE)
    ids_NK = torch.tensor([[33, 63, 99, -1], [31, 64, 0, 63], [65, 2, -1, 66]], dtype=torch.int32, device=DEVICE)
    top = -(2**31)
    # row 0 starts at word 1: keys 33 and 63 are its bits 1 and 31, key 99 is bit 3 of word 3; the widest range has 67
    # keys, which touch four words if they start at the end of one
    expected = [[top + 2, 0, 8, 0], [top + 1, top, 0, 0], [2, 0, 0, 0]]
    assert selection_bits(ids_NK, start_N, end_N).tolist() == expected


@needs_gpu
@pytest.mark.parametrize(("D", "V"), [(192, 128), (128, 128), (96, 64)])
@pytest.mark.parametrize("K", [None, 256])
def test_larger_sizes_match(D, V, K):
    torch.manual_seed(2)
    start_N, end_N = causal_ranges(700, 333, 130)
    ids_NK = None if K is None else random_ids(start_N, end_N, K)
    assert worst_error(1163, 1163, 5, D, V, ids_NK, start_N, end_N, torch.bfloat16) < 1


@needs_gpu
def test_a_repeated_run_gives_the_same_bits():
    torch.manual_seed(3)
    start_N, end_N = causal_ranges(1500, 548)
    ids_NK = random_ids(start_N, end_N, 512)
    q, k, v = (
        torch.randn(2048, 8, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for d in (192, 192, 128)
    )
    dout = torch.randn(2048, 8, 128, device=DEVICE, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        out, lse = masked_mha(q, k, v, ids_NK, start_N, end_N, 0.07)
        return [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]

    first = run()
    assert all(torch.equal(a, b) for _ in range(24) for a, b in zip(first, run(), strict=True))
