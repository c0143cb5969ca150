"""A GGUF file becomes a checkpoint: weights de-quantised to bf16, tokenizer and chat template beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trimtab.grpo.policy.policy import check_checkpoint, quietly

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
    "deepseek-r1-qwen": lambda: _split(_QWEN2),
    "smollm": _digits,
}
"""How text is cut before merging, by llama.cpp's name (tokenizer.ggml.pre): a file holds the name alone."""


class Header(NamedTuple):
    """What a file says of itself, and the names of its tensors."""

    fields: Mapping[str, Any]
    tensors: frozenset[str]


def convert(file: Path, folder: Path) -> None:
    """Write what a GGUF file holds into a folder, as transformers and vLLM load it.

    Raises:
        ValueError: the file is damaged, or holds an architecture or a form that is not supported.
    """
    header = read_header(file)
    if header.tensors & {"rope_freqs.weight", "rope_factors_long.weight"}:
        raise ValueError(f"{file} keeps its RoPE scaling as a tensor, which is not read: give the original checkpoint")
    with quietly():
        _read(file, _tokenizer, header).save_pretrained(folder)
        _read(file, _model, header).save_pretrained(folder)
    check_checkpoint(folder)


def read_header(file: Path) -> Header:
    """The fields that decide how to read on.

    Raises:
        ValueError: the file is no GGUF file, or it ends too early.
    """
    from gguf import GGUFReader

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file")
    reader = _read(file, GGUFReader)
    names = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id")
    fields = {name: reader.fields[name].contents() for name in names if name in reader.fields}
    return Header(fields, frozenset(tensor.name for tensor in reader.tensors))


def _read(file: Path, read: Any, *arguments: Any) -> Any:
    """What `read` makes of the file; whatever goes wrong in it, the file is the reason."""
    try:
        return read(file, *arguments)
    except Exception as error:  # a file of others: libraries raise anything on what they did not expect
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file} is damaged or not supported: {reason or type(error).__name__}") from error


def _tokenizer(file: Path, header: Header) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if header.fields.get("tokenizer.ggml.model") == "gpt2":
        kind = header.fields.get("tokenizer.ggml.pre", "default")
        if kind not in PRE_TOKENIZERS:
            raise ValueError(f"its tokenizer cuts text as {kind!r}; known: {', '.join(PRE_TOKENIZERS)}")
        tokenizer.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]()
        if "qwen" in kind:
            tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _model(file: Path, header: Header) -> Any:
    """A plain model with the file's weights: the one that transformers reads is tied to its file."""
    load: Any = AutoModelForCausalLM.from_pretrained
    read, found = load(file.parent, gguf_file=file.name, dtype=torch.bfloat16, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers would leave them random
        raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
    weights = read.state_dict()
    if broken := sorted(name for name, weight in weights.items() if not weight.isfinite().all()):
        raise ValueError(f"{len(broken)} of its tensors are not finite, such as {broken[0]}")
    config = read.config
    del config.quantization_config
    turn_end = header.fields.get("tokenizer.ggml.eot_token_id", config.eos_token_id)
    if turn_end != config.eos_token_id:
        config.eos_token_id = [config.eos_token_id, turn_end]
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model
