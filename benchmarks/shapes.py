"""Checkpoints of the benchmarks: exact shapes, random weights, a tokenizer with an entry for every id, a chat template.

    python benchmarks/shapes.py qwen3-0.6b FOLDER

The weights are random but behave like a trained model's where time depends on it: the sampler keeps about nine ids of a
token, and the end of a turn is never among them, so that every answer runs to its limit. Also here: what a shape costs
at the least, in bytes and floating-point operations, and what the card gives at best by its data sheet.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPREAD = 8.0
"""Standard deviation of the logits: of 49,152 to 151,936 such logits, top-p 0.95 of the best 64 keeps 9 in the mean."""
EOS = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "Llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-0.6b": ("Qwen3", {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, **QWEN}),
    "qwen3-1.7b": ("Qwen3", {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, **QWEN}),
    "dsa-1.6b": (
        "DeepseekV32",
        {
            "vocab_size": 49152,
            "hidden_size": 1536,
            "intermediate_size": 4096,
            "moe_intermediate_size": 512,
            "num_hidden_layers": 12,
            "first_k_dense_replace": 1,
            "n_routed_experts": 48,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "index_n_heads": 16,
            "index_head_dim": 128,
            "index_topk": 2048,
            "max_position_embeddings": 16384,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
QWEN_REST = {
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # vLLM has no narrower ones on a CPU
SHAPES |= {
    "tiny-llama": ("Llama", {**TINY, **TINY_HEADS, "tie_word_embeddings": True}),
    "tiny-qwen3": ("Qwen3", {**TINY, **TINY_HEADS}),
    "tiny-dsa": (
        "DeepseekV32",
        {
            **SHAPES["dsa-1.6b"][1],
            **TINY,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 32,
            "max_position_embeddings": 2048,
        },
    ),
}
for sparse, dense in (("dsa-1.6b", "mla-1.6b"), ("tiny-dsa", "tiny-mla")):
    kept = {key: value for key, value in SHAPES[sparse][1].items() if not key.startswith("index_")}
    SHAPES[dense] = ("DeepseekV3", {**kept, "max_position_embeddings": 10 * kept["max_position_embeddings"]})
SHAPES["mla-v3"] = (
    "DeepseekV3",
    {
        **SHAPES["mla-1.6b"][1],
        "hidden_size": 7168,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 3,
        "n_routed_experts": 8,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
    },
)
"""DeepSeek-V3's attention, beside feed-forwards that are small."""
SHAPES["tiny-mla"][1]["qk_nope_head_dim"] = 24  # heads of 32, as vLLM has them on a CPU
"""By name: the family, and the configuration. The tiny ones prove on a CPU that a benchmark runs."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's name and what its data sheet promises: dense bf16 FLOP/s, bytes/s of its memory, its GiB."""

    name: str
    flops: float
    bandwidth: float
    gib: float


def card() -> Card:
    """The GPU of this machine, by nvidia-smi, so that no CUDA context is made; a CPU gets rates of no meaning."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return Card("CPU (no figure of it means anything)", 1e11, 1e10, 16.0)
    if "H200" in name:
        return Card(name, 989e12, 4.8e12, 140.0)
    return Card(name, 989e12, 3.35e12, 79.6)


def used_gib() -> float:
    """GiB of the GPU that are taken, by everybody; 0 without a GPU."""
    try:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]) / 1024
    except (OSError, subprocess.CalledProcessError, IndexError):
        return 0.0


def checkpoint(name: str) -> Path:
    """The folder of a shape's checkpoint; made once, by a process of its own, so that its memory is free again."""
    folder = Path("runs") / "shapes" / name
    if not (folder / "tokenizer_config.json").is_file():
        subprocess.run([sys.executable, __file__, name, str(folder)], check=True)
    return folder.resolve()


