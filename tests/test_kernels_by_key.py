import pytest
import torch
from kernel_checks import DEVICE, DTYPES, needs_gpu, poisoned, relative_error

from trimtab.kernels import by_key
from trimtab.kernels.by_key import slots_by_key, sum_by_key

SIZES = [(1, 8, 12), (33, 16, 40), (10, 70, 100), (130, 24, 24), (3, 2100, 4000)]


def random_ids(N, K, M, seed=0):
    """Distinct keys in each row with -1 anywhere; one query in five has no key, key 0 is a sink."""
    generator = torch.Generator().manual_seed(seed)
    ids_NK = torch.stack([torch.randperm(M, generator=generator)[:K] for _ in range(N)])
    ids_NK = ids_NK.masked_fill(torch.rand(ids_NK.shape, generator=generator) < 0.3, -1)
    ids_NK[:, 0] = ids_NK[:, 0].where((ids_NK[:, 1:] == 0).any(-1), 0)
    ids_NK[1::5] = -1
    return ids_NK.int().to(DEVICE)


def expected_order(ids_NK):
    order_E = ids_NK.flatten().long().sort(stable=True)
    return order_E.indices[order_E.values >= 0]


@pytest.mark.parametrize(("N", "K", "M"), SIZES)
def test_slots_are_in_the_order_of_a_stable_sort(N, K, M):
    ids_NK = random_ids(N, K, M)
    with poisoned():
        order_E, offset_M = slots_by_key(ids_NK, M)
    used = int(offset_M[-1])
    assert torch.equal(order_E[:used].long(), expected_order(ids_NK))
    assert torch.equal(offset_M.diff(), ids_NK[ids_NK >= 0].long().bincount(minlength=M))


def test_the_order_does_not_depend_on_how_many_queries_a_program_counts(monkeypatch):
    ids_NK = random_ids(130, 24, 50)
    monkeypatch.setattr("trimtab.kernels.by_key.COUNTERS_AT_ONCE", 130)
    order_E, offset_M = slots_by_key(ids_NK, 50)
    assert torch.equal(order_E[: int(offset_M[-1])].long(), expected_order(ids_NK))


def test_a_selection_without_keys_has_no_slots():
    for ids_NK in (torch.full((5, 8), -1, dtype=torch.int32, device=DEVICE), torch.empty(0, 8, device=DEVICE).int()):
        slots = slots_by_key(ids_NK, 7)
        assert slots.offset_M.tolist() == [0] * 8
        with poisoned():
            assert torch.equal(sum_by_key(torch.ones(ids_NK.numel(), 3, device=DEVICE), slots).cpu(), torch.zeros(7, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "M"), SIZES[:3])
@pytest.mark.parametrize("C", [1, 48, 576])
def test_rows_are_summed_by_key(N, K, M, C, dtype):
    ids_NK = random_ids(N, K, M)
    x_EC = torch.randn(N * K, C, device=DEVICE).to(dtype)
    x_EC[ids_NK.flatten() < 0] = float("nan")
    used_E = ids_NK.flatten() >= 0
    expected_MC = torch.zeros(M, C, dtype=torch.float64, device=DEVICE)
    expected_MC.index_add_(0, ids_NK.flatten()[used_E].long(), x_EC[used_E].double())
    with poisoned():
        slots = slots_by_key(ids_NK, M)
        once_MC = sum_by_key(x_EC, slots)
    assert relative_error(once_MC, expected_MC) < 1e-6
    assert relative_error(sum_by_key(x_EC, slots, once_MC.clone()), 2 * expected_MC) < 1e-6


@needs_gpu
def test_sums_are_the_same_every_time():
    ids_NK = torch.rand(512, 8192, device=DEVICE).topk(2048).indices.int()
    x_EC = torch.randn(512 * 2048, 576, device=DEVICE, dtype=torch.bfloat16)
    first = sum_by_key(x_EC, slots_by_key(ids_NK, 8192))
    assert all(torch.equal(first, sum_by_key(x_EC, slots_by_key(ids_NK, 8192))) for _ in range(25))


def test_slots_that_need_int64_are_placed_like_others(monkeypatch):
    ids_NK = torch.stack([torch.randperm(40, device=DEVICE)[:16] for _ in range(33)]).int()
    narrow = slots_by_key(ids_NK, 40)
    monkeypatch.setattr(by_key, "SLOTS_IN_INT32", 1)
    wide = slots_by_key(ids_NK, 40)
    assert wide.order_E.dtype == torch.int64 and wide.offset_M.is_contiguous()
    assert torch.equal(wide.order_E, narrow.order_E.long()) and torch.equal(wide.offset_M, narrow.offset_M)
