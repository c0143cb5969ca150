"""How much of the attention that would be paid to all keys falls on those that the indexer selects.

Shape suffixes: B = sequences of a block, T = its longest, M = keys (= T), H = heads.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.grpo.policy.attention import Index, Latents, attend_dense
from trimtab.grpo.policy.parts import Block
from trimtab.grpo.policy.policy import Policy
from trimtab.kernels import reference


class Mass:
    """Sums of attention by layer."""

    def __init__(self, policy: Policy):
        self._topk = int(policy.config.index_topk)
        self._layers = {id(layer.self_attn): i for i, layer in enumerate(policy.model.model.layers)}
        self._selected: dict[int, float] = defaultdict(float)
        self._queries: dict[int, int] = defaultdict(int)

    def by_layer(self) -> list[float]:
        """Share of the attention, mean over queries with more than index_topk keys and over heads; 1 without any."""
        layers = self._layers.values()
        return [self._selected[i] / self._queries[i] if self._queries[i] else 1.0 for i in layers]

    def attend(
        self, mla: nn.Module, latents: Latents, index: Index | None, block: Block, topk: int, with_kl: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Dense attention (attention.Attend) that takes note of what the selection would have kept of it."""
        assert index is not None and topk >= block.T, "measured where attention is dense and the indexer is computed"
        out_BTHV, kl_BT = attend_dense(mla, latents, index, block, topk, with_kl)
        if self._topk < block.T:
            m: Any = mla
            k_nope = m.kv_b_proj(latents.latent_BTC).unflatten(-1, (m.num_heads, -1))[..., : m.qk_nope_head_dim]
            k_rope = latents.k_rope_BTR[:, :, None].expand(-1, -1, m.num_heads, -1)
            prob_BHTM = reference.masked_prob(
                latents.q_BTHD, torch.cat([k_nope, k_rope], -1), block.causal_TM, m.scaling
            )
            selected_BTM = reference.select(index.scores(block.causal_TM), self._topk)
            mass_BT = (prob_BHTM.mean(1) * selected_BTM).sum(-1)
            real_BT = torch.arange(block.T) < torch.tensor(block.lengths)[:, None]
            real_BT[:, : self._topk] = False
            layer = self._layers[id(mla)]
            self._selected[layer] += float(mass_BT.cpu()[real_BT].sum())
            self._queries[layer] += int(real_BT.sum())
        return out_BTHV, kl_BT


@contextmanager
def measuring_selection(policy: Policy) -> Iterator[Mass]:
    """Inside, a policy with an indexer that is called with dense_attention and with_indexer_kl fills the sums. It
    attends in rectangles, with time and memory that grow with the square of a sequence's length."""
    mass, packed, choose = Mass(policy), policy.packed, policy.choose_attend
    policy.packed, policy.choose_attend = False, lambda T, topk: mass.attend
    try:
        yield mass
    finally:
        policy.packed, policy.choose_attend = packed, choose
