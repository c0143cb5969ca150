"""Log-probabilities from the LM head, over kept ids or the whole vocabulary. Spec: reference.kept_logp, full_logp.

Kept sets form a sparse [S, V] matrix in CSR form. The forward pass samples H W^T at its entries, the backward pass
multiplies that sparse gradient by W and its transpose by H: entries times D, never S times V. The functions over the
whole vocabulary go through it in chunks of columns, so the weight's gradient is complete, and rounded, once a chunk.

Shape suffixes: S = sampled tokens, D = hidden width, V = vocabulary, E = kept ids of all S, C = columns of a
chunk of the vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels.segment_sum import segment_sums

LOGITS_AT_ONCE = 1 << 27
"""Logits over the whole vocabulary that exist at a time: 512 MiB in fp32."""


@triton.jit
def _kept_logit_kernel(
    hidden_ptr, weight_ptr, row_ptr, id_ptr, offset_ptr, out_ptr, E, D, V, scale,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = tl.load(row_ptr + e, mask=e < E, other=0).to(tl.int64)
    v = tl.load(id_ptr + e, mask=e < E, other=0).to(tl.int64)
    several = tl.load(offset_ptr + row + 1) - tl.load(offset_ptr + row) > 1
    live = (e < E) & several & (v >= 0) & (v < V)

    acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d < D)
        w = tl.load(weight_ptr + v[:, None] * D + d, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(hidden_ptr + row[:, None] * D + d, mask=mask, other=0.0).to(tl.float32)
        acc += w * h
    tl.store(out_ptr + e, tl.sum(acc, 1) * scale, mask=e < E)


@triton.jit
def _kept_softmax_kernel(
    logit_ptr, id_ptr, token_ptr, offset_ptr, lse_ptr, logp_ptr, entropy_ptr, fault_ptr, E, V,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    start, end = tl.load(offset_ptr + s).to(tl.int64), tl.load(offset_ptr + s + 1).to(tl.int64)
    token = tl.load(token_ptr + s).to(tl.int64)
    last = s == tl.num_programs(0) - 1
    torn = (start < 0) | (end < start) | (end > E) | ((s == 0) & (start != 0)) | (last & (end != E))
    start, end = tl.maximum(start, 0), tl.minimum(end, E)

    top, total, mean, picked = float("-inf"), 0.0, 0.0, 0.0
    hits, strays = 0, 0
    for first in range(start, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        live = e < end
        v = tl.load(id_ptr + e, mask=live, other=0).to(tl.int64)
        logit = tl.load(logit_ptr + e, mask=live, other=0.0)
        hit = live & (v == token)
        hits += tl.sum(hit.to(tl.int32), 0)
        strays += tl.sum((live & ((v < 0) | (v >= V))).to(tl.int32), 0)
        picked += tl.sum(tl.where(hit, logit, 0.0), 0)
        new_top = tl.maximum(top, tl.max(tl.where(live, logit, float("-inf")), 0))
        weight = tl.where(live, tl.exp(logit - new_top), 0.0)
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(weight, 0)
        mean = mean * decay + tl.sum(weight * logit, 0)
        top = new_top

    total = tl.where(end > start, total, 1.0)
    lse = top + tl.log(total)
    fault = tl.where(torn | (strays > 0), 2, tl.where(hits != 1, 1, 0))
    tl.store(lse_ptr + s, lse)
    tl.store(logp_ptr + s, tl.where(fault == 0, picked - lse, float("nan")))
    tl.store(entropy_ptr + s, lse - mean / total)
    tl.store(fault_ptr + s, fault)


def _kept_softmax(
    hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, kept_id_E: Tensor, kept_offset_S: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """logp, entropy, fault and lse [S], logit [E], all after temperature, and the row of each entry [E]."""
    (S, D), V, E = hidden_SD.shape, len(weight_VD), len(kept_id_E)
    position_E = torch.arange(E, device=hidden_SD.device, dtype=kept_offset_S.dtype)
    row_E = torch.searchsorted(kept_offset_S[1:], position_E, right=True, out_int32=True).clamp(max=S - 1)
    BLOCK_E, BLOCK_D = 4, min(256, triton.next_power_of_2(D))
    logit_E = hidden_SD.new_empty(E, dtype=torch.float32)
    if E:
        _kept_logit_kernel[triton.cdiv(E, BLOCK_E),](
            hidden_SD, weight_VD, row_E, kept_id_E, kept_offset_S, logit_E, E, D, V, 1 / temperature, BLOCK_E, BLOCK_D,
            num_warps=2,
        )  # fmt: skip
    logp_S, lse_S, entropy_S = hidden_SD.new_empty(3, S, dtype=torch.float32)
    fault_S = token_S.new_empty(S, dtype=torch.int32)
    _kept_softmax_kernel[S,](
        logit_E, kept_id_E, token_S, kept_offset_S, lse_S, logp_S, entropy_S, fault_S, E, V, 64, num_warps=1
    )
    return logp_S, entropy_S, fault_S, lse_S, logit_E, row_E


class _KeptLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        token_S: Tensor,
        kept_id_E: Tensor,
        kept_offset_S: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp_S, entropy_S, fault_S, lse_S, logit_E, row_E = _kept_softmax(
            hidden_SD, weight_VD, token_S, kept_id_E, kept_offset_S, temperature
        )
        ctx.save_for_backward(hidden_SD, weight_VD, token_S, kept_id_E, kept_offset_S, lse_S, logit_E, row_E)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_S, fault_S)
        return logp_S, entropy_S, fault_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogp_S: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SD, weight_VD, token_S, kept_id_E, kept_offset_S, lse_S, logit_E, row_E = ctx.saved_tensors
        g_E = (kept_id_E == token_S[row_E]).float() - (logit_E - lse_S[row_E]).exp()
        g_E *= (dlogp_S / ctx.temperature)[row_E]
        dhidden_SD = dweight_VD = None
        if ctx.needs_input_grad[0]:
            dhidden_SD = segment_sums(weight_VD, kept_id_E, g_E, row_E, kept_offset_S)
        if ctx.needs_input_grad[1]:
            sorted_id_E, order_E = kept_id_E.int().sort(stable=True)
            id_V = torch.arange(len(weight_VD) + 1, device=kept_id_E.device, dtype=torch.int32)
            offset_V = torch.searchsorted(sorted_id_E, id_V)
            dweight_VD = segment_sums(hidden_SD, row_E[order_E], g_E[order_E], sorted_id_E, offset_V)
        return dhidden_SD, dweight_VD, None, None, None, None


def _kept(
    hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, kept_id_E: Tensor, kept_offset_S: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """kept_logp, kept_entropy and what is wrong with each position, 0 for nothing."""
    (S, D), V = hidden_SD.shape, len(weight_VD)
    assert weight_VD.shape == (V, D) and weight_VD.dtype == hidden_SD.dtype, (weight_VD.shape, weight_VD.dtype)
    assert token_S.shape == (S,) and kept_offset_S.shape == (S + 1,) and kept_id_E.dim() == 1
    if S == 0:
        return hidden_SD.sum(-1).float(), hidden_SD.new_zeros(0, dtype=torch.float32), token_S
    tensors = (hidden_SD, weight_VD, token_S, kept_id_E, kept_offset_S)
    return _KeptLogp.apply(*(x.contiguous() for x in tensors), temperature)


def _refuse_faults(fault_S: Tensor, V: int, E: int) -> None:
    fault = int(fault_S.max()) if len(fault_S) else 0  # the host waits for the device
    if fault == 1:
        raise ValueError("a sampled token is outside its kept set: refuse such a segment when it is recorded")
    if fault:
        raise ValueError(f"kept ids must lie in [0, {V}), and their offsets rise from 0 to {E}")


def kept_logp_entropy(
    hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, kept_id_E: Tensor, kept_offset_S: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """kept_logp and kept_entropy from one pass; the gradient goes through the log-probabilities only.

    The host does not wait, so nothing is refused: a position that kept_logp refuses has NaN. Ids outside the vocabulary
    must not go through the backward pass.
    """
    return _kept(hidden_SD, weight_VD, token_S, kept_id_E, kept_offset_S, temperature)[:2]


def kept_logp(
    hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, kept_id_E: Tensor, kept_offset_S: Tensor, temperature: float
) -> Tensor:
    """Log-probability of each sampled token, normalised over the ids its sampler kept. Differentiable, deterministic.

        log pi~(y) = l_y - log sum_{v in S_t} exp(l_v),   l_v = h_t . W[v] / temperature

    [DeepSeek-V3.2, Keep Sampling Mask]. A position that kept one id gives exactly 0 with a gradient of exactly 0,
    and reads neither its hidden state nor the weight. The weight's gradient is dense, and zero for ids never kept.

    Args:
        kept_id_E: kept ids of all positions, one after another; kept_offset_S [S + 1] delimits them (CSR).

    Returns:
        [S] float32.

    Raises:
        ValueError: a sampled token is not among its kept ids, or is there twice; an id outside the vocabulary.
    """
    logp_S, _, fault_S = _kept(hidden_SD, weight_VD, token_S, kept_id_E, kept_offset_S, temperature)
    _refuse_faults(fault_S, len(weight_VD), len(kept_id_E))
    return logp_S


@torch.no_grad()
def kept_entropy(
    hidden_SD: Tensor, weight_VD: Tensor, kept_id_E: Tensor, kept_offset_S: Tensor, temperature: float
) -> Tensor:
    """Entropy of the policy over each kept set, in nats. For logging: carries no gradient.

    Returns:
        [S] float32; exactly 0 where one id was kept.

    Raises:
        ValueError: a position kept no id, or an id outside the vocabulary.
    """
    if (kept_offset_S.diff() < 1).any():
        raise ValueError("a position kept no id: refuse such a segment when it is recorded")
    first_S = kept_id_E[kept_offset_S[:-1]]
    _, entropy_S, fault_S = _kept(hidden_SD, weight_VD, first_S, kept_id_E, kept_offset_S, temperature)
    _refuse_faults(fault_S, len(weight_VD), len(kept_id_E))
    return entropy_S


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, from tensor cores where the inputs are half precision."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc += a @ b, with acc in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
    else:
        acc.addmm_(a.float(), b.float())


def _chunks(S: int, V: int) -> Iterator[slice]:
    columns = max(128, LOGITS_AT_ONCE // S // 128 * 128)
    return (slice(first, min(first + columns, V)) for first in range(0, V, columns))


@triton.jit
def _fold_chunk_kernel(
    logit_ptr, ref_ptr, top_ptr, total_ptr, mean_ptr, C, scale,
    HAS_REF: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    top, total, mean = tl.load(top_ptr + s), tl.load(total_ptr + s), tl.load(mean_ptr + s)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        logit = tl.load(logit_ptr + s * C + c, mask=c < C, other=float("-inf"))
        x = tl.where(c < C, logit, 0.0)
        if HAS_REF:
            x -= tl.load(ref_ptr + s * C + c, mask=c < C, other=0.0)  # before scaling: exactly 0 for equal logits
        logit, x = logit * scale, x * scale
        new_top = tl.maximum(top, tl.max(logit, 0))
        weight = tl.exp(logit - new_top)
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(weight, 0)
        mean = mean * decay + tl.sum(weight * x, 0)
        top = new_top
    tl.store(top_ptr + s, top)
    tl.store(total_ptr + s, total)
    tl.store(mean_ptr + s, mean)


class _Softmax:
    """Running statistics of softmax(logit) per row: its log-sum-exp and its mean of logit, or of logit - ref."""

    def __init__(self, S: int, device: torch.device) -> None:
        self.top_S = torch.full((S,), float("-inf"), device=device)
        self.total_S = torch.zeros(S, device=device)
        self.weighted_S = torch.zeros(S, device=device)

    def fold(self, logit_SC: Tensor, ref_SC: Tensor | None, scale: float) -> None:
        S, C = logit_SC.shape
        assert logit_SC.is_contiguous() and (ref_SC is None or ref_SC.is_contiguous())
        BLOCK_C = min(2048, triton.next_power_of_2(C))
        _fold_chunk_kernel[S,](
            logit_SC, logit_SC if ref_SC is None else ref_SC, self.top_S, self.total_S, self.weighted_S, C, scale,
            ref_SC is not None, BLOCK_C,
        )  # fmt: skip

    def lse(self) -> Tensor:
        return self.top_S + self.total_S.log()

    def mean(self) -> Tensor:
        return self.weighted_S / self.total_S


@triton.jit
def _logp_gradient_kernel(
    logit_ptr, lse_ptr, token_ptr, upstream_ptr, out_ptr, first, C, scale, BLOCK_C: tl.constexpr
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    logit = tl.load(logit_ptr + s * C + c, mask=c < C, other=0.0) * scale
    prob = tl.exp(logit - tl.load(lse_ptr + s))
    is_token = (first + c == tl.load(token_ptr + s)).to(tl.float32)
    g = (is_token - prob) * (tl.load(upstream_ptr + s) * scale)
    tl.store(out_ptr + s * C + c, g.to(out_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _kl_gradient_kernel(
    logit_ptr, ref_ptr, lse_ptr, mean_ptr, upstream_ptr, out_ptr, C, scale, BLOCK_C: tl.constexpr
):  # fmt: skip
    s = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    logit = tl.load(logit_ptr + s * C + c, mask=c < C, other=0.0)
    ref = tl.load(ref_ptr + s * C + c, mask=c < C, other=0.0)
    prob = tl.exp(logit * scale - tl.load(lse_ptr + s))
    g = prob * ((logit - ref) * scale - tl.load(mean_ptr + s)) * (tl.load(upstream_ptr + s) * scale)
    tl.store(out_ptr + s * C + c, g.to(out_ptr.dtype.element_ty), mask=c < C)


def _gradients(
    hidden_SD: Tensor, weight_VD: Tensor, gradient: Callable[[slice], Tensor], needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Chain gradient(columns) [S, C], of hidden @ weight^T, into hidden and weight.

    The hidden states' gradient adds up in float32 over the chunks in their order; the weight's needs no such sum.
    """
    dhidden_SD = hidden_SD.new_zeros(hidden_SD.shape, dtype=torch.float32) if needed[0] else None
    dweight_VD = torch.empty_like(weight_VD) if needed[1] else None
    for columns in _chunks(len(hidden_SD), len(weight_VD)):
        g_SC = gradient(columns)
        if dhidden_SD is not None:
            _add_product(dhidden_SD, g_SC, weight_VD[columns])
        if dweight_VD is not None:
            torch.mm(g_SC.T, hidden_SD, out=dweight_VD[columns])
    return None if dhidden_SD is None else dhidden_SD.to(hidden_SD.dtype), dweight_VD


