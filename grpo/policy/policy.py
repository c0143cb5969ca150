"""The policy for training: transformers' model and checkpoint format, our own forward pass over packed sequences.

Shape suffixes: N = tokens of all sequences, B = sequences, D = hidden width, L = MoE layers, K = experts a token,
R = rotary width, V = vocabulary.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DeepseekV32ForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

from trimtab.grpo.policy.attention import (
    Attend,
    Part,
    blocks_of,
    choose_attend,
    full_attention,
    rms_norm,
    sparse_attention,
)
from trimtab.grpo.policy.moe import deepseek_moe, qwen_moe

Moe = Callable[[nn.Module, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between the supported models."""

    model: type[PreTrainedModel]
    sparse: bool
    """Has an indexer."""
    moe: Moe | None = None


ARCHITECTURES = {
    "DeepseekV32ForCausalLM": Architecture(DeepseekV32ForCausalLM, sparse=True, moe=deepseek_moe),
    "LlamaForCausalLM": Architecture(LlamaForCausalLM, sparse=False),
    "Qwen3ForCausalLM": Architecture(Qwen3ForCausalLM, sparse=False),
    "Qwen3MoeForCausalLM": Architecture(Qwen3MoeForCausalLM, sparse=False, moe=qwen_moe),
}
"""By the name in config.json. Classes are named, never looked up by model type: vLLM re-maps deepseek_v32 there."""


class PolicyOutput(NamedTuple):
    """What one pass over a pack gives."""

    hidden_ND: Tensor
    """After the final norm; times head_weight it gives the logits of the next token."""
    routes_NLK: Tensor | None
    """Experts used: the replayed ones or the routers' own; None without experts."""
    indexer_kl_N: Tensor | None
    """KL of each query in nats, mean over layers; None unless asked for."""


class PolicyLayer(nn.Module):
    """One decoder layer. It adopts the parameters of transformers' layer under their names; all input is explicit."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def __init__(self, layer: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.sparse = architecture.sparse
        self.moe = architecture.moe if hasattr(self.mlp, "experts") else None

    def forward(
        self,
        x_ND: Tensor,
        rotary: tuple[Tensor, Tensor],
        parts: Sequence[Any],
        routes_NK: Tensor | None,
        topk: int,
        with_indexer_kl: bool,
        choose: Callable[[int, int], Attend],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the next x, the experts used [N, K] and the indexer's KL [N]; None where there is none."""
        normed_ND = rms_norm(self.input_layernorm, x_ND)
        kl_N: Tensor | None = None
        if self.sparse:
            attended_ND, kl_N = sparse_attention(
                self.self_attn, normed_ND, rotary, parts, topk=topk, with_indexer_kl=with_indexer_kl, choose=choose
            )
        else:
            attended_ND = full_attention(self.self_attn, normed_ND, rotary, parts)
        x_ND = x_ND + attended_ND
        normed_ND = rms_norm(self.post_attention_layernorm, x_ND)
        if self.moe is None:
            return x_ND + self.mlp(normed_ND), None, kl_N
        mixed_ND, routes_NK = self.moe(self.mlp, normed_ND, routes_NK)
        return x_ND + mixed_ND, routes_NK, kl_N


