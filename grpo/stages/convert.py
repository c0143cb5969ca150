"""From a dense checkpoint with latent attention to a sparse one: a fresh lightning indexer in every layer.

What a DeepSeek-V2 or V3 checkpoint computes, DeepSeek-V3.2 computes too as long as no query sees more than index_topk
keys [DeepSeek-V3.2-Exp, section 2]. So the weights are not read: their files are copied, and the indexers come as a
file beside them. A new indexer selects nothing in particular; the warm-up teaches it.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from trimtab.grpo.policy.checkpoint import INDEX, WHOLE, Shapes, check_checkpoint, shapes_in
from trimtab.grpo.policy.families import architecture
from trimtab.grpo.stages.config import Indexer

INDEXER_FILE = "model-indexer.safetensors"
FROM = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
OTHER_FILES = (".json", ".jinja", ".model", ".txt")
"""Endings of what goes along: tokenizer, chat template, generation settings. Code of a model's own is left behind."""
DROPPED = (
    "architectures",
    "model_type",
    "auto_map",
    "rope_interleave",
    "num_nextn_predict_layers",
    "transformers_version",
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did: sizes in parameters and in bytes, and what was left behind, in words."""

    name: str
    parameters: int
    added: int
    bytes: int
    added_bytes: int
    left_out: tuple[str, ...]

    @property
    def summary(self) -> str:
        return f"{self.name} -> DeepseekV32ForCausalLM"


def convert(source: Path, out: Path, indexer: Indexer) -> Converted:
    """Write the sparse checkpoint of a dense one to a new folder; the source stays as it is.

    Raises:
        ValueError: a checkpoint that cannot be converted, an indexer that does not fit it, a folder that is there, a
            disk without room for it.
    """
    name, config = _dense(source)
    sparse = _sparse(config, indexer)
    if out.exists():
        raise ValueError(f"{out} is there already: nothing is overwritten, give another folder")
    weights = sorted(source.glob("*.safetensors"))
    shapes, dtype = shapes_in(source), _dtype(config)
    added = _indexers(sparse, dtype, indexer.seed)
    added_bytes = sum(tensor.nbytes for tensor in added.values())
    size = sum(file.stat().st_size for file in weights) + added_bytes
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < size:
        raise ValueError(f"the result needs {size / 1e9:.1f} GB, {out.parent} has room for {free / 1e9:.1f} GB")
    drafts = _drafts(shapes, sparse.num_hidden_layers)
    with _whole_or_not_at_all(out) as partial:
        where = _copy_weights(source, partial, drafts)
        save_file(added, partial / INDEXER_FILE, metadata={"format": "pt"})
        where |= dict.fromkeys(added, INDEXER_FILE)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _copy_others(source, partial)
        sparse.save_pretrained(partial)
        check_checkpoint(partial)
    left_out = tuple([f"{len(drafts)} weights of layers that draft further tokens"] if drafts else [])
    left_out += tuple(f"{file.name}, code of its own" for file in sorted(source.glob("*.py")))
    kept = sum(math.prod(shape) for key, shape in shapes.items() if key not in drafts)
    return Converted(name, kept, sum(tensor.numel() for tensor in added.values()), size, added_bytes, left_out)


def _dense(source: Path) -> tuple[str, Any]:
    """The architecture and configuration of a checkpoint that can become sparse.

    Raises:
        ValueError: it cannot.
    """
    name = check_checkpoint(source)
    family = architecture(name)
    if family.sparse:
        raise ValueError(f"{name} has an indexer already: there is nothing to convert, train it as it is")
    if not family.latent or name not in FROM:
        raise ValueError(f"{name} has no latent attention (MLA), which the indexer works on; convert takes {_names()}")
    model_class: Any = family.model
    config = model_class.config_class.from_pretrained(source)
    if config.q_lora_rank is None:
        raise ValueError(f"{name}: q_lora_rank is null, but the indexer reads compressed queries")
    if name == "DeepseekV2ForCausalLM" and config.first_k_dense_replace < config.num_hidden_layers:
        raise ValueError(
            "DeepseekV2ForCausalLM: its routers weigh experts by a softmax, those of DeepSeek-V3.2 by sigmoids, so "
            " the result would compute something else; without experts, or from DeepSeek-V3, it does not"
        )
    return name, config


def _names() -> str:
    return " and ".join(FROM)


def _sparse(config: Any, indexer: Indexer) -> DeepseekV32Config:
    """The configuration of DeepSeek-V3.2 that computes what a dense one does, with an indexer.

    Raises:
        ValueError: the indexer does not fit it.
    """
    if indexer.index_topk >= config.max_position_embeddings:
        raise ValueError(
            f"index_topk is {indexer.index_topk}, but the model has {config.max_position_embeddings} positions: "
            "nothing would be sparse; set index_topk below"
        )
    if indexer.index_head_dim < config.qk_rope_head_dim:
        raise ValueError(
            f"index_head_dim is {indexer.index_head_dim}, below the {config.qk_rope_head_dim} rotary dimensions that "
            "it must hold"
        )
    kept = {name: value for name, value in config.to_dict().items() if name not in DROPPED}
    kept["n_shared_experts"] = kept.get("n_shared_experts") or 0
    sizes = {name: getattr(indexer, name) for name in ("index_topk", "index_n_heads", "index_head_dim")}
    sparse = DeepseekV32Config(**(kept | sizes))
    sparse.architectures = ["DeepseekV32ForCausalLM"]
    return sparse


def _dtype(config: Any) -> torch.dtype:
    return DTYPES.get(str(config.dtype).removeprefix("torch."), torch.bfloat16)


def _indexers(config: DeepseekV32Config, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Fresh weights of every layer's indexer: matrices from N(0, initializer_range^2), norms at 1 and 0."""
    with torch.device("meta"):
        names = DeepseekV32ForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, like in names.items():
        if ".indexer." not in name:
            continue
        if like.dim() == 1:
            weight = torch.full(like.shape, float(name.endswith("weight")))
        else:
            weight = torch.empty(like.shape).normal_(0.0, config.initializer_range, generator=generator)
        found[name] = weight.to(dtype)
    return found


def _drafts(shapes: Shapes, layers: int) -> set[str]:
    """Weights of layers behind the last, which draft further tokens and would need indexers of their own."""
    return {key for key in shapes if key.startswith("model.layers.") and int(key.split(".")[2]) >= layers}


def _copy_weights(source: Path, out: Path, left_out: set[str]) -> dict[str, str]:
    """Copy the files of weights; one that holds what is left out is written anew. Returns the file of every weight."""
    if (source / INDEX).is_file():
        where: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
        names = {file: file for file in where.values()}
    else:
        where = dict.fromkeys(shapes_in(source), WHOLE)
        names = {WHOLE: "model-00001-of-00001.safetensors"}  # under its own name, an index would not be looked for
    for file, name in names.items():
        keys = {key for key, of in where.items() if of == file}
        if not keys & left_out:
            shutil.copyfile(source / file, out / name)
        elif keys - left_out:
            with safe_open(source / file, "pt") as opened:
                kept = {key: opened.get_tensor(key) for key in sorted(keys - left_out)}
            save_file(kept, out / name, metadata={"format": "pt"})
    return {key: names[file] for key, file in where.items() if key not in left_out}


def _copy_others(source: Path, out: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in OTHER_FILES and file.name not in (INDEX, "config.json"):
            shutil.copyfile(file, out / file.name)


@contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[Path]:
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        partial = Path(temporary) / "checkpoint"
        partial.mkdir()
        yield partial
        os.replace(partial, out)
