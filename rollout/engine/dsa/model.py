"""DeepSeek-V3.2 (MLA, sparse attention, routed experts) as a model inside vLLM.

Indexer scores, top-k and attention are those that training uses: on a GPU the Triton kernels over the paged cache, on
a CPU plain PyTorch over padded buckets of sequences. Parameters bear the names transformers gives them. At a few
million parameters the number of operations of a decoding step, not their size, is its cost.

Shape suffixes: N = tokens of a step, H = heads, D = index head width, W = latent and rope width of a cached
row, C = latent width, R = rope width, E = experts, K = experts a token, B = sequences of a bucket, T = their
queries (padded), L = their keys (padded).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32RotaryEmbedding, yarn_apply_mscale
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from trimtab.kernels.reference import index_scores, select, selected_ids, sparse_mla
from trimtab.rollout.engine.dsa.modules import Experts, Mlp, Moe, Norm, Weight, masked_mqa, rotate_halves, rotate_pairs
from trimtab.rollout.engine.dsa.paged import DecodeStep, PagedStep, plan_step
from trimtab.rollout.engine.dsa.recording import KEYS, SELECTS

SELECTED_AT_ONCE = 256
"""Queries whose selection is looked at together."""
GATHER_FROM = 12
"""Contexts above this multiple of index_topk gather the selected rows; shorter ones are read whole, with a mask,
which took a third of the time at 4 times index_topk."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of a step with about the same number of new tokens, padded to one shape."""

    token_BT: Tensor  # rows of the step's tokens; the padding repeats a sequence's last
    real: Tensor | None  # which of the B * T are not padding, as indices; None when all are
    block_BN: Tensor  # cache blocks
    visible_BTL: Tensor


def buckets(starts: list[int], lengths: list[int], block_table: Tensor, block_size: int) -> list[Bucket]:
    """Group the sequences of a step by their number of new tokens: 1 (decoding), or the next power of two.

    Args:
        starts: first row of each sequence and the end of the last, [sequences + 1].
        lengths: tokens of each sequence so far, the new ones included.
    """
    members: dict[int, list[int]] = {}
    for i in range(len(starts) - 1):
        if (new := starts[i + 1] - starts[i]) > 0:
            members.setdefault(1 << (new - 1).bit_length(), []).append(i)
    device = block_table.device
    result = []
    for rows in members.values():
        start_B, new_B, length_B = torch.tensor(
            [[starts[i] for i in rows], [starts[i + 1] - starts[i] for i in rows], [lengths[i] for i in rows]]
        ).to(device)
        T = max(starts[i + 1] - starts[i] for i in rows)
        blocks = -(-max(lengths[i] for i in rows) // block_size)
        within_BT = torch.arange(T, device=device).minimum(new_B[:, None] - 1)
        position_BT = (length_B - new_B)[:, None] + within_BT
        real_BT = torch.arange(T, device=device) < new_B[:, None]
        result.append(
            Bucket(
                token_BT=start_B[:, None] + within_BT,
                real=None if T == 1 else real_BT.flatten().nonzero()[:, 0],
                block_BN=block_table[torch.tensor(rows, device=device), :blocks].long(),
                visible_BTL=torch.arange(blocks * block_size, device=device) <= position_BT[..., None],
            )
        )
    return result


def _has_kernels(device: torch.device) -> bool:
    return device.type != "cpu"


def graphs_possible(config: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether CUDA graphs can hold a decoding step of the policy in config.json: routed experts of fp32 multiply by
    torch's grouped product, which waits for the device."""
    return dtype != torch.float32 or "sparse" not in DeepseekV32Config.from_dict(dict(config)).mlp_layer_types


@dataclass
class DsaMetadata(AttentionMetadata):
    """What every layer of a step shares: the places of its new tokens, and the plan of a GPU or that of a CPU."""

    slot_N: Tensor
    step: PagedStep | DecodeStep | None = None
    buckets: list[Bucket] = field(default_factory=list)


class DsaMetadataBuilder(AttentionMetadataBuilder[DsaMetadata]):
    """Plans a step once for all layers. A step of one token a sequence is the engine's own tensors, so a CUDA graph
    that has seen them reads what the engine writes there later."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._topk = vllm_config.compilation_config.static_forward_context[layer_names[0]].topk
        self._width = vllm_config.model_config.max_model_len

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        model = vllm_config.model_config
        if graphs_possible(_policy_config(model.hf_config).to_dict(), model.dtype):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> DsaMetadata:
        m, block_size = common_attn_metadata, self.kv_cache_spec.block_size
        slot_N = m.slot_mapping[: m.num_actual_tokens]
        if not _has_kernels(self.device):
            by_length = buckets(m.query_start_loc_cpu.tolist(), m.seq_lens.tolist(), m.block_table_tensor, block_size)
            return DsaMetadata(slot_N.long(), buckets=by_length)
        if m.max_query_len == 1:
            B, table = m.num_reqs, m.block_table_tensor
            assert m.num_actual_tokens == B and slot_N.dtype == torch.int64, (m.num_actual_tokens, B, slot_N.dtype)
            width = min(self._width, table.shape[1] * block_size)
            return DsaMetadata(slot_N, DecodeStep(slot_N, m.seq_lens[:B], table[:B], block_size, width))
        # The host's lengths are bounds where tokens are drafted ahead, which this engine does not do; here, exact.
        lengths = m.seq_lens_cpu_upper_bound
        plan = plan_step(m.query_start_loc_cpu, lengths, m.block_table_tensor, slot_N, block_size, self._topk)
        return DsaMetadata(slot_N, plan)


class DsaBackend(AttentionBackend):
    """Tells vLLM how to plan; the layer computes attention itself."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "TRIMTAB_DSA"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the layer computes attention itself")

    @staticmethod
    def get_builder_cls() -> type[DsaMetadataBuilder]:
        return DsaMetadataBuilder

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)  # a layer's rows, one after another


