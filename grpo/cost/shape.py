"""A model's sizes, from its config.json alone: what the ledger and the FLOPs are counted from. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Matrices = Mapping[str, tuple[int, int]]
"""Width in and width out of each product with a weight, by the module's name in transformers."""

DENSE = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
LATENT = frozenset({"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"})
SPARSE = frozenset({"DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"})
FAMILIES = DENSE | LATENT | {"Qwen3MoeForCausalLM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttention:
    """Attention with fewer key than query heads."""

    heads: int
    kv_heads: int
    width: int
    normed: bool
    """Queries and keys are normalised head by head."""
    biases: tuple[str, ...] = ()

    @property
    def pair_width(self) -> int:
        """Multiplications of one query with one key and its value, over all heads."""
        return self.heads * 2 * self.width

    @property
    def key_pair_width(self) -> int:
        """Those with the key alone."""
        return self.heads * self.width

    @property
    def cached(self) -> int:
        """Values that the engine keeps for a token."""
        return 2 * self.kv_heads * self.width

    @property
    def norms(self) -> int:
        return 2 * self.width if self.normed else 0

    def matrices(self, hidden: int) -> Matrices:
        q, kv = self.heads * self.width, self.kv_heads * self.width
        return {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}

    def saved(self, absorbed: bool) -> int:
        """Values a token that the backward pass needs: q, k, v, the output and its copy that o_proj reads; for norms of
        each head, q and k before them and normalised."""
        q, kv = self.heads * self.width, self.kv_heads * self.width
        return 3 * q + 2 * kv + (2 * (q + kv) if self.normed else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (MLA) of DeepSeek-V2."""

    heads: int
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    biases: tuple[str, ...] = ()

    @property
    def pair_width(self) -> int:
        return self.heads * (self.nope + self.rope + self.value)

    @property
    def key_pair_width(self) -> int:
        return self.heads * (self.nope + self.rope)

    @property
    def cached(self) -> int:
        return self.kv_rank + self.rope

    @property
    def norms(self) -> int:
        return self.kv_rank + (self.q_rank or 0)

    def matrices(self, hidden: int) -> Matrices:
        q = self.heads * (self.nope + self.rope)
        queries = (
            {"q_a_proj": (hidden, self.q_rank), "q_b_proj": (self.q_rank, q)}
            if self.q_rank
            else {"q_proj": (hidden, q)}
        )
        return queries | {
            "kv_a_proj_with_mqa": (hidden, self.kv_rank + self.rope),
            "kv_b_proj": (self.kv_rank, self.heads * (self.nope + self.value)),
            "o_proj": (self.heads * self.value, hidden),
        }

    def saved(self, absorbed: bool) -> int:
        """Values a token: both latents before and after their norms and normalised, the rotated part, then q, k, v, the
        output and its copy; absorbed: q and the output as wide as a latent, in place of k and v."""
        latents = 3 * (self.kv_rank + (self.q_rank or 0)) + self.rope
        q, output = self.nope + self.rope, 2 * self.value
        if absorbed:
            return latents + self.heads * (q + 2 * self.kv_rank + self.rope + output)
        return latents + self.heads * (2 * q + self.nope + self.value + output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer:
    """The lightning indexer of DeepSeek Sparse Attention."""

    heads: int
    width: int
    q_rank: int

    @property
    def pair_width(self) -> int:
        return self.heads * self.width

    @property
    def norms(self) -> int:
        return 2 * self.width  # a LayerNorm: weight and bias

    def matrices(self, hidden: int) -> Matrices:
        return {
            "wq_b": (self.q_rank, self.heads * self.width),
            "wk": (hidden, self.width),
            "weights_proj": (hidden, self.heads),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A gated MLP."""

    width: int
    biased: bool = False

    def matrices(self, hidden: int) -> Matrices:
        return {
            "gate_proj": (hidden, self.width),
            "up_proj": (hidden, self.width),
            "down_proj": (self.width, hidden),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A router and its experts, each a gated MLP."""

    total: int
    chosen: int
    width: int

    def weights(self, hidden: int) -> int:
        """Weights of one expert."""
        return 3 * hidden * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer."""

    hidden: int
    attention: GroupedAttention | LatentAttention
    indexer: Indexer | None = None
    topk: int | None = None
    """Keys a query attends to at most; None: all."""
    mlp: Mlp | None = None
    """The dense MLP, or the shared experts as one."""
    experts: Experts | None = None

    @property
    def matrices(self) -> Matrices:
        """All products that every token goes through, but for the indexer's."""
        mlp = self.mlp.matrices(self.hidden) if self.mlp else {}
        gate = {"gate": (self.hidden, self.experts.total)} if self.experts else {}
        return {**self.attention.matrices(self.hidden), **mlp, **gate}

    @property
    def active(self) -> int:
        """Weights that a token is multiplied with, but for the indexer's."""
        chosen = self.experts.chosen * self.experts.weights(self.hidden) if self.experts else 0
        return _weights(self.matrices) + chosen

    @property
    def indexer_weights(self) -> int:
        return _weights(self.indexer.matrices(self.hidden)) if self.indexer else 0

    @property
    def parameters(self) -> int:
        matrices = self.matrices
        biases = sum(matrices[name][1] for name in self.attention.biases if name in matrices)
        biases += 2 * self.mlp.width + self.hidden if self.mlp and self.mlp.biased else 0
        norms = 2 * self.hidden + self.attention.norms + (self.indexer.norms if self.indexer else 0)
        idle = (self.experts.total - self.experts.chosen) * self.experts.weights(self.hidden) if self.experts else 0
        return self.active + idle + self.indexer_weights + biases + norms


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A whole model."""

    architecture: str
    vocabulary: int
    hidden: int
    tied: bool
    layers: tuple[Layer, ...]

    @property
    def head(self) -> int:
        """Weights of the language model's head."""
        return self.vocabulary * self.hidden

    @property
    def outside_layers(self) -> int:
        """Parameters of the embedding, the last norm and the head."""
        return self.head * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.outside_layers + sum(layer.parameters for layer in self.layers)

    @property
    def active(self) -> int:
        """Parameters in products of one token, head included: what "A3B" means in a model's name."""
        return self.head + sum(layer.active + layer.indexer_weights for layer in self.layers)

    @property
    def cached(self) -> int:
        """Values of all layers that the engine keeps for a token."""
        return sum(layer.attention.cached + (layer.indexer.width if layer.indexer else 0) for layer in self.layers)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The sizes of a model from its config.json.

    Raises:
        ValueError: an architecture that is not supported, or a size that is missing.
    """
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ValueError(f"architecture {architecture} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    try:
        return Shape(
            architecture=architecture,
            vocabulary=config["vocab_size"],
            hidden=config["hidden_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            layers=tuple(_layer(architecture, config, i) for i in range(config["num_hidden_layers"])),
        )
    except KeyError as error:
        raise ValueError(f"config.json of {architecture} lacks {error}; write it with save_pretrained") from error


def _layer(architecture: str, config: Mapping[str, Any], i: int) -> Layer:
    experts = _experts(config) if _is_moe(architecture, config, i) else None
    shared = (config.get("n_shared_experts") or 0) if experts else 0
    width = experts.width * shared if experts else config["intermediate_size"]
    sparse = architecture in SPARSE
    return Layer(
        hidden=config["hidden_size"],
        attention=_latent(config) if architecture in LATENT else _grouped(architecture, config),
        indexer=_indexer(config) if sparse and _has_indexer(config, i) else None,
        topk=config["index_topk"] if sparse else None,
        mlp=Mlp(width=width, biased=bool(config.get("mlp_bias"))) if width else None,
        experts=experts,
    )


def _grouped(architecture: str, config: Mapping[str, Any]) -> GroupedAttention:
    heads = config["num_attention_heads"]
    biases: tuple[str, ...] = ()
    if architecture == "Qwen2ForCausalLM":
        biases = ("q_proj", "k_proj", "v_proj")
    elif config.get("attention_bias"):
        biases = ("q_proj", "k_proj", "v_proj", "o_proj")
    return GroupedAttention(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        width=config.get("head_dim") or config["hidden_size"] // heads,
        normed=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        biases=biases,
    )


def _latent(config: Mapping[str, Any]) -> LatentAttention:
    biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if config.get("attention_bias") else ()
    return LatentAttention(
        heads=config["num_attention_heads"],
        q_rank=config.get("q_lora_rank"),
        kv_rank=config["kv_lora_rank"],
        nope=config["qk_nope_head_dim"],
        rope=config["qk_rope_head_dim"],
        value=config["v_head_dim"],
        biases=biased,
    )


def _indexer(config: Mapping[str, Any]) -> Indexer:
    return Indexer(heads=config["index_n_heads"], width=config["index_head_dim"], q_rank=config["q_lora_rank"])


def _experts(config: Mapping[str, Any]) -> Experts:
    names = ("n_routed_experts", "num_local_experts", "num_experts")
    total = next(config[name] for name in names if config.get(name))
    return Experts(total=total, chosen=config["num_experts_per_tok"], width=config["moe_intermediate_size"])


def _is_moe(architecture: str, config: Mapping[str, Any], i: int) -> bool:
    if architecture == "Qwen3MoeForCausalLM":
        return i not in (config.get("mlp_only_layers") or ()) and (i + 1) % config.get("decoder_sparse_step", 1) == 0
    if architecture not in LATENT:
        return False
    types: Sequence[str] | None = config.get("mlp_layer_types")
    return types[i] == "sparse" if types else i >= config["first_k_dense_replace"]


def _has_indexer(config: Mapping[str, Any], i: int) -> bool:
    """GLM's layers may take over the selection of the layer before them."""
    types: Sequence[str] | None = config.get("indexer_types")
    return types is None or types[i] == "full"


def _weights(matrices: Matrices) -> int:
    return sum(width_in * width_out for width_in, width_out in matrices.values())