class Policy(nn.Module):
    """A causal language model with our layers in place of transformers'. It takes the model over: its own forward ends.

    Raises:
        ValueError: the architecture is not supported.
    """

    def __init__(self, model: PreTrainedModel, *, checkpointing: bool = False) -> None:
        super().__init__()
        architecture = _architecture(type(model).__name__)
        if getattr(model.config, "use_sliding_window", False):
            raise ValueError("use_sliding_window is true: sliding-window attention is not supported, set it to false")
        self.model: Any = model
        self.checkpointing = checkpointing
        """Recompute each layer in the backward pass instead of keeping what it computed."""
        self.packed: bool | None = None
        """Attend in Triton, without padding; None: on a GPU."""
        self.choose_attend: Callable[[int, int], Attend] | None = None
        """(longest sequence, topk) -> form of sparse attention; None: the faster one."""
        self.sparse = architecture.sparse
        layers = [PolicyLayer(layer, architecture) for layer in self.model.model.layers]
        self.moe_layers = [i for i, layer in enumerate(layers) if layer.moe is not None]
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
        dense_attention: bool = False,
        with_indexer_kl: bool = False,
    ) -> PolicyOutput:
        """Hidden states of packed sequences; sequence b is ids_N[cu_seqlens[b] : cu_seqlens[b + 1]].

        Args:
            routes_NLK: experts to use instead of the routers' choice, for every token and MoE layer [Keep Routing].
            dense_attention: attend to all earlier tokens, as in the indexer's warm-up; else to index_topk of them.
            with_indexer_kl: also compute the indexer's KL, over the keys attended to.

        Raises:
            ValueError: routes of another shape; an indexer KL asked of a policy without indexer.
        """
        self._check(ids_N, cu_seqlens, routes_NLK, with_indexer_kl)
        topk = len(ids_N) if dense_attention or not self.sparse else self.config.index_topk
        parts, choose = self._plan(cu_seqlens, topk)
        x_ND = self.model.model.embed_tokens(ids_N)
        rotary = self._rotary(x_ND, cu_seqlens)
        routes = [] if routes_NLK is None else list(routes_NLK.long().unbind(1))
        used, kls = [], []
        for i, layer in enumerate(self.model.model.layers):
            route_NK = routes[self.moe_layers.index(i)] if routes and i in self.moe_layers else None
            arguments = (x_ND, rotary, parts, route_NK, topk, with_indexer_kl, choose)
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

    def _plan(self, cu_seqlens: Tensor, topk: int) -> tuple[Sequence[Part], Callable[[int, int], Attend]]:
        """How to cut the pack, and the form of attention by length."""
        if self.sparse and (cu_seqlens.is_cuda if self.packed is None else self.packed):
            from trimtab.grpo.policy import packed_attention  # Triton, which a CPU does without

            choose = self.choose_attend or packed_attention.choose_attend
            return packed_attention.spans_of(cu_seqlens, topk, choose), choose
        return blocks_of(cu_seqlens), self.choose_attend or choose_attend

    def _check(self, ids_N: Tensor, cu_seqlens: Tensor, routes_NLK: Tensor | None, with_indexer_kl: bool) -> None:
        if int(cu_seqlens[-1]) != len(ids_N):
            raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, but there are {len(ids_N)} tokens")
        if with_indexer_kl and not self.sparse:
            raise ValueError(f"{type(self.model).__name__} has no indexer: leave with_indexer_kl off")
        if routes_NLK is not None:
            experts = self.config.num_experts_per_tok if self.moe_layers else 0
            expected = (len(ids_N), len(self.moe_layers), experts)
            if tuple(routes_NLK.shape) != expected:
                raise ValueError(f"routes have shape {tuple(routes_NLK.shape)}, this pack needs {expected}")

    def _rotary(self, x_ND: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, R/2] of positions that restart with every sequence."""
        start_N = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
        position_N = torch.arange(len(x_ND), device=x_ND.device) - start_N
        cos, sin = (angle.flatten(0, -2) for angle in self.model.model.rotary_emb(x_ND, position_N[None]))
        half = cos.shape[-1] // 2
        return cos[:, :half], sin[:, :half]

    def save(self, path: Path | str, weights: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint that transformers and vLLM load, of these weights or of its own."""
        with _no_progress_bars():
            self.model.save_pretrained(path, state_dict=weights)


def check_checkpoint(path: Path | str) -> str:
    """The architecture of the checkpoint in a folder, if load_policy can read it. Reads its config.json only.

    Raises:
        ValueError: no such folder, no config.json in it, or an architecture that is not supported.
    """
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        raise ValueError(f"no checkpoint at {path}: give a folder that holds config.json and model.safetensors")
    try:
        names = json.loads(config_file.read_text())["architectures"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file} names no architecture: write it with save_pretrained") from error
    name = names[0] if names else "none"
    _architecture(name)
    return name


def load_policy(path: Path | str, *, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> Policy:
    """Read a transformers checkpoint from a folder.

    Raises:
        ValueError: what check_checkpoint refuses, or weights that are missing.
    """
    model_class: Any = _architecture(check_checkpoint(path)).model
    with _no_progress_bars():
        model, found = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"the checkpoint at {path} lacks {len(missing)} weights, such as {missing[0]}")
    return Policy(model, checkpointing=checkpointing)


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every file, which would tear a live table."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