class _FullLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        S, V = len(hidden_SD), len(weight_VD)
        softmax = _Softmax(S, hidden_SD.device)
        picked_S = hidden_SD.new_full((S,), float("nan"), dtype=torch.float32)
        for columns in _chunks(S, V):
            logit_SC = _product(hidden_SD, weight_VD[columns].T)
            softmax.fold(logit_SC, None, 1 / temperature)
            inside_S = (token_S >= columns.start) & (token_S < columns.stop)
            column_S = (token_S - columns.start).clamp(0, logit_SC.shape[1] - 1)
            logit_S = logit_SC.gather(1, column_S[:, None])[:, 0] * (1 / temperature)
            picked_S = torch.where(inside_S, logit_S, picked_S)
        lse_S, entropy_S = softmax.lse(), softmax.lse() - softmax.mean()
        ctx.save_for_backward(hidden_SD, weight_VD, token_S, lse_S)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_S)
        return picked_S - lse_S, entropy_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogp_S: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SD, weight_VD, token_S, lse_S = ctx.saved_tensors
        dlogp_S = dlogp_S.contiguous()

        def gradient(columns: slice) -> Tensor:
            logit_SC = _product(hidden_SD, weight_VD[columns].T)
            (S, C), g_SC = logit_SC.shape, hidden_SD.new_empty(logit_SC.shape)
            _logp_gradient_kernel[S, triton.cdiv(C, 1024)](
                logit_SC, lse_S, token_S, dlogp_S, g_SC, columns.start, C, 1 / ctx.temperature, 1024
            )
            return g_SC

        return *_gradients(hidden_SD, weight_VD, gradient, ctx.needs_input_grad), None, None


