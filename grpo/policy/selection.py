"""What the indexer selects: how much of dense attention falls on it, and how far an engine selects the same.

Shape suffixes: B = sequences of a block, T = its longest, M = keys (= T), H = heads, L = layers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.grpo.policy.attention import Attend, Index, Latents
from trimtab.grpo.policy.parts import Block
from trimtab.grpo.policy.policy import Policy
from trimtab.kernels import reference

AT_ONCE = 1 << 25
"""Scores of one kind that exist at a time: 128 MiB in fp32, whatever the length of a sequence."""


class Mass:
    """The share of dense attention that a selection would keep, by layer."""

    def __init__(self, policy: Policy):
        self._topk = int(policy.config.index_topk)
        self._layers = {id(layer.self_attn): i for i, layer in enumerate(policy.model.model.layers)}
        self._selected: dict[int, float] = defaultdict(float)
        self._queries: dict[int, int] = defaultdict(int)

    def by_layer(self) -> list[float]:
        """Means over queries with more than index_topk keys and over heads; 1 without any."""
        layers = self._layers.values()
        return [self._selected[i] / self._queries[i] if self._queries[i] else 1.0 for i in layers]

    def attend(
        self, mla: nn.Module, latents: Latents, index: Index | None, block: Block, topk: int, with_kl: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Dense attention (attention.Attend) that takes note of what the selection would have kept of it."""
        assert index is not None and topk >= block.T and with_kl, "measured where attention is dense, with its KL"
        length_B1 = torch.tensor(block.lengths, device=latents.q_BTHD.device)[:, None]
        layer = self._layers[id(mla)]
        outs, kls = [], []
        for query_T, visible_TM, score_BTM, attend in _by_queries(mla, latents, index, block):
            prob_BHTM, out_BTHV = attend(visible_TM)
            outs.append(out_BTHV)
            kls.append(reference.indexer_kl(score_BTM, prob_BHTM.sum(1), visible_TM.expand_as(score_BTM)))
            mass_BT = (prob_BHTM.mean(1) * reference.select(score_BTM, self._topk)).sum(-1)
            counts_BT = (query_T < length_B1) & (query_T >= self._topk)
            self._selected[layer] += float(mass_BT[counts_BT].sum())
            self._queries[layer] += int(counts_BT.sum())
        return torch.cat(outs, 1), torch.cat(kls, 1)


class Chosen:
    """The selection of one sequence by layer, and the attention paid to it."""

    def __init__(self, policy: Policy):
        self._topk = int(policy.config.index_topk)
        self.selected: list[Tensor] = []
        """Of each layer: bool [T - topk, T], queries from position topk on."""
        self.attention: list[Tensor] = []
        """... and its attention, mean over heads: float32 [T - topk, T]."""
        self.in_fp8: list[Tensor] = []
        """What the same indexer selects whose queries and keys are rounded to FP8, as `selected`; empty where its width
        is no power of two, which FP8's rotation needs."""

    def attend(
        self, mla: nn.Module, latents: Latents, index: Index | None, block: Block, topk: int, with_kl: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sparse attention (attention.Attend) that takes note of what it does."""
        assert index is not None and topk == self._topk < block.T and len(block.lengths) == 1
        outs, selected, attention = [], [], []
        rounds = index.k_BTD.shape[-1].bit_count() == 1
        if rounds:
            rounded = Index(reference.fp8_rows(index.q_BTHD), reference.fp8_rows(index.k_BTD), index.w_BTH)
            scores = (score_BTM for _, _, score_BTM, _ in _by_queries(mla, latents, rounded, block))
            self.in_fp8.append(torch.cat([reference.select(one, topk)[0].cpu() for one in scores])[topk:])
        for _, _, score_BTM, attend in _by_queries(mla, latents, index, block):
            selected_BTM = reference.select(score_BTM, topk)
            prob_BHTM, out_BTHV = attend(selected_BTM)
            outs.append(out_BTHV)
            selected.append(selected_BTM[0].cpu())
            attention.append(prob_BHTM.mean(1)[0].cpu())
        self.selected.append(torch.cat(selected)[topk:])
        self.attention.append(torch.cat(attention)[topk:])
        return torch.cat(outs, 1), None


def agreement(chosen: Chosen, theirs_L: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """By layer, the share of the policy's selected keys that an engine selects too, and the share of its attention
    that falls on them.

    Args:
        theirs_L: of each layer bool [T - topk, T].
    """
    ids, mass = [], []
    for ours, attention, theirs in zip(chosen.selected, chosen.attention, theirs_L, strict=True):
        both = ours & theirs
        ids.append(float(both.sum() / ours.sum()))
        mass.append(float((attention * both).sum() / attention.sum()))
    return ids, mass


Seen = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Keys that some queries see, bool [..., T, M] -> their attention [B, H, T, M] and the values it gives [B, T, H, V]."""


def _by_queries(
    mla: nn.Module, latents: Latents, index: Index, block: Block
) -> Iterator[tuple[Tensor, Tensor, Tensor, Seen]]:
    """A block in parts of AT_ONCE scores: positions of the queries [T], which keys they may see [T, M], their index
    scores [B, T, M], and attention to come."""
    m: Any = mla
    kv_BMHD = m.kv_b_proj(latents.latent_BTC).unflatten(-1, (m.num_heads, -1))
    k_nope, v_BMHV = kv_BMHD.split([m.qk_nope_head_dim, m.v_head_dim], -1)
    k_BMHD = torch.cat([k_nope, latents.k_rope_BTR[:, :, None].expand(-1, -1, m.num_heads, -1)], -1)
    heads = max(m.num_heads, index.q_BTHD.shape[2])
    position_M = torch.arange(block.T, device=k_BMHD.device)
    for query_T in position_M.split(max(AT_ONCE // (len(block.lengths) * block.T * heads), 1)):
        asked = slice(int(query_T[0]), int(query_T[-1]) + 1)
        part = Index(index.q_BTHD[:, asked], index.k_BTD, index.w_BTH[:, asked])

        def attend(seen_TM: Tensor, q_BTHD: Tensor = latents.q_BTHD[:, asked]) -> tuple[Tensor, Tensor]:
            prob_BHTM = reference.masked_prob(q_BTHD, k_BMHD, seen_TM, m.scaling)
            return prob_BHTM, torch.matmul(prob_BHTM.to(v_BMHV.dtype), v_BMHV.transpose(1, 2)).transpose(1, 2)

        visible_TM = position_M <= query_T[:, None]
        yield query_T, visible_TM, part.scores(visible_TM), attend


@contextmanager
def measuring_selection(policy: Policy) -> Iterator[Mass]:
    """Inside, a policy with an indexer that is called with dense_attention and with_indexer_kl fills the sums,
    without gradient; time grows with the square of a sequence's length."""
    mass = Mass(policy)
    with _attending(policy, mass.attend):
        yield mass


@contextmanager
def noting_selection(policy: Policy) -> Iterator[Chosen]:
    """Inside, a policy with an indexer that is called with one sequence of more than index_topk tokens notes what it
    selects, without gradient; time grows with the square of the length, and what it notes too."""
    chosen = Chosen(policy)
    with _attending(policy, chosen.attend):
        yield chosen


@contextmanager
def _attending(policy: Policy, attend: Attend) -> Iterator[None]:
    """Inside, latent attention is done so, in rectangles."""
    packed, choose = policy.packed, policy.choose_attend
    policy.packed, policy.choose_attend = False, lambda T, topk: attend
    try:
        yield
    finally:
        policy.packed, policy.choose_attend = packed, choose
