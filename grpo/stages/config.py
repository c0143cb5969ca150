"""What stages other than RL are, as frozen dataclasses. Imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from trimtab.grpo.config import Domain, Judge, Rollout, Settings
from trimtab.rollout.types import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervised(Settings):
    """Training on what is there already: texts, or what assistants say in conversations."""

    out: str = ""
    """Folder of the run; empty: runs/RECIPE-DATE-TIME."""
    model: str = ""
    """What to start from: a checkpoint folder (transformers format), a .gguf file, or a name on the model hub."""
    random_weights: bool = False
    """Start from nothing: of the model only config.json and the tokenizer are read."""
    data: tuple[str, ...] = ()
    """Files to learn from, .jsonl or .parquet."""
    form: Literal["text", "conversations"] = "text"
    """text: the loss asks for every token. conversations: lists of messages in OpenAI's form, of which the loss asks
    for what assistants say; a row's field `thinking` (true or false) goes before `thinking` here."""
    field: str = ""
    """Where a row has it; empty: text, or messages."""
    thinking: bool = True
    """Assistants reason before they answer, in conversations that do not say."""
    prompt_weight: float = 0.0
    """Weight in the loss of the tokens that nobody asks for, such as a user's."""
    dense_attention: bool = False
    """Attend to all earlier tokens although the model has an indexer: the indexer learns from all keys."""
    learns: Literal["all", "indexer"] = "all"
    """indexer: everything else is frozen, and what comes out has its weights to the bit."""
    indexer_kl: float = 1.0
    """Weight of the indexer's KL, whose gradient reaches the indexer alone; 0 freezes the indexer."""
    epochs: float = 1.0
    """Passes over the data, where steps is not set."""
    steps: int | None = None
    """Optimiser steps; None: what epochs come to."""
    plateau: int | None = None
    """Stop once the loss that is learnt from (the indexer's, where it learns alone) has not fallen by 1 % from one
    window of so many steps to the next; None: never."""
    max_len: int | None = None
    """Longest sequence in tokens; None: as many as the model has positions, at most 8192."""
    tokens_per_step: int = 65536
    """A batch has the fewest sequences that reach it."""
    tokens_per_microbatch: int = 8192
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices inside the layers; the rest has AdamW."""
    lr: float = 1e-5
    warmup_steps: int | None = None
    """Steps with a smaller learning rate, which rises linearly; None: a twentieth of all."""
    lr_end_share: float = 0.1
    """Share of lr that the last step has, after a linear fall; 1 keeps it constant."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Largest norm of a gradient: of the policy's, and apart from it of the indexer's."""
    precision: Literal["bf16", "fp32"] | None = None
    """What is computed in; weights and optimiser stay in fp32. None: bf16 on a GPU, fp32 on a CPU."""
    offload: Literal["none", "optimizer"] = "none"
    """What rests in host memory while it is not needed."""
    checkpoint_activations: bool = False
    """Recompute each layer in the backward pass to save memory."""
    held_out: int = 64
    """Rows of the data, its last ones, that are measured before and after and never trained on."""
    save_every: int = 100
    """Steps between checkpoints; the two newest are kept."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "plateau",
            "max_len",
            "tokens_per_step",
            "tokens_per_microbatch",
            "held_out",
            "save_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "max_grad_norm", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "indexer_kl", "prompt_weight", "seed"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if not 0 <= self.lr_end_share <= 1:
            raise ValueError(f"lr_end_share must lie in [0, 1], got {self.lr_end_share}")
        if self.learns == "indexer" and not self.indexer_kl:
            raise ValueError("learns is indexer and indexer_kl is 0: nothing would learn; leave indexer_kl out")

    @property
    def text_field(self) -> str:
        return self.field or ("text" if self.form == "text" else "messages")


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation(Settings):
    """Answers of specialists become conversations to learn from: those that are right, short, and said once.

    Every domain names the specialist that plays it as its teacher; one that is to be learnt with thinking and without
    is two domains.
    """

    domains: dict[str, Domain]
    out: str = ""
    """Folder of what is sampled; empty: runs/RECIPE-DATE-TIME."""
    prompts: int = 256
    """Of each domain."""
    samples: int = 4
    """Answers to each prompt ..."""
    keep: int = 1
    """... and how many of them stay at most, the shortest first."""
    at_least: float = 1.0
    """What an answer must have earned of its domain's score part."""
    max_tokens: int | None = None
    """Sampled tokens of an answer that stays, at most; None: any number."""
    language: str = ""
    """ISO 639-1 code of the language that answers and reasoning must be in; empty: a task's own part `language` counts,
    where it has one."""
    min_language: float = 0.9
    """Share of the words that must be in it."""
    prompts_at_once: int = 32
    """Of each domain, played together and written together: what a kill costs."""
    rollout: Rollout = field(default_factory=Rollout)
    sampling: Sampling = field(default_factory=Sampling)
    judge: Judge = field(default_factory=Judge)
    syntax: str = ""
    """As in RL's settings (grpo/config.py: Config), as are those below."""
    precision: Literal["bf16", "fp32"] | None = None
    sandbox: Literal["isolated", "limits"] = "isolated"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("domains is empty; name at least one")
        for name in ("prompts", "keep", "prompts_at_once", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, got {self.samples}")
        if not 0 <= self.min_language <= 1:
            raise ValueError(f"min_language is a share of words in [0, 1], got {self.min_language}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer:
    """The lightning indexer that every layer gets [DeepSeek-V3.2-Exp, eq. 1]; defaults are the released model's."""

    index_topk: int = 2048
    """Keys that a query attends to at most."""
    index_n_heads: int = 64
    """Heads of the indexer ..."""
    index_head_dim: int = 128
    """... and the width of each: a power of two that holds the rotary dimensions."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.index_topk < 1 or self.index_n_heads < 1:
            heads = f"{self.index_topk} and {self.index_n_heads}"
            raise ValueError(f"index_topk and index_n_heads must be at least 1, got {heads}")
        if self.index_head_dim < 16 or self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(f"index_head_dim must be a power of two of at least 16, got {self.index_head_dim}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion(Settings):
    """A dense checkpoint with latent attention becomes a sparse one (stages/convert.py)."""

    model: str
    out: str = ""
    indexer: Indexer = field(default_factory=Indexer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstrations(Settings):
    """Conversations that tasks themselves show, for a policy that starts from nothing."""

    domains: dict[str, Domain]
    """Each has as many conversations as its `demonstrations` weigh."""
    conversations: int
    out: str = ""
    judge: float = 0.0
    """Weight of demonstrations of judging."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.conversations < 1 or not self.domains:
            raise ValueError(f"demonstrations need domains and a number of conversations, got {self.conversations}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Blank(Settings):
    """A model without weights: a shape, and a tokenizer in DeepSeek-V3.2's format, learnt from what it will read."""

    shape: str
    """Import path of a function (vocab_size, bos_id, eos_id) -> transformers' configuration."""
    data: tuple[str, ...]
    """Files whose rows have `text` or `messages`, as Supervised.data."""
    out: str = ""
    vocab_size: int = 1024

    def __post_init__(self) -> None:
        if self.vocab_size < 512:
            raise ValueError(f"vocab_size must be at least 512 (256 bytes, markup and words), got {self.vocab_size}")
