"""What the indexer selects: how much of dense attention falls on it, and how far an engine selects the same.

Shape suffixes: B = sequences of a block, T = its longest, M = keys (= T), H = heads, L = layers.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.grpo.policy.attention import Attend, Index, Latents, attend_dense
from trimtab.grpo.policy.parts import Block
from trimtab.grpo.policy.policy import Policy
from trimtab.kernels import reference


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
        assert index is not None and topk >= block.T, "measured where attention is dense and the indexer is computed"
        out_BTHV, kl_BT = attend_dense(mla, latents, index, block, topk, with_kl)
        if self._topk < block.T:
            prob_BHTM, _ = _attention(mla, latents, block.causal_TM)
            selected_BTM = reference.select(index.scores(block.causal_TM), self._topk)
            mass_BT = (prob_BHTM.mean(1) * selected_BTM).sum(-1)
            real_BT = torch.arange(block.T) < torch.tensor(block.lengths)[:, None]
            real_BT[:, : self._topk] = False
            layer = self._layers[id(mla)]
            self._selected[layer] += float(mass_BT.cpu()[real_BT].sum())
            self._queries[layer] += int(real_BT.sum())
        return out_BTHV, kl_BT


class Chosen:
    """The selection of one sequence by layer, and the attention paid to it."""

    def __init__(self, policy: Policy):
        self._topk = int(policy.config.index_topk)
        self.selected: list[Tensor] = []
        """Of each layer: bool [T - topk, T], queries from position topk on."""
        self.attention: list[Tensor] = []
        """... and its attention, mean over heads: float32 [T - topk, T]."""

    def attend(
        self, mla: nn.Module, latents: Latents, index: Index | None, block: Block, topk: int, with_kl: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sparse attention (attention.Attend) that takes note of what it does."""
        assert index is not None and topk == self._topk < block.T and len(block.lengths) == 1
        selected_BTM = reference.select(index.scores(block.causal_TM), topk)
        prob_BHTM, out_BTHV = _attention(mla, latents, selected_BTM)
        self.selected.append(selected_BTM[0, topk:].cpu())
        self.attention.append(prob_BHTM.mean(1)[0, topk:].cpu())
        return out_BTHV, None


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


def _attention(mla: nn.Module, latents: Latents, seen_BTM: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys seen [B, H, T, M], and the values that it gives [B, T, H, V]."""
    m: Any = mla
    kv_BTHD = m.kv_b_proj(latents.latent_BTC).unflatten(-1, (m.num_heads, -1))
    k_nope, v_BTHV = kv_BTHD.split([m.qk_nope_head_dim, m.v_head_dim], -1)
    k_rope = latents.k_rope_BTR[:, :, None].expand(-1, -1, m.num_heads, -1)
    prob_BHTM = reference.masked_prob(latents.q_BTHD, torch.cat([k_nope, k_rope], -1), seen_BTM, m.scaling)
    return prob_BHTM, torch.matmul(prob_BHTM.to(v_BTHV.dtype), v_BTHV.transpose(1, 2)).transpose(1, 2)


@contextmanager
def measuring_selection(policy: Policy) -> Iterator[Mass]:
    """Inside, a policy with an indexer that is called with dense_attention and with_indexer_kl fills the sums. It
    attends in rectangles, with time and memory that grow with the square of a sequence's length."""
    mass = Mass(policy)
    with _attending(policy, mass.attend):
        yield mass


@contextmanager
def noting_selection(policy: Policy) -> Iterator[Chosen]:
    """Inside, a policy with an indexer that is called with one sequence of more than index_topk tokens notes what it
    selects; time and memory grow with the square of the length."""
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