def full_logp_entropy(
    hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """full_logp and full_entropy from one pass; the gradient goes through the log-probabilities only.

    The host does not wait, so nothing is refused: a token outside the vocabulary has NaN.
    """
    (S, D), V = hidden_SD.shape, len(weight_VD)
    assert weight_VD.shape == (V, D) and weight_VD.dtype == hidden_SD.dtype and token_S.shape == (S,)
    if S == 0:
        return hidden_SD.sum(-1).float(), hidden_SD.new_zeros(0, dtype=torch.float32)
    return _FullLogp.apply(hidden_SD.contiguous(), weight_VD.contiguous(), token_S.contiguous(), temperature)


def full_logp(hidden_SD: Tensor, weight_VD: Tensor, token_S: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token under the whole vocabulary at the given temperature. Differentiable, deterministic.

        log pi(y) = l_y - log sum_v exp(l_v),   l_v = h_t . W[v] / temperature

    About LOGITS_AT_ONCE logits exist at a time, in float32; the backward pass computes them again.

    Returns:
        [S] float32.

    Raises:
        ValueError: a token outside the vocabulary.
    """
    if ((token_S < 0) | (token_S >= len(weight_VD))).any():
        raise ValueError(f"sampled tokens must lie in [0, {len(weight_VD)})")
    return full_logp_entropy(hidden_SD, weight_VD, token_S, temperature)[0]


@torch.no_grad()
def full_entropy(hidden_SD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    """Entropy of the policy over the whole vocabulary, in nats. For logging: carries no gradient.

    Returns:
        [S] float32.
    """
    token_S = torch.zeros(len(hidden_SD), dtype=torch.int64, device=hidden_SD.device)
    return full_logp_entropy(hidden_SD, weight_VD, token_S, temperature)[1]


class _FullKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, ref_hidden_SD: Tensor, weight_VD: Tensor, ref_weight_VD: Tensor, temperature: float
    ) -> Tensor:
        S, V = len(hidden_SD), len(weight_VD)
        softmax, ref_softmax = _Softmax(S, hidden_SD.device), _Softmax(S, hidden_SD.device)
        for columns in _chunks(S, V):
            logit_SC = _product(hidden_SD, weight_VD[columns].T)
            ref_logit_SC = _product(ref_hidden_SD, ref_weight_VD[columns].T)
            softmax.fold(logit_SC, ref_logit_SC, 1 / temperature)
            ref_softmax.fold(ref_logit_SC, None, 1 / temperature)
        lse_S, mean_S = softmax.lse(), softmax.mean()
        ctx.save_for_backward(hidden_SD, ref_hidden_SD, weight_VD, ref_weight_VD, lse_S, mean_S)
        ctx.temperature = temperature
        return mean_S - (lse_S - ref_softmax.lse())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl_S: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SD, ref_hidden_SD, weight_VD, ref_weight_VD, lse_S, mean_S = ctx.saved_tensors
        dkl_S = dkl_S.contiguous()

        def gradient(columns: slice) -> Tensor:
            logit_SC = _product(hidden_SD, weight_VD[columns].T)
            ref_logit_SC = _product(ref_hidden_SD, ref_weight_VD[columns].T)
            (S, C), g_SC = logit_SC.shape, hidden_SD.new_empty(logit_SC.shape)
            _kl_gradient_kernel[S, triton.cdiv(C, 1024)](
                logit_SC, ref_logit_SC, lse_S, mean_S, dkl_S, g_SC, C, 1 / ctx.temperature, 1024
            )
            return g_SC

        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        dhidden_SD, dweight_VD = _gradients(hidden_SD, weight_VD, gradient, needed)
        return dhidden_SD, None, dweight_VD, None, None


def full_kl(
    hidden_SD: Tensor, ref_hidden_SD: Tensor, weight_VD: Tensor, ref_weight_VD: Tensor, temperature: float
) -> Tensor:
    """KL(pi || pi_ref) of each position, exact, over the whole vocabulary. Differentiable in hidden and weight.

        sum_v pi(v) log(pi(v) / pi_ref(v)) = sum_v pi(v) (l_v - r_v) - log sum_v exp(l_v) + log sum_v exp(r_v)

    with l and r the two models' logits at the temperature. Logits exist as in full_logp, twice as many. The reference
    carries no gradient.

    Returns:
        [S] float32, in nats; non-negative but for rounding.
    """
    assert hidden_SD.shape == ref_hidden_SD.shape and weight_VD.shape == ref_weight_VD.shape
    assert weight_VD.dtype == hidden_SD.dtype and ref_weight_VD.dtype == ref_hidden_SD.dtype
    if len(hidden_SD) == 0:
        return hidden_SD.sum(-1).float()
    tensors = (hidden_SD, ref_hidden_SD.detach(), weight_VD, ref_weight_VD.detach())
    return _FullKl.apply(*(x.contiguous() for x in tensors), temperature)
