"""A step of the policy over vLLM's paged cache on a GPU: planned once for all layers, then the kernels in each.

There are two plans. A step in which every sequence has one new token reads block table and lengths on the device: none
of its shapes depends on the data, so a CUDA graph can hold it. Any other step sees one list of logical keys: the tokens
of all its sequences, one sequence after another.

Shape suffixes: N = new tokens of the step, M = logical keys, B = sequences, P = blocks of a sequence at most, K =
selected keys, H = heads, D = index head width, W = latent and rope width of a cached row, C = latent width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Record = Callable[[Tensor], None] | None


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One new token a sequence. The tensors are the engine's own, which it fills anew for every step; a sequence that
    pads a captured batch has length 0 and slot -1."""

    slot_N: Tensor
    """int64: the cache row that each new token fills, or -1."""
    length_B: Tensor
    """int32: tokens of each sequence so far, the new one included."""
    block_BP: Tensor
    """int32: the cache blocks of each sequence."""
    block_size: int
    width: int
    """The longest that a sequence can be."""

    def attend(
        self, q_NHW: Tensor, index_q_NHD: Tensor, index_w_NH: Tensor, cache: Tensor, *, value_dim: int, topk: int,
        scale: float, record: Record = None,
    ) -> Tensor:  # fmt: skip
        """As PagedStep's, with the same bits in a CUDA graph and outside; 0 for a sequence of length 0."""
        from trimtab.kernels.indexer import paged_topk
        from trimtab.kernels.sparse_mla import decode_mla

        W = q_NHW.shape[-1]
        slot_BK = paged_topk(
            index_q_NHD, cache[:, W:], index_w_NH, self.block_BP, self.length_B, topk,
            page_size=self.block_size, width=self.width, rows=record is None,
        )  # fmt: skip
        if record is not None:
            record(slot_BK)  # as yet positions
            slot_BK = self._rows(slot_BK)
        return decode_mla(q_NHW, cache[:, :W], slot_BK, self.length_B, value_dim, scale)

    def _rows(self, id_BK: Tensor) -> Tensor:
        """Where the tokens at these positions lie in the cache; -1 stays."""
        id_BK = id_BK.long()
        block_BK = self.block_BP.gather(1, id_BK.clamp(min=0) // self.block_size)
        return torch.where(id_BK < 0, -1, block_BK * self.block_size + id_BK % self.block_size).int()


@dataclass(frozen=True, slots=True)
class PagedStep:
    """What every layer of a step shares."""

    slot_N: Tensor
    """int64: the cache row that each new token fills, or -1."""
    start_N: Tensor
    """int32: token n sees the logical keys start_N[n] <= m < end_N[n]."""
    end_N: Tensor
    row_M: Tensor
    """int64: the cache row of each logical key."""
    slot_M1: Tensor
    """int32: row_M and one entry more, -1, which is where an unused id (-1) leads."""
    visible_NK: Tensor | None
    """int32: cache rows of all visible keys, if no sequence has more than topk keys: there is nothing to select."""
    longest: int
    """Tokens of the longest sequence."""

    def attend(
        self, q_NHW: Tensor, index_q_NHD: Tensor, index_w_NH: Tensor, cache: Tensor, *, value_dim: int, topk: int,
        scale: float, record: Record = None,
    ) -> Tensor:  # fmt: skip
        """Select the best topk of each token's visible keys and attend to them, where they lie in the cache.

        Args:
            cache: [rows, W + D]; a row holds the latent, the rope key and the indexer's key of one token.
            record: takes the positions of the selected keys [N, topk], if there is a choice.

        Returns:
            [N, H, value_dim].
        """
        # Here, since a machine without a GPU need not have Triton.
        from trimtab.kernels.indexer import index_topk
        from trimtab.kernels.sparse_mla import sparse_mla

        W, slot_NK = q_NHW.shape[-1], self.visible_NK
        if slot_NK is None:
            id_NK = index_topk(
                index_q_NHD, cache[:, W:], index_w_NH, self.start_N, self.end_N, topk,
                longest=self.longest, row_M=self.row_M,
            )  # fmt: skip
            slot_NK = self.slot_M1[id_NK]
            if record is not None:
                record(torch.where(id_NK < 0, -1, id_NK - self.start_N[:, None]))
        return sparse_mla(q_NHW, cache[:, :W], slot_NK, value_dim, scale)[0]


def plan_step(
    start_B1: Tensor, length_B: Tensor, block_table_BP: Tensor, slot_N: Tensor, block_size: int, topk: int
) -> PagedStep:
    """Lay a step's sequences out flat; the host's sizes spare every wait for the device.

    Args:
        start_B1: first token of each sequence in the step, and the end of the last; on the CPU.
        length_B: tokens of each sequence so far, the new ones included; on the CPU.
        slot_N: the engine's cache rows of the new tokens; -1 in dry runs.
    """
    device = block_table_BP.device
    N, M, longest = len(slot_N), int(length_B.sum()), int(length_B.max())
    host = torch.stack([start_B1[:-1].long(), start_B1.diff().long(), length_B.long(), length_B.cumsum(0) - length_B])
    start_B, new_B, length_B, first_B = host.to(device, non_blocking=True)
    sequence_N = torch.repeat_interleave(new_B, output_size=N)
    sequence_M = torch.repeat_interleave(length_B, output_size=M)
    start_N = first_B[sequence_N]
    end_N = torch.arange(1, N + 1, device=device) + (first_B + length_B - new_B - start_B)[sequence_N]
    offset_M = torch.arange(M, device=device) - first_B[sequence_M]
    row_M = block_table_BP[sequence_M, offset_M // block_size].long() * block_size + offset_M % block_size
    slot_M1 = torch.cat([row_M, row_M.new_full((1,), -1)]).int()
    visible_NK = None
    if longest <= topk:
        K = min(topk, 1 << (longest - 1).bit_length())  # few sizes: a kernel compiles for each
        id_NK = start_N[:, None] + torch.arange(K, device=device)
        visible_NK = slot_M1[torch.where(id_NK < end_N[:, None], id_NK, -1)]
    return PagedStep(slot_N, start_N.int(), end_N.int(), row_M, slot_M1, visible_NK, longest)
