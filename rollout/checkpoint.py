"""What the files of a checkpoint folder say that rollouts need, read without the model's libraries."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.rollout.types import PolicyShape


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {folder}: config.json is missing")
    return json.loads(path.read_text())


def moe_layers(config: Mapping[str, Any]) -> list[int]:
    """The layers with routed experts, of a config.json."""
    layers = range(config["num_hidden_layers"])
    if kinds := config.get("mlp_layer_types"):
        return [i for i in layers if kinds[i] == "sparse"]
    if "first_k_dense_replace" in config:
        return [i for i in layers if i >= config["first_k_dense_replace"]]
    if "decoder_sparse_step" in config or "mlp_only_layers" in config:
        step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
        return [i for i in layers if i not in dense and (i + 1) % step == 0]
    return []


def policy_shape(config: Mapping[str, Any], version: int, *, keep_selection: bool = False) -> PolicyShape:
    """What engines record of a policy with this config.json, at a version of its weights."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    experts = next((config[name] for name in names if name in config), 0)
    return PolicyShape(
        vocabulary=config["vocab_size"],
        moe_layers=len(moe_layers(config)),
        experts_per_token=config.get("num_experts_per_tok", 0),
        experts=experts,
        version=version,
        selected=(config["num_hidden_layers"], config["index_topk"]) if keep_selection else (0, 0),
    )


def stop_ids(folder: str | Path) -> tuple[int, ...]:
    """The ids that end a turn: those of generation_config.json, of config.json and the tokenizer's eos, in this order.

    They often differ (a base model's config under a chat tokenizer); a turn that ends with any of them has ended. What
    the chat template ends turns with comes on top of them (TemplateChat.stop_ids).
    """
    folder = Path(folder)
    eos = [_read(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
    ids = [i for one in eos for i in (one if isinstance(one, list) else [one])]
    return tuple(dict.fromkeys(int(i) for i in (*ids, _tokenizer_eos(folder)) if i is not None))


def _tokenizer_eos(folder: Path) -> int | None:
    settings = _read(folder / "tokenizer_config.json")
    eos = settings.get("eos_token") or _read(folder / "special_tokens_map.json").get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if text is None:
        return None
    added = {token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    if text in added:
        return added[text]
    tokenizer = _read(folder / "tokenizer.json")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return added.get(text, vocabulary.get(text) if isinstance(vocabulary, dict) else None)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
