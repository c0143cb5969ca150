"""How a pack is cut for attention: whole, or in rectangles of sequences of similar length.

Shape suffixes: N = tokens, B = sequences of a block, T = its longest, M = keys (= T), H = heads, D = head width, V =
value width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_PADDING = 1.25
"""Rows of a block per token in it, at most: above it, a new block costs less than the padding."""
MAX_PAIRS = 1 << 20
"""Query-key pairs of a block, unless it is one sequence: 4 MiB a head in fp32."""


LONG = 4096
"""Tokens from which on a sequence is worth calls of its own."""


@dataclass(frozen=True)
class Part:
    """Neighbouring sequences of a pack that are attended to in one go, in the form that attention wants them."""

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def T(self) -> int:
        """Length of the longest."""
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def pad(self, x_N: Tensor) -> Tensor:
        return x_N

    def unpad(self, x: Tensor) -> Tensor:
        return x

    def causal_mha(self, q_NHD: Tensor, k_NHD: Tensor, v_NHV: Tensor, scale: float) -> Tensor:
        """Attention of each token to its sequence so far; fewer key heads than query heads are shared in order.

        Returns:
            [N, H, V].
        """
        raise NotImplementedError


class Block(Part):
    """Sequences of similar length as one rectangle [B, T]."""

    @cached_property
    def place_N(self) -> Tensor:
        """Where each token lies in the flattened rectangle."""
        places = [torch.arange(length) + b * self.T for b, length in enumerate(self.lengths)]
        return to_device(torch.cat(places), self.device)

    @cached_property
    def row_BT(self) -> Tensor:
        """Which token fills each place, flattened; padding repeats token 0, which no real query sees."""
        row_BT = torch.zeros(len(self.lengths) * self.T, dtype=torch.long, device=self.device)
        return row_BT.index_copy_(0, self.place_N, torch.arange(self.tokens, device=self.device))

    @cached_property
    def causal_TM(self) -> Tensor:
        return torch.ones(self.T, self.T, dtype=torch.bool, device=self.device).tril()

    @property
    def rectangular(self) -> bool:
        return self.tokens == len(self.lengths) * self.T

    def pad(self, x_N: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...]."""
        padded: Tensor = x_N if self.rectangular else _Pad.apply(x_N, self.row_BT, self.place_N)
        return padded.unflatten(0, (len(self.lengths), self.T))

    def unpad(self, x_BT: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]."""
        flat = x_BT.flatten(0, 1)
        return flat if self.rectangular else _Unpad.apply(flat, self.place_N)

    def causal_mha(self, q_NHD: Tensor, k_NHD: Tensor, v_NHV: Tensor, scale: float) -> Tensor:
        q, k, v = (self.pad(x).transpose(1, 2) for x in (q_NHD, k_NHD, v_NHV))
        return self.unpad(_scaled_dot_product(q, k, v, scale).transpose(1, 2))


class _Pad(torch.autograd.Function):
    """Rows by index; the backward gathers, because padding never gets gradient (autograd's own adds row by row)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The inverse of _Pad: padding rows get zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.rows = len(x)
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        padded = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return padded.index_copy_(0, ctx.saved_tensors[0], grad), None


class Pack(Part):
    """All sequences of a pack, end to end: FlashAttention in half precision on a GPU, without padding. Where all are
    long, cuDNN's, which is faster but takes one length at a time."""

    @cached_property
    def offset_B(self) -> Tensor:
        """Where each sequence starts, and the end of the last: int32 [B + 1]."""
        offset_B = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return to_device(offset_B, self.device)

    def causal_mha(self, q_NHD: Tensor, k_NHD: Tensor, v_NHV: Tensor, scale: float) -> Tensor:
        if min(self.lengths) >= LONG:
            sequences = zip(*(x.split(self.lengths) for x in (q_NHD, k_NHD, v_NHV)), strict=True)
            return torch.cat([_long_mha(q, k, v, scale) for q, k, v in sequences])
        # torch.nn.attention.varlen calls this as well; its own signature changes with torch's version, this does not.
        out_NHV: Tensor = torch.ops.aten._flash_attention_forward(
            *(q_NHD, k_NHD, v_NHV, self.offset_B, self.offset_B, self.T, self.T), 0.0, True, False, scale=scale
        )[0]
        return out_NHV


def _long_mha(q_THD: Tensor, k_THD: Tensor, v_THV: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THV))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _scaled_dot_product(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTV: Tensor, scale: float) -> Tensor:
    shared = q_BHTD.shape[1] // k_BHTD.shape[1]
    if q_BHTD.is_cuda and shared > 1:  # in fp32, only equal numbers of heads escape the form that stores [T, T]
        k_BHTD, v_BHTV = (x.repeat_interleave(shared, 1) for x in (k_BHTD, v_BHTV))
        shared = 1
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTV, is_causal=True, scale=scale, enable_gqa=shared > 1)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device still has to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def lengths_of(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Tokens of each sequence; on a GPU the host waits for them.

    Raises:
        ValueError: cu_seqlens does not start at 0 or an entry is not above the one before.
    """
    offsets = cu_seqlens.tolist()
    lengths = tuple(end - start for start, end in pairwise(offsets))
    if offsets[:1] != [0] or not lengths or min(lengths) < 1:
        raise ValueError(f"cu_seqlens must start at 0 and rise with every sequence, got {offsets}")
    return lengths


def blocks_of(lengths: Sequence[int], device: torch.device) -> list[Block]:
    """Cut a pack into blocks, in order. Sequences sorted by length pad least."""
    groups: list[list[int]] = [[]]
    for length in lengths:
        group = [*groups[-1], length]
        rows = len(group) * max(group)
        if groups[-1] and (rows > MAX_PADDING * sum(group) or rows * max(group) > MAX_PAIRS):
            groups.append([length])
        else:
            groups[-1] = group
    return [Block(tuple(group), device) for group in groups]