class Indexer(nn.Module):
    """The weights that choose what attention sees; weights_proj stays in float32, as transformers keeps it."""

    def __init__(self, wq_b: Tensor, wk: Tensor, weights_proj: Tensor):
        super().__init__()
        self.wq_b, self.wk, self.weights_proj = Weight(wq_b), Weight(wk), Weight(weights_proj)
        self.k_norm = nn.LayerNorm(len(wk), eps=1e-6)


class DsaAttention(nn.Module, AttentionLayerBase):
    """Multi-head latent attention in absorbed form over the keys that the indexer selects.

    A cached row holds the latent, the rotated rope key and the rotated indexer key of one token.
    """

    watched: list[tuple[Tensor, Tensor, Tensor]] | None = None
    """While somebody looks (selected): index queries, head weights and keys of the tokens of each step."""
    records = False
    """Whether what the tokens of a step select goes to capture_fn."""

    def __init__(self, config: DeepseekV32Config, index: int, prefix: str):
        super().__init__()
        c, vllm_config = config, get_current_vllm_config()
        if vllm_config.additional_config.get(KEYS):  # vLLM looks for layer_id and capture_fn, and fills in the latter
            self.records, self.layer_id = True, SELECTS + index
            self.capture_fn: Callable[[Tensor], None] | None = None
        self.prefix, self.dtype = prefix, vllm_config.model_config.dtype
        self.H, self.C, self.R = c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
        self.nope, self.V = c.qk_nope_head_dim, c.v_head_dim
        self.index_H, self.D, self.topk = c.index_n_heads, c.index_head_dim, c.index_topk
        self.scale = yarn_apply_mscale(c.rope_parameters, (self.nope + self.R) ** -0.5)
        self.index_scale = (self.index_H * self.D) ** -0.5
        self._down_sizes = [c.q_lora_rank, self.C, self.R, self.D]
        self._down = torch.empty(sum(self._down_sizes), c.hidden_size)
        rows = self._down.split([c.q_lora_rank, self.C + self.R, self.D])
        self.q_a_proj, self.kv_a_proj_with_mqa = Weight(rows[0]), Weight(rows[1])
        self._up_sizes = [self.H * (self.nope + self.R), self.index_H * self.D]
        self._up = torch.empty(sum(self._up_sizes), c.q_lora_rank)
        q_b, wq_b = self._up.split(self._up_sizes)
        self.q_b_proj = Weight(q_b)
        self.indexer = Indexer(wq_b, rows[2], torch.empty(self.index_H, c.hidden_size, dtype=torch.float32))
        self.kv_b_proj = Weight(torch.empty(self.H * (self.nope + self.V), self.C))
        self.o_proj = Weight(torch.empty(c.hidden_size, self.H * self.V))
        self.q_a_layernorm, self.kv_a_layernorm = Norm(c.q_lora_rank, 1e-6), Norm(self.C, 1e-6)
        self.kv_cache = torch.empty(0)
        layers = vllm_config.compilation_config.static_forward_context
        assert prefix not in layers, prefix
        layers[prefix] = self

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the cache: [blocks, 1 head, block, width]."""
        self.kv_cache = kv_cache.squeeze(1)
        assert self.kv_cache.is_contiguous(), self.kv_cache.stride()

    def get_attn_backend(self) -> type[AttentionBackend]:
        return DsaBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MLAAttentionSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.C + self.R + self.D,
            dtype=self.dtype,
        )

    def forward(self, x: Tensor, wide: Tensor, turn: Tensor) -> Tensor:
        """x [N, hidden], wide the same in float32; turn [N, 1, R / 2], the complex rotation of each position."""
        w_uk, w_uv = self.kv_b_proj.weight.view(self.H, self.nope + self.V, self.C).split([self.nope, self.V], 1)
        steps = get_forward_context().attn_metadata
        metadata = None if steps is None else steps[self.prefix]
        project = self._project_in_kernels if x.is_cuda else self._project
        q, index_q = project(x, w_uk, turn, None if metadata is None else metadata.slot_N)
        if metadata is None:
            out = q[..., : self.C]
        else:
            weight = F.linear(wide, self.indexer.weights_proj.weight) * self.index_scale
            out = self._attend(q, index_q, weight, metadata)
        value = torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
        return F.linear(value.flatten(1), self.o_proj.weight)

    def _project(self, x: Tensor, w_uk: Tensor, turn: Tensor, slot_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries in latent form [N, H, W] and the indexer's [N, heads, D]; the rows of the new tokens are cached.

        Args:
            slot_N: their places; -1, which fills up a step, is the block that nothing reads.
        """
        compressed, latent, rope, index_k = F.linear(x, self._down).split(self._down_sizes, -1)
        latent, compressed = self.kv_a_layernorm(latent), self.q_a_layernorm(compressed)
        q, index_q = F.linear(compressed, self._up).split(self._up_sizes, -1)
        q = q.unflatten(-1, (self.H, -1))
        rope = rotate_pairs(torch.cat([q[..., self.nope :], rope[:, None]], 1), turn)
        index_k = self.indexer.k_norm(index_k)
        index = rotate_halves(torch.cat([index_q, index_k], -1).unflatten(-1, (-1, self.D)), turn)
        absorbed = torch.bmm(q[..., : self.nope].transpose(0, 1), w_uk).transpose(0, 1)
        if slot_N is not None:
            row = torch.cat([latent, rope[:, self.H], index[:, self.index_H]], -1)[: len(slot_N)]
            cache = self.kv_cache.flatten(0, 1)
            cache.index_copy_(0, slot_N.long().clamp(min=0), row.to(cache.dtype))
        return torch.cat([absorbed, rope[:, : self.H]], -1), index[:, : self.index_H]

    def _project_in_kernels(
        self, x: Tensor, w_uk: Tensor, turn: Tensor, slot_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What _project does, in a launch for all that lies between two products."""
        from trimtab.kernels.decoder import latent_rows, rotate_queries

        ix = self.indexer
        if slot_N is None:  # a dry run before there is a cache
            slot_N = torch.full((len(x),), -1, device=x.device)
            cache = x.new_empty(1, self.C + self.R + self.D)
        else:
            cache = self.kv_cache.flatten(0, 1)
        gains = self.q_a_layernorm.weight, self.kv_a_layernorm.weight, ix.k_norm.weight, ix.k_norm.bias
        compressed = latent_rows(F.linear(x, self._down), *gains, turn, slot_N, cache, ix.k_norm.eps)
        up = F.linear(compressed, self._up)
        q_NHW = x.new_empty(len(x), self.H, self.C + self.R)
        index_q = rotate_queries(up, turn, q_NHW, self.nope, self.index_H)
        nope = up[:, : self._up_sizes[0]].unflatten(-1, (self.H, -1))[..., : self.nope]
        torch.bmm(nope.transpose(0, 1), w_uk, out=q_NHW[..., : self.C].transpose(0, 1))
        return q_NHW, index_q

    def _attend(self, q_NHW: Tensor, index_q: Tensor, weight: Tensor, metadata: DsaMetadata) -> Tensor:
        """Attend to what is cached: [N, H, C]."""
        if self.watched is not None:
            N = len(metadata.slot_N)
            keys_ND = self.kv_cache.flatten(0, 1)[metadata.slot_N.long()][:, -self.D :]
            self.watched.append((index_q[:N].clone(), weight[:N].clone(), keys_ND))
        record = self.capture_fn if self.records else None
        if step := metadata.step:
            assert len(step.slot_N) == len(q_NHW), (len(step.slot_N), len(q_NHW))
            cache = self.kv_cache.flatten(0, 1)
            return step.attend(
                q_NHW, index_q, weight, cache, value_dim=self.C, topk=self.topk, scale=self.scale, record=record
            )
        out_NHC = q_NHW.new_zeros(*q_NHW.shape[:2], self.C)
        id_NK = torch.full((len(q_NHW), self.topk), -1)
        for bucket in metadata.buckets:
            token = bucket.token_BT
            out, id_BTK = self._attend_bucket(q_NHW[token], index_q[token], weight[token], bucket)
            real = slice(None) if bucket.real is None else bucket.real
            out_NHC[token.flatten()[real]] = out.flatten(0, 1)[real]
            if id_BTK is not None:
                id_NK[token.flatten()[real]] = id_BTK.flatten(0, 1)[real]
        if record is not None:
            record(id_NK)
        return out_NHC

    def selected(self, length: int) -> Tensor:
        """What the queries of a sequence selected whose tokens were the last that this layer saw, from position topk
        on: bool [length - topk, length]. Ends the watch."""
        assert self.watched is not None
        q_NHD, w_NH, k_ND = (torch.cat(parts)[:length] for parts in zip(*self.watched, strict=True))
        self.watched = None
        position_N = torch.arange(length, device=k_ND.device)
        queries = position_N[self.topk :].split(SELECTED_AT_ONCE)
        return torch.cat(
            [select(index_scores(q_NHD[i], k_ND, w_NH[i], position_N <= i[:, None]), self.topk) for i in queries]
        )

    def _attend_bucket(
        self, q_BTHW: Tensor, index_q: Tensor, weight: Tensor, bucket: Bucket
    ) -> tuple[Tensor, Tensor | None]:
        """Values [B, T, H, C], and the selected positions [B, T, topk] where they are needed and there is a choice."""
        B = len(bucket.block_BN)
        rows = self.kv_cache.index_select(0, bucket.block_BN.flatten()).view(B, -1, self.kv_cache.shape[-1])
        row_BLW, key_BLD = rows.split([self.C + self.R, self.D], -1)
        mask_BTL = bucket.visible_BTL
        length = mask_BTL.shape[-1]
        id_BTK, gathers = None, length > GATHER_FROM * self.topk
        if length > self.topk:
            mask_BTL = select(index_scores(index_q, key_BLD, weight, mask_BTL), self.topk)
            id_BTK = selected_ids(mask_BTL, self.topk) if gathers or self.records else None
        if id_BTK is not None and gathers:
            return sparse_mla(q_BTHW, row_BLW, id_BTK, self.C, self.scale)[0], id_BTK
        return masked_mqa(q_BTHW, row_BLW, mask_BTL, self.C, self.scale), id_BTK


class FusedExperts(Experts):
    """Routed experts in vLLM's fused Triton kernels, which read the stacked weights as they are: none is ever stale.

    Their fp32 products run in TF32, so this is for half precision.
    """

    def forward(self, x: Tensor, ids_NK: Tensor, gate_NK: Tensor) -> Tensor:
        return fused_experts(x, self.gate_up_proj, self.down_proj, gate_NK.float(), ids_NK.int())


class Layer(nn.Module):
    """One block: attention, then a dense or a routed feed-forward, each behind its norm."""

    def __init__(self, config: DeepseekV32Config, index: int, prefix: str):
        super().__init__()
        self.self_attn = DsaAttention(config, index, f"{prefix}.self_attn")
        if config.mlp_layer_types[index] == "sparse":
            half = torch.get_default_dtype() != torch.float32
            experts = FusedExperts if half and _has_kernels(torch.get_default_device()) else Experts
            self.mlp: nn.Module = Moe(config, index, experts(config))
        else:
            self.mlp = Mlp(config.hidden_size, config.intermediate_size)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, delta: Tensor | None, turn: Tensor) -> tuple[Tensor, Tensor]:
        """The stream x and what the block before adds to it, to those of the block behind."""
        x, normed, wide = self.input_layernorm.after(x, delta)
        x, normed, wide = self.post_attention_layernorm.after(x, self.self_attn(normed, wide, turn))
        return x, self.mlp(normed, wide)


class Decoder(nn.Module):
    """All but the head."""

    def __init__(self, config: DeepseekV32Config, prefix: str):
        super().__init__()
        c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i, f"{prefix}.layers.{i}") for i in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        delta = None
        for layer in self.layers:
            x, delta = layer(x, delta, turn)
        return self.norm.after(x, delta)[1]


def _policy_config(hf_config: Any) -> DeepseekV32Config:
    """The policy's config. vLLM reads deepseek_v32 as DeepseekV3Config, which knows neither mlp_layer_types nor
    rope_parameters."""
    return DeepseekV32Config.from_dict(hf_config.to_dict() | {"model_type": "deepseek_v32"})


class DsaForCausalLM(nn.Module):
    """transformers' DeepseekV32ForCausalLM, and its GlmMoeDsaForCausalLM, for vLLM, parameter for parameter.

    Raises:
        ValueError: a config with attention biases, or with a RoPE that depends on the length.
    """

    _turn: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = c = _policy_config(vllm_config.model_config.hf_config)
        if c.attention_bias:
            raise ValueError("attention_bias=true is not supported; DeepSeek-V3.2 has none")
        if c.rope_parameters["rope_type"] not in ("default", "yarn", "linear"):
            raise ValueError(f"rope_type {c.rope_parameters['rope_type']!r} is not supported; use default or yarn")
        prefix = f"{prefix}.model" if prefix else "model"
        self.model = Decoder(c, prefix)
        self.lm_head = Weight(torch.empty(c.vocab_size, c.hidden_size))
        if c.tie_word_embeddings:
            self.lm_head = Weight(self.model.embed_tokens.weight.data)
        positions = torch.arange(vllm_config.model_config.max_model_len)
        with torch.device("cpu"):  # a GPU's powers differ in the last bit, which a long context multiplies
            rotary = DeepseekV32RotaryEmbedding(c)
        cos, sin = rotary.to(positions.device)(torch.empty(0, dtype=torch.float32), positions[None])
        half = c.qk_rope_head_dim // 2
        # A buffer, so that sleep keeps it; not of the checkpoint.
        self.register_buffer("_turn", torch.complex(cos[0, :, None, :half], sin[0, :, None, :half]), persistent=False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model(x, self._turn[positions])

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        weight = self.lm_head.weight
        if hidden_states.is_cuda and hidden_states.dtype != torch.float32:  # logits keep the sums' precision
            return torch.mm(hidden_states, weight.T, out_dtype=torch.float32)
        return F.linear(hidden_states, weight)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy weights in; routed experts come one by one, as in a checkpoint, or stacked, as in a trainer.

        Raises:
            ValueError: a name that this model does not have, or a shape that does not fit.
        """
        parameters = dict(self.named_parameters())
        seen = set()
        for name, weight in weights:
            if ".indexer." in name and getattr(self.config, "indexer_rope_interleave", False):
                weight = halves_of_pairs(name, weight, self.config.index_head_dim, self.config.qk_rope_head_dim)
            key, index = _stacked(name)
            if key not in parameters:
                if key == "lm_head.weight" and self.config.tie_word_embeddings:
                    continue
                raise ValueError(f"the policy has no parameter {name!r}")
            target = parameters[key].data
            if index is not None:
                target = target[index[0]] if index[1] is None else target[index[0]].chunk(2)[index[1]]
            if target.shape != weight.shape:
                raise ValueError(f"{name!r} has shape {tuple(weight.shape)}, the policy wants {tuple(target.shape)}")
            target.copy_(weight)
            seen.add(key)
        return seen


def halves_of_pairs(name: str, weight: Tensor, head_dim: int, rope_dim: int) -> Tensor:
    """An indexer's weight whose RoPE pairs neighbouring channels, for one that pairs halves: as transformers turns
    GLM's, the first channels of all pairs come before the second."""
    if "weights_proj" in name:
        return weight
    heads = weight.unflatten(0, (-1, head_dim))
    rope, rest = heads.split([rope_dim, head_dim - rope_dim], 1)
    return torch.cat([rope[:, 0::2], rope[:, 1::2], rest], 1).flatten(0, 1)


def _stacked(name: str) -> tuple[str, tuple[int, int | None] | None]:
    """The stacked parameter of one expert's weight, with the expert's number and the half it fills."""
    before, found, after = name.partition(".experts.")
    if not found or not after[0].isdigit():
        return name, None
    expert, projection, _ = after.split(".")
    half = {"gate_proj": 0, "up_proj": 1, "down_proj": None}[projection]
    return f"{before}.experts.{'down_proj' if half is None else 'gate_up_proj'}", (int(expert), half)
