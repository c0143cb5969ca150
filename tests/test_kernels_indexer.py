"""The lightning indexer against its reference: scores, selection, FP8, and gradients of selected scores."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, FORWARD, GRADIENT, needs_gpu, poisoned, relative_error
from torch import Tensor

from trimtab.kernels import indexer, reference


def _inputs(n: int, m: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(n + m + heads)
    q_NHD = torch.randn(n, heads, width, device=DEVICE, dtype=dtype)
    k_MD = torch.randn(m, width, device=DEVICE, dtype=dtype)
    return q_NHD, k_MD, torch.randn(n, heads, device=DEVICE) * (heads * width) ** -0.5


def _causal(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """start_N, end_N of packed sequences."""
    start = [sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)]
    end = range(1, sum(lengths) + 1)
    return tuple(torch.tensor(list(x), dtype=torch.int32, device=DEVICE) for x in (start, end))  # type: ignore[return-value]


def _visible(start_N: Tensor, end_N: Tensor, m: int) -> Tensor:
    m_M = torch.arange(m, device=start_N.device)
    return (m_M >= start_N[:, None]) & (m_M < end_N[:, None])


def _exact_scores(q_NHD: Tensor, k_MD: Tensor, w_NH: Tensor) -> Tensor:
    return torch.einsum("nhm,nh->nm", torch.einsum("nhd,md->nhm", q_NHD.double(), k_MD.double()).relu(), w_NH.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width", [(64, 128), (4, 64), (3, 24), (16, 16), (1, 32)])
def test_scores_match_float64(heads, width, dtype):
    q_NHD, k_MD, w_NH = _inputs(70, 140, heads, width, dtype)
    start_N, end_N = _causal([70])
    start_N[5], end_N[5] = 9, 9  # an empty range
    start_N[66:], end_N[66:] = 130, 140  # all of the first block of keys is hidden
    with poisoned():
        score_NM = indexer.index_scores(q_NHD, k_MD, w_NH, start_N, end_N)
    visible_NM = _visible(start_N, end_N, 140)
    expected_NM = _exact_scores(q_NHD, k_MD, w_NH).masked_fill(~visible_NM, float("-inf"))
    assert relative_error(score_NM, expected_NM) < FORWARD[dtype]
    assert torch.equal(score_NM == float("-inf"), ~visible_NM)


def test_a_score_does_not_depend_on_the_batch_or_the_number_of_keys():
    q_NHD, k_MD, w_NH = _inputs(70, 140, 4, 32, DTYPES[1])
    start_N, end_N = torch.zeros(70, dtype=torch.int32, device=DEVICE), _causal([70])[1]
    score_NM = indexer.index_scores(q_NHD, k_MD, w_NH, start_N, end_N)
    for n in (0, 1, 33, 69):
        row = slice(n, n + 1)
        alone = indexer.index_scores(q_NHD[row], k_MD[: n + 1], w_NH[row], start_N[row], end_N[row])
        assert torch.equal(alone, score_NM[row, : n + 1])


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("lengths, k", [([40], 16), ([1, 40, 0, 25], 30), ([20], 64), ([1], 1)])
def test_the_selection_is_the_best_of_the_scores(lengths, k, known, monkeypatch):
    monkeypatch.setattr(indexer, "SCORES_AT_ONCE", 40 * 23)
    n = sum(lengths)
    q_NHD, k_MD, w_NH = _inputs(n, n, 4, 32, torch.float32)
    start_N, end_N = torch.stack(_causal(lengths), 1).unbind(1)  # strided
    longest = max(lengths) if known else None
    with poisoned():
        ids_NK = indexer.index_topk(q_NHD, k_MD, w_NH, start_N, end_N, k, longest=longest)
    score_NM = indexer.index_scores(q_NHD, k_MD, w_NH, start_N, end_N)
    expected_NK = reference.selected_ids(reference.select(score_NM, k), k)
    assert ids_NK.shape == (n, k) and ids_NK.dtype == torch.int32
    assert torch.equal(ids_NK[:, : expected_NK.shape[1]].long(), expected_NK)
    assert (ids_NK[:, expected_NK.shape[1] :] == -1).all()


def test_zero_scores_are_taken_in_order_of_position():
    q_NHD, k_MD, w_NH = _inputs(5, 100, 4, 32, torch.float32)
    q_NHD.zero_()
    start_N, end_N = torch.tensor([[0, 3, 50, 99, 100], [100, 99, 60, 100, 100]], dtype=torch.int32, device=DEVICE)
    ids_NK = indexer.index_topk(q_NHD, k_MD, w_NH, start_N, end_N, 4)
    assert ids_NK.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [50, 51, 52, 53], [99, -1, -1, -1], [-1] * 4]


def test_a_paged_cache_selects_the_same_positions():
    q_NHD, k_MD, w_NH = _inputs(7, 90, 4, 32, DTYPES[1])
    start_N, end_N = torch.zeros(7, dtype=torch.int32, device=DEVICE), torch.arange(84, 91, device=DEVICE).int()
    row_M = torch.randperm(200, device=DEVICE)[:90]
    cache = torch.full((200, 48), float("nan"), device=DEVICE, dtype=k_MD.dtype)
    cache[row_M, 8:40] = k_MD
    expected_NK = indexer.index_topk(q_NHD, k_MD, w_NH, start_N, end_N, 16)
    ids_NK = indexer.index_topk(q_NHD, cache[:, 8:40], w_NH, start_N, end_N, 16, row_M=row_M)
    assert torch.equal(ids_NK, expected_NK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size, k", [(16, 16), (3, 200)])
def test_a_decoding_step_selects_the_cache_rows_that_index_topk_selects(page_size, k, dtype):
    lengths, width = [40, 0, 1, 150, 16], 150
    q_NHD, k_MD, w_NH = _inputs(5, sum(lengths), 4, 32, dtype)
    pages = -(-width // page_size)
    page_BP = torch.randperm(5 * pages + 9, device=DEVICE)[: 5 * pages].int().view(5, pages)
    cache = torch.full(((5 * pages + 9) * page_size, 48), float("nan"), device=DEVICE, dtype=dtype)
    length_B = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    end_N = length_B.cumsum(0).int()
    row_M = torch.cat(
        [
            page_BP[b].long().repeat_interleave(page_size)[:length] * page_size
            + torch.arange(length, device=DEVICE) % page_size
            for b, length in enumerate(lengths)
        ]
    )
    cache[row_M, 8:40] = k_MD
    ids_NK = indexer.index_topk(q_NHD, k_MD, w_NH, end_N - length_B, end_N, k, longest=width).long()
    with poisoned():
        row_BK = indexer.paged_topk(q_NHD, cache[:, 8:40], w_NH, page_BP, length_B, k, page_size=page_size, width=width)
    assert torch.equal(row_BK.long(), torch.where(ids_NK < 0, -1, row_M[ids_NK.clamp(min=0)]))


def test_a_score_of_a_decoding_step_has_the_bits_of_index_scores():
    q_NHD, k_MD, w_NH = _inputs(3, 90, 4, 32, DTYPES[1])
    start_N, end_N = torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.full((3,), 90, device=DEVICE).int()
    expected_NM = indexer.index_scores(q_NHD, k_MD, w_NH, start_N, end_N)
    page_BP = torch.arange(23, dtype=torch.int32, device=DEVICE).expand(3, -1)
    rows: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer, "topk_ids", lambda score, topk, **_: rows.append(score) or score)
        k_RD = torch.nn.functional.pad(k_MD, (0, 0, 0, 2))
        indexer.paged_topk(q_NHD, k_RD, w_NH, page_BP, end_N, 4, page_size=4, width=92)
    assert torch.equal(rows[0][:, :90], expected_NM)


def test_queries_and_keys_of_two_types_are_refused_and_wider_weights_are_not():
    q_NHD, k_MD, w_NH = _inputs(3, 20, 4, 32, DTYPES[1])
    start_N, end_N = torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.full((3,), 20, device=DEVICE).int()
    assert w_NH.dtype == torch.float32 and indexer.index_topk(q_NHD, k_MD, w_NH, start_N, end_N, 4).min() >= 0
    with pytest.raises(ValueError, match="float32"):
        indexer.index_topk(q_NHD.float(), k_MD, w_NH, start_N, end_N, 4)
    with pytest.raises(ValueError, match="float32"):
        indexer.selected_scores(q_NHD.float(), k_MD, w_NH, torch.zeros(3, 1, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        indexer.index_topk(q_NHD, k_MD, w_NH[:, :3], start_N, end_N, 4)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain quantisation: the rotation by its definition (-1)^popcount(i & j), the rounding by torch."""
    width = x.shape[-1]
    sign = [[(-1) ** (i & j).bit_count() for j in range(width)] for i in range(width)]
    y = x.double() @ torch.tensor(sign, device=x.device, dtype=torch.float64) * width**-0.5
    scale = y.abs().amax(-1) / 448
    return (y / scale.masked_fill(scale == 0, 1.0)[..., None]).float().to(torch.float8_e4m3fn), scale.float()


