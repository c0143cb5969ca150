"""The policy for training: transformers' model and checkpoint format, our own forward pass over packed sequences.

Shape suffixes: N = tokens of all sequences, B = sequences, D = hidden width, L = MoE layers, K = experts a token,
R = rotary width, V = vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from trimtab.grpo.policy.attention import (
    Attend,
    HeadWeights,
    add_norm,
    choose_attend,
    full_attention,
    latent_attention,
    latent_scale,
    rms_norm,
    rotate_halves,
)
from trimtab.grpo.policy.checkpoint import check_checkpoint, check_settings
from trimtab.grpo.policy.families import Architecture, architecture, check_config
from trimtab.grpo.policy.moe import gated_mlp, routed_mlp
from trimtab.grpo.policy.parts import Pack, Part, blocks_of, lengths_of, to_device


class PolicyOutput(NamedTuple):
    """What one pass over a pack gives."""

    hidden_ND: Tensor
    """After the final norm; times head_weight it gives the logits of the next token."""
    routes_NLK: Tensor | None
    """Experts used: the replayed ones or the routers' own; None without experts."""
    indexer_kl_N: Tensor | None
    """KL of each query in nats, mean over layers; None unless asked for."""


class PolicyLayer(nn.Module):
    """One decoder layer. It adopts the parameters of transformers' layer under their names; all input is explicit.

    Routers and the indexer's head weights become modules that are called, so that sharding can give them units of
    their own, in fp32.
    """

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def __init__(self, layer: nn.Module, family: Architecture, config: Any) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.latent, self.index_rotate = family.latent, family.index_rotate or rotate_halves
        self.routed = hasattr(self.mlp, "experts")
        mlp: Any = self.mlp
        attention: Any = self.self_attn
        if self.routed:
            assert family.router is not None, type(layer)
            mlp.gate = family.router(mlp.gate, config)
        if family.latent:
            attention.scaling = latent_scale(config)
        if family.sparse:
            attention.indexer.weights_proj = HeadWeights(attention.indexer.weights_proj)

    def forward(
        self,
        x_ND: Tensor,
        rotary: tuple[Tensor, Tensor],
        parts: Sequence[Any],
        routes_NK: Tensor | None,
        topk: int,
        with_indexer_kl: bool,
        choose: Callable[[int, int], Attend],
        replay: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the next x, the experts used [N, K] and the indexer's KL [N]; None where there is none."""
        normed_ND = rms_norm(self.input_layernorm, x_ND)
        kl_N: Tensor | None = None
        if self.latent:
            attended_ND, kl_N = latent_attention(
                self.self_attn,
                normed_ND,
                rotary,
                parts,
                topk=topk,
                with_indexer_kl=with_indexer_kl,
                index_rotate=self.index_rotate,
                choose=choose,
                replay=replay,
            )
        else:
            attended_ND = full_attention(self.self_attn, normed_ND, rotary, parts)
        x_ND, normed_ND = add_norm(self.post_attention_layernorm, x_ND, attended_ND)
        if not self.routed:
            return x_ND + gated_mlp(self.mlp, normed_ND), None, kl_N
        mixed_ND, routes_NK = routed_mlp(self.mlp, normed_ND, routes_NK)
        return x_ND + mixed_ND, routes_NK, kl_N


class Policy(nn.Module):
    """A causal language model with our layers in place of transformers'. It takes the model over: its own forward ends.

    Raises:
        ValueError: the architecture is not supported, or something of its config.
    """

    def __init__(self, model: PreTrainedModel, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.family = architecture(type(model).__name__)
        check_config(type(model).__name__, model.config)
        self.model: Any = model
        self.checkpointing = checkpointing
        """Recompute each layer in the backward pass instead of keeping what it computed."""
        self.packed: bool | None = None
        """Attend in Triton, without padding; None: on a GPU."""
        self.choose_attend: Callable[[int, int], Attend] | None = None
        """(longest sequence, topk) -> form of latent attention; None: the faster one."""
        self.sparse = self.family.sparse
        layers = [PolicyLayer(layer, self.family, model.config) for layer in self.model.model.layers]
        self.moe_layers = [i for i, layer in enumerate(layers) if layer.routed]
        self.model.model.layers = nn.ModuleList(layers)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def head_weight(self) -> Tensor:
        """The LM head [V, D]."""
        return self.model.lm_head.weight

    def weights(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers under transformers' names, detached, not copied: for the rollout engine."""
        return {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def indexer_parameters(self) -> list[nn.Parameter]:
        """What learns from the indexer's KL and from nothing else."""
        return [parameter for name, parameter in self.model.named_parameters() if ".indexer." in name]

    def forward(
        self,
        ids_N: Tensor,
        cu_seqlens: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        routes_NLK: Tensor | None = None,
        selected_NLK: Tensor | None = None,
        dense_attention: bool = False,
        with_indexer_kl: bool = False,
    ) -> PolicyOutput:
        """Hidden states of packed sequences; sequence b is ids_N[cu_seqlens[b] : cu_seqlens[b + 1]].

        Args:
            lengths: tokens of each sequence, as cu_seqlens has them; None: read from there, which waits for a GPU.
            routes_NLK: experts to use instead of the routers' choice, for every token and MoE layer [Keep Routing].
            selected_NLK: keys to attend to instead of the indexers' choice, for every layer: index_topk positions in
                their sequence, in any order. Rows of tokens with fewer keys are not read.
            dense_attention: attend to all earlier tokens, as in the indexer's warm-up; else to index_topk of them.
            with_indexer_kl: also compute the indexer's KL, over the keys attended to.

        Raises:
            ValueError: lengths that are not those of the tokens, routes or selections of another shape, an indexer KL
                asked of a policy without indexer, a selection beside dense attention.
        """
        lengths = lengths_of(cu_seqlens) if lengths is None else tuple(lengths)
        self._check(ids_N, lengths, routes_NLK, with_indexer_kl)
        self._check_selected(ids_N, selected_NLK, dense_attention)
        topk = len(ids_N) if dense_attention or not self.sparse else self.config.index_topk
        x_ND = self.model.model.embed_tokens(ids_N)
        parts, choose = self._plan(lengths, x_ND, topk)
        position_N = positions_of(lengths, x_ND.device)
        rotary = self._rotary(x_ND, position_N)
        routes = [] if routes_NLK is None else list(routes_NLK.long().unbind(1))
        used, kls = [], []
        for i, layer in enumerate(self.model.model.layers):
            route_NK = routes[self.moe_layers.index(i)] if routes and i in self.moe_layers else None
            replay = None if selected_NLK is None else (selected_NLK[:, i], position_N)
            arguments = (x_ND, rotary, parts, route_NK, topk, with_indexer_kl, choose, replay)
            if self.checkpointing and torch.is_grad_enabled():
                x_ND, used_NK, kl_N = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_ND, used_NK, kl_N = layer(*arguments)
            used += [used_NK] if used_NK is not None else []
            kls += [kl_N] if kl_N is not None else []
        return PolicyOutput(
            hidden_ND=rms_norm(self.model.model.norm, x_ND),
            routes_NLK=torch.stack(used, 1) if used else None,
            indexer_kl_N=torch.stack(kls).mean(0) if kls else None,
        )

    def _plan(
        self, lengths: Sequence[int], x_ND: Tensor, topk: int
    ) -> tuple[Sequence[Part], Callable[[int, int], Attend]]:
        """How to cut the pack, and the form of latent attention by length."""
        if self.family.latent and (x_ND.is_cuda if self.packed is None else self.packed):
            from trimtab.grpo.policy import packed_attention  # Triton, which a CPU does without

            choose = self.choose_attend or packed_attention.choose_attend
            again = self.checkpointing and torch.is_grad_enabled()
            return packed_attention.spans_of(lengths, x_ND.device, topk, choose, recomputed=again), choose
        choose = self.choose_attend or choose_attend
        if x_ND.is_cuda and x_ND.dtype != torch.float32 and not self.family.latent:
            return [Pack(tuple(lengths), x_ND.device)], choose
        return blocks_of(lengths, x_ND.device), choose

    def _check(self, ids_N: Tensor, lengths: Sequence[int], routes_NLK: Tensor | None, with_indexer_kl: bool) -> None:
        if sum(lengths) != len(ids_N):
            raise ValueError(f"cu_seqlens ends at {sum(lengths)}, but there are {len(ids_N)} tokens")
        if with_indexer_kl and not self.sparse:
            raise ValueError(f"{type(self.model).__name__} has no indexer: leave with_indexer_kl off")
        if routes_NLK is not None:
            experts = self.config.num_experts_per_tok if self.moe_layers else 0
            expected = (len(ids_N), len(self.moe_layers), experts)
            if tuple(routes_NLK.shape) != expected:
                raise ValueError(f"routes have shape {tuple(routes_NLK.shape)}, this pack needs {expected}")

    def _check_selected(self, ids_N: Tensor, selected_NLK: Tensor | None, dense_attention: bool) -> None:
        if selected_NLK is None:
            return
        if dense_attention or not self.sparse:
            raise ValueError("a selection is replayed by sparse attention: leave dense_attention off")
        expected = (len(ids_N), len(self.model.model.layers), self.config.index_topk)
        if tuple(selected_NLK.shape) != expected:
            raise ValueError(f"selections have shape {tuple(selected_NLK.shape)}, this pack needs {expected}")

    def _rotary(self, x_ND: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, R/2] of positions that restart with every sequence: in x's dtype, as vLLM has them, or in
        fp32 for latent attention, as our model in the engine has them.
        """
        like = x_ND.new_empty(0, dtype=torch.float32 if self.family.latent else x_ND.dtype)
        angle = self.model.model.rotary_emb(like, position_N[None])
        if isinstance(angle, Tensor):  # DeepSeek-V2's are complex
            return angle.real.flatten(0, -2).contiguous(), angle.imag.flatten(0, -2).contiguous()
        cos, sin = (part.flatten(0, -2) for part in angle)
        half = cos.shape[-1] // 2
        return cos[:, :half].contiguous(), sin[:, :half].contiguous()

    def save(self, path: Path | str, weights: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint that transformers and vLLM load, of these weights or of its own."""
        with quietly():
            self.model.save_pretrained(path, state_dict=weights)


def positions_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Of each token in its sequence, int64 [N]."""
    return to_device(torch.cat([torch.arange(length) for length in lengths]), device)


def load_policy(path: Path | str, *, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> Policy:
    """Read a transformers checkpoint from a folder.

    Raises:
        ValueError: what check_checkpoint refuses.
    """
    model_class: Any = architecture(check_checkpoint(path)).model
    with quietly():
        model, found = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(f"{path} lacks the weights {sorted(found['missing_keys'])[:5]}")
    return Policy(model, checkpointing=checkpointing)


def random_policy(path: Path | str, *, seed: int, checkpointing: bool = False) -> Policy:
    """A policy of random weights in the shape that a folder's config.json gives, in float32.

    Raises:
        ValueError: what check_settings refuses.
    """
    name, config = check_settings(Path(path))
    model_class: Any = architecture(name).model
    torch.manual_seed(seed)
    return Policy(model_class(config), checkpointing=checkpointing)


@contextmanager
def quietly() -> Iterator[None]:
    """transformers draws a bar for every file, which would tear a live table, and warns of what is meant."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