def save(name: str, folder: Path) -> None:
    """Write the checkpoint of a shape; its parts are written in bf16, with the tokenizer last."""
    import torch
    import transformers

    family, values = SHAPES[name]
    if family == "Qwen3":
        values = QWEN_REST | values
    tokenizer = make_tokenizer(values["vocab_size"])
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{family}Config")(**values, **ids, initializer_range=0.02)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    torch.set_default_dtype(before)
    with torch.no_grad():
        _behave(model, tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _behave(model: Any, eos: int) -> None:
    """Spread the logits, and make the end of a turn impossible.

    Element 0 of the residual stream holds one value, which no layer changes, and the head turns it into a logit far
    below all others for that one id.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    model.model.norm.weight.fill_(SPREAD / (0.02 * embedding.shape[1] ** 0.5))
    for key, weight in model.named_parameters():
        if key.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            weight.select(weight.dim() - 2, 0).zero_()
    head[:, 0] = 0.1 if head is embedding else 0.0
    embedding[:, 0] = 0.1
    head[eos, 0] = -100.0


def make_tokenizer(vocab_size: int) -> Any:
    """A token a byte, and as many more that text never needs but that decode, as sampled ids must."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", EOS]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = [f"w{i:x}" for i in range(vocab_size - len(letters) - len(marks))]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*marks, *letters, *filler])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=marks[0], clean_up_tokenization_spaces=False
    )
    fast.chat_template = TEMPLATE
    return fast


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs at the least, counted from its configuration."""

    config: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "Cost":
        return cls(json.loads((folder / "config.json").read_text()))

    @property
    def sparse(self) -> bool:
        return "index_topk" in self.config

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def moe_layers(self) -> int:
        return self.layers - self.config["first_k_dense_replace"] if self.sparse else 0

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.config["vocab_size"] * self.config["hidden_size"]

    @property
    def expert(self) -> int:
        return 3 * self.config["hidden_size"] * self.config.get("moe_intermediate_size", 0)

    @property
    def shared(self) -> int:
        """Parameters that every token is multiplied with, the head left out."""
        c, D = self.config, self.config["hidden_size"]
        if not self.sparse:
            width = c.get("head_dim") or D // c["num_attention_heads"]
            attention = D * width * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
            return self.layers * (attention + 3 * D * c["intermediate_size"])
        H, C, qk = c["num_attention_heads"], c["kv_lora_rank"], c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
        queries = c["q_lora_rank"] * (D + H * qk + c["index_n_heads"] * c["index_head_dim"])
        keys = D * (C + c["qk_rope_head_dim"]) + C * H * (c["qk_nope_head_dim"] + c["v_head_dim"])
        rest = D * (H * c["v_head_dim"] + c["index_head_dim"] + c["index_n_heads"])
        mlp = (self.layers - self.moe_layers) * 3 * D * c["intermediate_size"]
        shared = self.moe_layers * (self.expert * c.get("n_shared_experts", 1) + D * c["n_routed_experts"])
        return self.layers * (queries + keys + rest) + mlp + shared

    @property
    def parameters(self) -> int:
        """All parameters, norms left out."""
        embeddings = self.head * (1 if self.config.get("tie_word_embeddings") else 2)
        return self.shared + embeddings + self.moe_layers * self.config.get("n_routed_experts", 0) * self.expert

    def forward_flops(self, length: int) -> float:
        """FLOPs of one forward pass over a sequence, the head left out; attention over the keys that it has to see."""
        c = self.config
        routed = self.moe_layers * self.expert * c.get("num_experts_per_tok", 0)
        pairs = length * (length + 1) / 2
        if not self.sparse:
            width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
            seen = 4 * pairs * c["num_attention_heads"] * width
        else:
            K = min(length, c["index_topk"])
            selected = K * (K + 1) / 2 + (length - K) * K
            widths = c["qk_nope_head_dim"] + c["qk_rope_head_dim"] + c["v_head_dim"]
            seen = (
                2 * selected * c["num_attention_heads"] * widths + 2 * pairs * c["index_n_heads"] * c["index_head_dim"]
            )
        return 2 * length * (self.shared + routed) + self.layers * seen

    def update_flops(self, length: int, kept: int) -> float:
        """FLOPs that an update needs for one sequence: the policy's forward and backward pass and the reference's
        forward pass; logits of the ids in the kept sets alone, nothing recomputed."""
        return 4 * (self.forward_flops(length) + 2 * kept * self.config["hidden_size"])

    def row_bytes(self, length: int) -> float:
        """Bytes of the cache, in bf16, that one decoding step of a sequence reads."""
        c = self.config
        if not self.sparse:
            width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
            return 4.0 * self.layers * length * c["num_key_value_heads"] * width
        latent = c["kv_lora_rank"] + c["qk_rope_head_dim"]
        return 2.0 * self.layers * (length * c["index_head_dim"] + min(length, c["index_topk"]) * latent)

    def cached_bytes(self, tokens: int) -> float:
        """Bytes of the cache, in bf16, that so many tokens take."""
        c = self.config
        if not self.sparse:
            return self.row_bytes(tokens)
        return 2.0 * self.layers * tokens * (c["index_head_dim"] + c["kv_lora_rank"] + c["qk_rope_head_dim"])

    def decode_bytes(self, lengths: list[int]) -> float:
        """Bytes that a decoding step of these sequences has to read: every weight it touches once, and its rows.

        An expert is touched unless all sequences pass it by, each with a chance of 1 - K / E.
        """
        c, touched = self.config, 0.0
        if self.moe_layers:
            missed = (1 - c["num_experts_per_tok"] / c["n_routed_experts"]) ** len(lengths)
            touched = self.moe_layers * c["n_routed_experts"] * self.expert * (1 - missed)
        return 2 * (self.shared + self.head + touched) + sum(map(self.row_bytes, lengths))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    save(options.name, options.folder)
