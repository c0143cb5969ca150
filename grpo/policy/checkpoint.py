"""Whether a checkpoint folder can be loaded, found out from config.json and the headers of its weights alone.

Weights are compared with the model by name and shape, on the meta device: seconds for a checkpoint of any size.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.grpo.policy.families import architecture, check_config

Shapes = dict[str, tuple[int, ...]]
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def check_checkpoint(path: Path | str) -> str:
    """The architecture of the checkpoint in a folder, if load_policy can read it.

    Raises:
        ValueError: what check_settings refuses, or weights that are quantised, missing, cut off, left over or of
            another shape.
    """
    folder = Path(path)
    name, config = check_settings(folder)
    model_class: Any = architecture(name).model
    with torch.device("meta"):
        model = model_class(config)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    raw = json.loads((folder / "config.json").read_text())
    first, drafts = config.num_hidden_layers, raw.get("num_nextn_predict_layers") or 0
    ignored += [rf"model\.layers\.{first + i}\." for i in range(drafts)]  # heads that draft further tokens
    _compare(folder, wanted, shapes_in(folder), [r"rotary_emb\.inv_freq", r"^lm_head\.weight$", *ignored])
    return name


def check_settings(folder: Path) -> tuple[str, Any]:
    """The architecture that a folder's config.json names, and transformers' reading of it; weights are not looked at.

    Raises:
        ValueError: no config.json there, an architecture or a setting that is not supported.
    """
    config_file = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not config_file.is_file():
        raise ValueError(f"{folder} holds an adapter alone; --lora.merge makes a `merged` to start from")
    if not config_file.is_file():
        raise ValueError(f"no checkpoint at {folder}: give a folder that holds config.json and model.safetensors")
    try:
        names = json.loads(config_file.read_text())["architectures"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file} names no architecture: write it with save_pretrained") from error
    name = names[0] if names else "none"
    model_class: Any = architecture(name).model
    try:
        config = model_class.config_class.from_pretrained(folder)
    except Exception as error:  # transformers' own checks of what a user wrote, in exceptions of many kinds
        raise ValueError(f"{config_file} does not fit {name}: {' '.join(str(error).split())[:300]}") from error
    check_config(name, config)
    return name, config


def _compare(folder: Path, wanted: Shapes, found: Shapes, ignored: list[str]) -> None:
    wanted = dict(_as_stored(wanted, found))
    if missing := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"the checkpoint at {folder} lacks {len(missing)} weights, such as {missing[0]}")
    unknown = sorted(key for key in found.keys() - wanted.keys() if not any(re.search(rule, key) for rule in ignored))
    if unknown:
        raise ValueError(
            f"the checkpoint at {folder} holds {len(unknown)} weights that its model lacks, such as {unknown[0]}: "
            "config.json and the weights do not belong together"
        )
    for key, shape in wanted.items():
        if found[key] != shape:
            raise ValueError(
                f"the checkpoint at {folder} holds {key} with shape {found[key]}, but config.json wants {shape}: they "
                "do not belong together"
            )


def _as_stored(wanted: Shapes, found: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Stacked experts may lie in a file one by one."""
    for key, shape in wanted.items():
        before, _, projection = key.rpartition(".")
        if key in found or not before.endswith(".experts"):
            yield key, shape
        elif projection == "gate_up_proj":
            for i in range(shape[0]):
                yield f"{before}.{i}.gate_proj.weight", (shape[1] // 2, shape[2])
                yield f"{before}.{i}.up_proj.weight", (shape[1] // 2, shape[2])
        else:
            yield from ((f"{before}.{i}.{projection}.weight", shape[1:]) for i in range(shape[0]))


def shapes_in(folder: Path) -> Shapes:
    """Names and shapes of the weights in a checkpoint's folder, from the headers of its files.

    Raises:
        ValueError: no weights there, or files that are missing, torn or of another format.
    """
    if not (folder / INDEX).is_file():
        if not (folder / WHOLE).is_file():
            raise ValueError(f"no weights at {folder}: neither {WHOLE} nor {INDEX} is there")
        return _header(folder / WHOLE)
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / INDEX} is not an index of weights: download it again") from error
    files = sorted(set(weight_map.values()))
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{len(absent)} of {len(files)} files of the checkpoint at {folder} are missing: {absent[0]}")
    shapes = {key: shape for file in files for key, shape in _header(folder / file).items()}
    if lost := sorted(weight_map.keys() - shapes.keys()):
        raise ValueError(f"{folder / weight_map[lost[0]]} lacks {lost[0]}, which the index says it holds")
    return shapes


def _header(file: Path) -> Shapes:
    """Names and shapes in a safetensors file: eight bytes of length, a header in JSON, the data."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(min(length, file.stat().st_size)))
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a safetensors file: download it again") from error
    if file.stat().st_size < 8 + length + end:
        raise ValueError(f"{file} is cut off at {file.stat().st_size} of {8 + length + end} bytes: download it again")
    return shapes
