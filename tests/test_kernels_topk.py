"""Top-k of score rows: the set, order and ties of a stable sort."""

import pytest
import torch
from kernel_checks import DEVICE, needs_gpu, poisoned
from torch import Tensor

from trimtab.kernels import reference, topk


def _sorted_ids(score_NM: Tensor, k: int) -> Tensor:
    """The k best by a stable descending sort, without -inf, ascending, padded with -1."""
    score_NM = torch.where(score_NM == 0, 0.0, score_NM.cpu())
    value_NM, order_NM = score_NM.sort(dim=-1, descending=True, stable=True)
    order_NM = order_NM.masked_fill(value_NM == float("-inf"), score_NM.shape[1])[:, :k].sort(-1).values
    order_NM = order_NM.masked_fill(order_NM == score_NM.shape[1], -1)
    return torch.nn.functional.pad(order_NM, (0, max(0, k - score_NM.shape[1])), value=-1).int()


def _normal(n: int, m: int) -> Tensor:
    return torch.randn(n, m)


def _integers(n: int, m: int) -> Tensor:
    return torch.randint(-3, 4, (n, m)).float()


def _zeros_of_both_signs(n: int, m: int) -> Tensor:
    return torch.where(torch.rand(n, m) < 0.5, -0.0, 0.0)


def _relu(n: int, m: int) -> Tensor:
    return torch.randn(n, m).sub(1.5).relu()


def _negative(n: int, m: int) -> Tensor:
    return -torch.randn(n, m).abs() - torch.randint(0, 2, (n, m)) * 1e30


def _few_visible(n: int, m: int) -> Tensor:
    visible_N1 = torch.randint(0, min(m, 20) + 1, (n, 1))
    return torch.randn(n, m).masked_fill(torch.rand(n, m).argsort(-1) >= visible_N1, float("-inf"))


def _extreme(n: int, m: int) -> Tensor:
    biggest = torch.finfo(torch.float32).max
    choice = torch.tensor([biggest, -biggest, 0.0, 1e-45, -1e-45, float("inf"), float("-inf")])
    return choice[torch.randint(0, len(choice), (n, m))]


@pytest.mark.parametrize("rows", [_normal, _integers, _zeros_of_both_signs, _relu, _negative, _few_visible, _extreme])
@pytest.mark.parametrize("m, k, segment", [(1, 1, 64), (63, 64, 64), (130, 33, 256), (1000, 100, 1024), (200, 17, 64)])
def test_the_ids_are_those_of_a_stable_sort(rows, m, k, segment):
    torch.manual_seed(0)
    score_NM = rows(2, m)
    with poisoned():
        ids_NK = topk.topk_ids(score_NM.to(DEVICE), k, segment=segment)
    assert ids_NK.dtype == torch.int32
    assert torch.equal(ids_NK.cpu(), _sorted_ids(score_NM, k))


def test_the_ids_are_those_of_the_reference():
    torch.manual_seed(0)
    score_NM = _relu(9, 130).masked_fill(torch.rand(9, 130) < 0.3, float("-inf"))
    expected_NK = reference.selected_ids(reference.select(score_NM, 40), 40)
    assert torch.equal(topk.topk_ids(score_NM.to(DEVICE), 40).cpu().long(), expected_NK)


COUNTS = torch.tensor([200, 2, 64, 0, 90, 1, -3], dtype=torch.int32)


@pytest.mark.parametrize("segment", [64, 256])
def test_scores_after_the_count_of_a_row_are_not_read(segment):
    torch.manual_seed(0)
    score_NM = torch.randn(7, 200)
    hidden_NM = torch.arange(200) >= COUNTS[:, None]
    expected_NK = _sorted_ids(score_NM.masked_fill(hidden_NM, float("-inf")), 16)
    score_NM = score_NM.masked_fill(hidden_NM, float("inf")).to(DEVICE)
    strided_N = torch.stack([COUNTS, COUNTS + 9], 1).to(DEVICE)[:, 0]
    with poisoned():
        ids_NK = topk.topk_ids(score_NM, 16, count_N=strided_N, segment=segment)
    assert torch.equal(ids_NK.cpu(), expected_NK)


@pytest.mark.parametrize("segment", [64, 256])
def test_names_are_positions_moved_or_rows_of_pages(segment):
    torch.manual_seed(0)
    score_NM, count_N = torch.randn(7, 200, device=DEVICE), COUNTS.to(DEVICE)
    ids_NK = topk.topk_ids(score_NM, 16, count_N=count_N, segment=segment).long()
    first_N = torch.tensor([0, 5, 1 << 30, 7, 9, 3, 3], dtype=torch.int32, device=DEVICE)
    moved_NK = topk.topk_ids(score_NM, 16, count_N=count_N, first_N=first_N, segment=segment)
    assert torch.equal(moved_NK.long(), torch.where(ids_NK < 0, -1, ids_NK + first_N[:, None]))
    page_NP = torch.randperm(7 * 60, device=DEVICE).int().view(7, 60)[:, :50]  # 50 pages of 4 positions
    row_NK = topk.topk_ids(score_NM, 16, count_N=count_N, page_NP=page_NP, page_size=4, segment=segment)
    page_NK = page_NP.long().gather(1, ids_NK.clamp(min=0) // 4)
    assert torch.equal(row_NK.long(), torch.where(ids_NK < 0, -1, page_NK * 4 + ids_NK % 4))


def test_nan_is_never_selected():
    score_NM = torch.tensor([[1.0, float("nan"), 2.0, -float("nan")], [float("nan")] * 4])
    assert topk.topk_ids(score_NM.to(DEVICE), 3).tolist() == [[0, 2, -1], [-1, -1, -1]]


def test_rows_may_be_strided_or_absent():
    torch.manual_seed(0)
    score_NM = torch.randn(3, 100)
    assert torch.equal(topk.topk_ids(score_NM.to(DEVICE)[:, :70], 8).cpu(), _sorted_ids(score_NM[:, :70], 8))
    assert topk.topk_ids(score_NM.to(DEVICE)[:0], 8).shape == (0, 8)
    assert topk.topk_ids(score_NM.to(DEVICE)[:, :0], 2).tolist() == [[-1, -1]] * 3


@pytest.mark.parametrize("k, m", [(0, 10), (-1, 10), (33, 65)])
def test_a_topk_that_cannot_be_served_is_refused(k, m):
    with pytest.raises(ValueError, match=str(k)):
        topk.topk_ids(torch.zeros(1, m, device=DEVICE), k, segment=64)


@needs_gpu
@pytest.mark.parametrize("rows", [_normal, _relu, _zeros_of_both_signs, _few_visible])
@pytest.mark.parametrize("n, m, k", [(4096, 32768, 2048), (300, 131072, 2048), (1, 1 << 20, 2048), (70, 5000, 777)])
def test_long_rows_on_a_gpu(rows, n, m, k):
    torch.manual_seed(0)
    score_NM = rows(min(n, 64), m).repeat(-(-n // 64), 1)[:n]
    expected_NK = _sorted_ids(score_NM[:64], k).repeat(-(-n // 64), 1)[:n]
    first_NK = topk.topk_ids(score_NM.to(DEVICE), k)
    assert torch.equal(first_NK.cpu(), expected_NK)
    for _ in range(5):
        assert torch.equal(topk.topk_ids(score_NM.to(DEVICE), k), first_NK)
