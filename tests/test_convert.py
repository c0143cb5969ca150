"""A dense checkpoint becomes a sparse one that computes the same as long as nothing is left out of attention."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LATENT, save_tiny
from transformers import DeepseekV3ForCausalLM, DeepseekV32ForCausalLM

from trimtab.grpo.commands.cli import main
from trimtab.grpo.policy.policy import load_policy
from trimtab.grpo.stages.config import Indexer
from trimtab.grpo.stages.convert import INDEXER_FILE, convert

SMALL = Indexer(index_topk=16, index_n_heads=4, index_head_dim=16)
WIDE = Indexer(index_topk=64, index_n_heads=4, index_head_dim=16)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
IDS = torch.randint(0, 384, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dense(tmp_path):
    save_tiny(tmp_path / "dense", "DeepseekV3ForCausalLM")
    return tmp_path / "dense"


@pytest.mark.parametrize("rope", [LATENT["rope_parameters"], YARN], ids=["default", "yarn"])
def test_up_to_index_topk_keys_it_computes_what_the_dense_one_did_in_transformers_and_here(tmp_path, rope):
    before = save_tiny(tmp_path / "dense", "DeepseekV3ForCausalLM", rope_parameters=rope)
    convert(tmp_path / "dense", tmp_path / "sparse", WIDE)
    after = DeepseekV32ForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(after(IDS).logits, before(IDS).logits, rtol=0, atol=1e-4)
        dense, sparse = load_policy(tmp_path / "dense"), load_policy(tmp_path / "sparse")
        cu_seqlens = torch.tensor([0, IDS.numel()])
        hidden_ND = dense(IDS[0], cu_seqlens).hidden_ND
        torch.testing.assert_close(sparse(IDS[0], cu_seqlens).hidden_ND, hidden_ND, rtol=0, atol=1e-5)


def test_beyond_index_topk_keys_the_indexer_decides_and_dense_attention_is_as_before(dense, tmp_path):
    convert(dense, tmp_path / "sparse", SMALL)
    before, after = load_policy(dense), load_policy(tmp_path / "sparse")
    cu_seqlens = torch.tensor([0, IDS.numel()])
    with torch.no_grad():
        hidden_ND = before(IDS[0], cu_seqlens).hidden_ND
        assert not torch.allclose(after(IDS[0], cu_seqlens).hidden_ND, hidden_ND, atol=1e-2)
        same_ND = after(IDS[0], cu_seqlens, dense_attention=True).hidden_ND
    torch.testing.assert_close(same_ND, hidden_ND, rtol=0, atol=1e-5)


def test_the_source_stays_and_everything_but_the_indexer_is_copied(dense, tmp_path):
    (dense / "modeling_own.py").write_text("raise SystemExit")
    before = {file.name: file.read_bytes() for file in dense.iterdir()}
    done = convert(dense, tmp_path / "sparse", SMALL)
    assert {file.name: file.read_bytes() for file in dense.iterdir()} == before
    added = load_file(tmp_path / "sparse" / INDEXER_FILE)
    assert done.added == sum(weight.numel() for weight in added.values()) > 0
    assert all(".indexer." in name and weight.isfinite().all() for name, weight in added.items())
    assert done.left_out == ("modeling_own.py, code of its own",)
    assert not (tmp_path / "sparse" / "modeling_own.py").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "sparse" / name).read_bytes() == before[name]
    weights = load_file(dense / "model.safetensors")
    copied = load_file(tmp_path / "sparse" / "model-00001-of-00001.safetensors")
    assert copied.keys() == weights.keys() and all(copied[name].equal(weights[name]) for name in weights)


def test_the_seed_decides_the_indexer(dense, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(dense, tmp_path / name, Indexer(index_topk=16, index_n_heads=4, index_head_dim=16, seed=seed))
    a, b, c = (load_file(tmp_path / name / INDEXER_FILE) for name in "abc")
    assert all(a[name].equal(b[name]) for name in a)
    assert not all(a[name].equal(c[name]) for name in a)


def test_shards_and_layers_that_draft_tokens(dense, tmp_path):
    """As DeepSeek-V3 is released: several files, and behind the last layer one that drafts."""
    weights = load_file(dense / "model.safetensors")
    drafts = {"model.layers.3.eh_proj.weight": torch.zeros(64, 128), "model.layers.3.norm.weight": torch.zeros(64)}
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, dense / "model-1.safetensors")
    rest = {name: weights[name] for name in names[1::2]}
    save_file(rest | {"model.layers.3.norm.weight": torch.zeros(64)}, dense / "model-2.safetensors")
    save_file({"model.layers.3.eh_proj.weight": torch.zeros(64, 128)}, dense / "model-3.safetensors")
    where = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    where |= dict(zip(drafts, ["model-3.safetensors", "model-2.safetensors"], strict=True))
    (dense / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (dense / "model.safetensors").unlink()
    config = json.loads((dense / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (dense / "config.json").write_text(json.dumps(config))

    done = convert(dense, tmp_path / "sparse", SMALL)
    assert done.left_out == ("2 weights of layers that draft further tokens",)
    assert not (tmp_path / "sparse" / "model-3.safetensors").exists()
    loaded, found = DeepseekV32ForCausalLM.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(loaded.state_dict()[name].equal(weights[name]) for name in weights if ".experts." not in name)


def test_bf16_stays_bf16(tmp_path):
    save_tiny(tmp_path / "fp32", "DeepseekV3ForCausalLM")
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "sparse", SMALL)
    assert {weight.dtype for weight in load_file(tmp_path / "sparse" / INDEXER_FILE).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["dtype"] == "bfloat16"


def test_deepseek_v2_without_experts(tmp_path):
    before = save_tiny(tmp_path / "dense", "DeepseekV2ForCausalLM", first_k_dense_replace=3)
    convert(tmp_path / "dense", tmp_path / "sparse", WIDE)
    after = DeepseekV32ForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(after(IDS).logits, before(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "overrides", "options", "message"),
    [
        ("LlamaForCausalLM", {}, [], "has no latent attention (MLA)"),
        ("DeepseekV32ForCausalLM", {}, [], "has an indexer already"),
        ("GlmMoeDsaForCausalLM", {}, [], "has an indexer already"),
        ("DeepseekV2ForCausalLM", {}, [], "weigh experts by a softmax"),
        ("DeepseekV3ForCausalLM", {"q_lora_rank": None}, [], "q_lora_rank is null"),
        ("DeepseekV3ForCausalLM", {}, ["--index-topk", "512"], "index_topk is 512, but the model has 512 positions"),
        (
            "DeepseekV3ForCausalLM",
            {"qk_rope_head_dim": 32},
            ["--index-topk", "16", "--index-head-dim", "16"],
            "index_head_dim is 16, below the 32 rotary dimensions",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_sentence(name, overrides, options, message, tmp_path, capsys):
    save_tiny(tmp_path / "dense", name, **overrides)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "dense"), str(tmp_path / "sparse"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "sparse").exists()


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(dense, tmp_path, capsys):
    small = ["--index-topk", "16", "--index-n-heads", "4", "--index-head-dim", "16"]
    assert main(["convert", str(dense), str(tmp_path / "sparse"), *small]) == 0
    assert "added" in capsys.readouterr().out
    assert main(["convert", str(dense), str(tmp_path / "sparse"), *small]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "other"), *small]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


def test_a_disk_without_room_is_refused_before_anything_is_written(dense, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this process may mount no tmpfs")
    try:
        with pytest.raises(ValueError, match="has room for"):
            convert(dense, disk / "sparse", SMALL)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("changes", [{"index_head_dim": 48}, {"index_head_dim": 8}, {"index_topk": 0}])
def test_an_impossible_indexer(changes):
    with pytest.raises(ValueError, match="must be"):
        Indexer(**changes)


def test_help_names_the_options():
    code = "import sys; from trimtab.grpo.commands.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "convert", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--index-topk" in done.stdout