ROUNDING = 3e-3 if DEVICE == "cuda" else 3e-2
"""A value next to a rounding boundary may fall on its other side; the interpreter drops the carry to the exponent."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 128), (130, 16), (0, 64)])
def test_fp8_rows_are_rotated_scaled_and_rounded(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    x[..., :1] *= 30
    with poisoned():
        out, scale = indexer.quantize_fp8(x)
    assert out.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == shape[:-1]
    expected, expected_scale = _quantize(x)
    assert relative_error(scale, expected_scale) < 1e-6
    rounded = out.float() * scale[..., None]
    assert relative_error(rounded, expected.float() * expected_scale[..., None]) < ROUNDING
    assert relative_error(rounded, reference.fp8_rows(x)) < ROUNDING


def test_fp8_zero_rows_have_scale_one_and_odd_widths_are_refused():
    out, scale = indexer.quantize_fp8(torch.zeros(2, 32, device=DEVICE))
    assert scale.tolist() == [1.0, 1.0] and not out.float().any()
    with pytest.raises(ValueError, match="24"):
        indexer.quantize_fp8(torch.zeros(2, 24, device=DEVICE))


def test_fp8_selection_is_close_to_the_exact_one():
    q_NHD, k_MD, w_NH = _inputs(20, 400, 16, 128, torch.float32)
    k_MD = k_MD * torch.rand(400, 1, device=DEVICE).add(0.5)
    (q8, q_scale_NH), (k8, k_scale_M) = _quantize(q_NHD), _quantize(k_MD)
    start_N, end_N = torch.zeros(20, dtype=torch.int32, device=DEVICE), torch.full_like(w_NH[:, 0], 400).int()
    score_NM = torch.empty(20, 400, device=DEVICE)
    indexer._scores(q8, k8, w_NH * q_scale_NH, start_N, end_N, score_NM, k_scale_M, None, fill=True)
    exact_NM = _exact_scores(q_NHD, k_MD, w_NH)
    assert relative_error(score_NM, exact_NM) < 0.05
    ids_NK = indexer.index_topk(q8, k8, w_NH * q_scale_NH, start_N, end_N, 100, k_scale_M=k_scale_M)
    assert torch.equal(ids_NK.long(), reference.selected_ids(reference.select(score_NM, 100), 100))
    exact_NK = reference.selected_ids(reference.select(exact_NM.float(), 100), 100)
    overlap = (
        sum(len(set(a) & set(b)) for a, b in zip(ids_NK.tolist(), exact_NK.tolist(), strict=True)) / ids_NK.numel()
    )
    assert overlap > 0.95


def _some_ids(n: int, m: int, k: int) -> Tensor:
    """Up to k distinct ids a row, -1 after them; none in row 0."""
    ids_NK = torch.rand(n, m).argsort(-1)[:, :k].sort(-1).values
    ids_NK = torch.nn.functional.pad(ids_NK, (0, k - ids_NK.shape[1]), value=-1)
    used_N1 = torch.randint(0, k + 1, (n, 1))
    used_N1[0] = 0
    return ids_NK.masked_fill(torch.arange(k) >= used_N1, -1).int().to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m, heads, width, k", [(1, 5, 1, 16, 8), (40, 130, 3, 24, 64), (9, 63, 40, 64, 70)])
def test_selected_scores_and_their_gradients_match_float64(n, m, heads, width, k, dtype, monkeypatch):
    monkeypatch.setattr(indexer, "CONTRIBUTION_BYTES", 17 * k * width * dtype.itemsize)
    leaves = [x.requires_grad_() for x in _inputs(n, m, heads, width, dtype)]
    ids_NK = _some_ids(n, m, k) if n > 1 else torch.tensor([[0, 2, 4] + [-1] * 5], dtype=torch.int32, device=DEVICE)
    d_score_NK = torch.randn(n, k, device=DEVICE)
    with poisoned():
        score_NK = indexer.selected_scores(*leaves, ids_NK)
        grads = torch.autograd.grad(score_NK, leaves, d_score_NK)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    used_NK = ids_NK >= 0
    expected_NK = _exact_scores(*exact).gather(1, ids_NK.long().clamp(min=0)).masked_fill(~used_NK, 0.0)
    assert relative_error(score_NK, expected_NK) < FORWARD[dtype]
    assert not score_NK[~used_NK].any()
    for grad, leaf, expected in zip(grads, leaves, torch.autograd.grad(expected_NK, exact, d_score_NK), strict=True):
        assert grad.dtype == leaf.dtype
        assert relative_error(grad, expected) < GRADIENT[dtype]


def test_selected_scores_are_the_index_scores():
    q_NHD, k_MD, w_NH = _inputs(12, 80, 8, 32, DTYPES[1])
    start_N, end_N = torch.zeros(12, dtype=torch.int32, device=DEVICE), torch.full((12,), 80, device=DEVICE).int()
    ids_NK = indexer.index_topk(q_NHD, k_MD, w_NH, start_N, end_N, 16)
    all_NM = indexer.index_scores(q_NHD, k_MD, w_NH, start_N, end_N)
    chosen_NK = indexer.selected_scores(q_NHD, k_MD, w_NH, ids_NK)
    assert relative_error(chosen_NK, all_NM.gather(1, ids_NK.long())) < 1e-6


@pytest.mark.parametrize("n, k", [(4, 8), (0, 8), (4, 0)])
def test_without_any_selected_key_scores_and_gradients_are_zero(n, k):
    leaves = [x.requires_grad_() for x in _inputs(n, 6, 2, 16, torch.float32)]
    with poisoned():
        score_NK = indexer.selected_scores(*leaves, torch.full((n, k), -1, dtype=torch.int32, device=DEVICE))
        grads = torch.autograd.grad(score_NK.sum(), leaves)
    assert score_NK.shape == (n, k) and not score_NK.any()
    assert not any(grad.any() for grad in grads)


@needs_gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_batch_invariance_at_full_size(fp8):
    q, k, w_NH = _inputs(1000, 20000, 64, 128, torch.bfloat16)
    start_N, end_N = _causal([1000])
    end_N += 19000
    k_scale_M = None
    if fp8:
        (q, q_scale_NH), (k, k_scale_M) = indexer.quantize_fp8(q), indexer.quantize_fp8(k)
        w_NH = w_NH * q_scale_NH
    score_NM = torch.empty(1000, 20000, device=DEVICE)
    indexer._scores(q, k, w_NH, start_N, end_N, score_NM, k_scale_M, None, fill=True)
    for n in (0, 511, 999):
        row, alone = slice(n, n + 1), torch.empty(1, 19001 + n, device=DEVICE)
        scale_M = None if k_scale_M is None else k_scale_M[: 19001 + n]
        indexer._scores(q[row], k[: 19001 + n], w_NH[row], start_N[row], end_N[row], alone, scale_M, None, fill=True)
        assert torch.equal(alone, score_NM[row, : 19001 + n])


@needs_gpu
def test_quantization_is_batch_invariant():
    torch.manual_seed(0)
    x = torch.randn(5000, 64, 128, device=DEVICE, dtype=torch.bfloat16)
    out, scale = indexer.quantize_fp8(x)
    for n in (0, 777, 4999):
        alone, alone_scale = indexer.quantize_fp8(x[n : n + 1])
        assert torch.equal(alone.float(), out[n : n + 1].float()) and torch.equal(alone_scale, scale[n : n + 1])


@needs_gpu
def test_large_selections_and_gradients_repeat_to_the_bit():
    leaves = [x.requires_grad_() for x in _inputs(1024, 8192, 64, 128, torch.bfloat16)]
    start_N, end_N = _causal([1024])
    end_N += 7168
    first = None
    for _ in range(25):
        ids_NK = indexer.index_topk(*(x.detach() for x in leaves), start_N, end_N, 512)
        score_NK = indexer.selected_scores(*leaves, ids_NK)
        result = (ids_NK, score_NK, *torch.autograd.grad(score_NK.square().sum(), leaves))
        first = result if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))
