"""What a checkpoint folder says of the ends of turns: three files that often differ, one answer."""

import json

import pytest
from tiny import tiny_tokenizer

from trimtab.rollout.checkpoint import moe_layers, read_config, stop_ids


def write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config": {"eos_token_id": None}}, ()),
        ({"config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [7, 2, 9]}}, (7, 2, 9)),
        (
            {
                "config": {"eos_token_id": 2},
                "tokenizer_config": {"eos_token": "<e>", "added_tokens_decoder": {"5": {"content": "<e>"}}},
            },
            (2, 5),
        ),
        (
            {
                "tokenizer_config": {"eos_token": {"content": "<e>"}},
                "tokenizer": {"added_tokens": [{"id": 6, "content": "<e>"}]},
            },
            (6,),
        ),
        ({"special_tokens_map": {"eos_token": "<e>"}, "tokenizer": {"model": {"vocab": {"<e>": 0}}}}, (0,)),
        ({"tokenizer_config": {"eos_token": "<e>"}, "tokenizer": {"model": {"vocab": [["<e>", 0.0]]}}}, ()),
    ],
)
def test_stop_ids_are_those_of_all_files(tmp_path, files, expected):
    write(tmp_path, **files)
    assert stop_ids(tmp_path) == expected


def test_a_saved_tokenizer_tells_its_end_of_sentence(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    write(tmp_path, config={"eos_token_id": 1})
    assert stop_ids(tmp_path) == (1, tokenizer.eos_token_id)


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*: config\.json is missing"):
        read_config(tmp_path)


def test_moe_layers_are_read_from_the_config():
    deepseek = {"architectures": ["DeepseekV32ForCausalLM"], "num_hidden_layers": 4, "first_k_dense_replace": 3}
    qwen = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 4}
    assert moe_layers(deepseek) == [3]
    assert moe_layers(qwen | {"decoder_sparse_step": 2}) == [1, 3]
    assert moe_layers({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4}) == []
