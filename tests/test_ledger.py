"""The ledger of the GPU's memory: bytes by hand, saved tensors as torch counts them, and what is decided from them."""

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from test_shape import MODELS

from trimtab.grpo.config import Config, Domain, Lora, LossSettings, Rollout
from trimtab.grpo.cost.ledger import (
    BUSY,
    GIB,
    MIB,
    RESERVE,
    Beside,
    activations,
    adapter_parameters,
    check_table,
    choose,
    count,
    saved,
)
from trimtab.grpo.cost.shape import Shape, shape_of
from trimtab.grpo.policy.policy import Policy

H100 = int(79.1 * GIB)


def dense(architecture: str, hidden: int, width: int, layers: int, heads: int, kv_heads: int, tied: bool) -> Shape:
    return shape_of(
        {
            "architectures": [architecture],
            "vocab_size": 151936,
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "tie_word_embeddings": tied,
        }
    )


QWEN = {
    "0.6B": dense("Qwen3ForCausalLM", 1024, 3072, 28, 16, 8, True),
    "1.7B": dense("Qwen3ForCausalLM", 2048, 6144, 28, 16, 8, True),
    "3B": dense("Qwen2ForCausalLM", 2048, 11008, 36, 16, 2, True),
    "8B": dense("Qwen3ForCausalLM", 4096, 12288, 36, 32, 8, False),
}
ADAPTED = {"lora": Lora(rank=16)}
RECOMPUTED = {"checkpoint_activations": True}


def settings(*, beta: float = 0.001, rollout: Rollout | None = None, **changes) -> Config:
    domain = Domain(task="any:Task", prompts=32, loss=LossSettings(beta=beta))
    return Config(
        domains={"any": domain}, precision="bf16", rollout=rollout or Rollout(max_len=4096, graphs=True), **changes
    )


def sizes(config: Config, shape: Shape, cache: int = 0) -> dict[str, int]:
    return {f"{item.owner} {item.name}": item.size for item in count(config, shape, cache).items}


def test_what_is_exact_by_hand():
    """Qwen3-0.6B has 596,049,920 parameters; a token's cache is 28 layers of 2 * 8 * 128 values of 2 bytes."""
    shape = QWEN["0.6B"]
    assert shape.parameters == 596_049_920
    size = sizes(settings(), shape, cache=1000)
    assert size["trainer masters in fp32"] == size["trainer gradients"] == 4 * 596_049_920
    assert size["trainer Adam's moments"] == 8 * 596_049_920
    assert size["trainer reference"] == size["engine weights"] == 2 * 596_049_920
    assert size["engine key-value cache"] == 1000
    plan = choose(settings(), shape, H100)
    assert plan.windows == plan.kv_cache_mib * MIB // (4096 * 28 * 2 * 8 * 128 * 2)


def test_fp32_computes_in_the_masters():
    bf16, fp32 = (sizes(settings(), QWEN["0.6B"]), sizes(replace(settings(), precision="fp32"), QWEN["0.6B"]))
    assert fp32["engine weights"] == 2 * bf16["engine weights"]
    assert "trainer layers gathered to compute" not in fp32


def test_without_a_kl_there_is_no_reference():
    assert not [name for name in sizes(settings(beta=0.0), QWEN["0.6B"]) if "reference" in name]


def test_adapters_by_hand():
    """Of a layer of Qwen3-0.6B, in + out: q 1024 + 2048, k and v 1024 + 1024, o 2048 + 1024, the MLP 3 * (1024 + 3072).
    The weights are their own reference and have neither gradients nor moments."""
    config = settings(lora=Lora(rank=16, targets=("q_proj", "down_proj")))
    assert adapter_parameters(config, QWEN["0.6B"]) == 16 * 28 * (3072 + 4096)
    config = settings(**ADAPTED)
    assert adapter_parameters(config, QWEN["0.6B"]) == 16 * 28 * (3072 + 2 * 2048 + 3072 + 3 * 4096)
    size = sizes(config, QWEN["0.6B"])
    assert size["trainer frozen weights"] == 2 * 596_049_920
    assert size["trainer gradients"] == 4 * adapter_parameters(config, QWEN["0.6B"])
    assert "trainer reference" not in size


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3-moe", "deepseek-v3.2"])
def test_activations_are_the_tensors_that_torch_saves(name):
    """Of a real pass in fp32; the embedding's and the last norm's tensors, which are no layer's, are the difference."""
    model_class, model_config = MODELS[name]
    policy = Policy(model_class(model_config))
    parameters = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive: an address is then never used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(torch.arange(32), torch.tensor([0, 32]), with_indexer_kl=policy.sparse)
    measured = sum(storage.nbytes() for address, storage in storages.items() if address not in parameters)
    shape = shape_of(json.loads(model_config.to_json_string()) | {"architectures": [model_class.__name__]})
    config = replace(settings(rollout=Rollout(max_len=32)), precision="fp32")
    assert 32 * sum(saved(config, layer) for layer in shape.layers) == pytest.approx(measured, rel=0.07)


def test_with_checkpoints_layers_keep_their_inputs_and_one_of_them_the_rest():
    shape = QWEN["0.6B"]
    config = settings(tokens_per_microbatch=10_000)
    layer = saved(config, shape.layers[0])
    assert activations(config, shape) == 10_000 * 29 * layer
    assert activations(replace(config, **RECOMPUTED), shape) == 10_000 * (28 * 1024 * 2 + 2 * layer)


def test_a_sequence_beyond_the_token_budget_is_a_pack_of_its_own():
    short, long = (settings(rollout=Rollout(max_len=n), tokens_per_microbatch=1024) for n in (1024, 4096))
    assert activations(long, QWEN["0.6B"]) == 4 * activations(short, QWEN["0.6B"])


def test_offload_takes_away_what_a_moment_does_not_need():
    """Parameters are P: the reference 2 P, moments 8 P, masters 4 P."""
    shape, P = QWEN["0.6B"], QWEN["0.6B"].parameters
    none, reference, optimizer, everything = (
        count(settings(offload=offload), shape, 0) for offload in ("none", "reference", "optimizer", "all")
    )
    for moment, less in (("reference", 0), ("backward", 2 * P), ("step", 2 * P), ("sampling", 2 * P)):
        assert none.at(moment, sleep=True) - reference.at(moment, sleep=True) == less
    for moment, less in (("reference", 8 * P), ("backward", 8 * P), ("step", 0), ("sampling", 8 * P)):
        assert none.at(moment, sleep=True) - optimizer.at(moment, sleep=True) == less
    assert none.at("sampling", sleep=True) - everything.at("sampling", sleep=True) == 14 * P


def test_heads_of_references_that_rest_stay_for_the_full_kl():
    """151,936 rows of 1024 values of 2 bytes, of two references."""
    domains = {name: replace(settings().domains["any"], teacher=name) for name in ("", "t")}
    for kl, offload, heads in (("full", "reference", 2), ("full", "none", 0), ("unbiased", "all", 0)):
        size = sizes(replace(settings(kl=kl, offload=offload), domains=domains), QWEN["0.6B"])
        assert size.get("trainer heads of resting references", 0) == heads * 151_936 * 1024 * 2


def test_replayed_selections_by_hand():
    """Three layers of 8 keys: 2 bytes each of 8192 tokens in the trainer, 4 of 4096 in each of two engines."""
    config = MODELS["deepseek-v3.2"][1].to_dict() | {"architectures": ["DeepseekV32ForCausalLM"]}
    shape, keys = shape_of(json.loads(json.dumps(config))), 3 * 8
    size = sizes(settings(keep_selection=True, rollout=Rollout(max_len=4096, graphs=True, actors=2)), shape)
    assert size["trainer replayed selections"] == 8192 * 2 * keys
    assert size["engine selections of a step"] == 2 * 4096 * 4 * keys


def test_tables_of_selections_that_do_not_fit_the_host_are_refused_with_the_cache_that_would():
    """A token's row has 2 bytes for each of 3 * 8 keys and 3 * 2 experts."""
    config = MODELS["deepseek-v3.2"][1].to_dict() | {"architectures": ["DeepseekV32ForCausalLM"]}
    shape = shape_of(json.loads(json.dumps(config)))
    run = settings(keep_selection=True, rollout=Rollout(max_len=4096, actors=2, kv_cache_mib=100))
    tables = 2 * (100 * MIB // (shape.cached * 2)) * 60
    check_table(run, shape, tables)
    with pytest.raises(ValueError, match=r"60 bytes for each token .* --rollout.kv-cache-mib (\d+) ") as refusal:
        check_table(run, shape, tables // 2)
    less = int(re.search(r"mib (\d+)", str(refusal.value))[1])
    check_table(replace(run, rollout=replace(run.rollout, kv_cache_mib=less)), shape, tables // 2)


def test_asleep_an_engine_has_neither_weights_nor_cache():
    ledger = count(settings(), QWEN["0.6B"], 5 * GIB)
    for moment in BUSY:
        assert ledger.at(moment, sleep=False) - ledger.at(moment, sleep=True) == 5 * GIB + 2 * 596_049_920
    assert ledger.at("sampling", sleep=False) == ledger.at("sampling", sleep=True)


@pytest.mark.parametrize(
    ("size", "changes", "sleep"),
    [
        ("0.6B", {}, False),
        ("1.7B", {}, True),
        ("1.7B", RECOMPUTED, False),
        ("3B", RECOMPUTED, True),
        ("8B", ADAPTED | RECOMPUTED, True),
    ],
)
def test_what_fits_on_one_gpu_of_80_gb(size, changes, sleep):
    config = settings(**changes)
    plan = choose(config, QWEN[size], H100)
    assert plan.sleep == sleep
    assert plan.windows >= 32
    assert plan.ledger.peak(sleep=sleep)[0] <= H100 * (1 - RESERVE)


@pytest.mark.parametrize(
    ("size", "changes", "remedy"),
    [
        ("3B", {}, "--checkpoint-activations"),
        ("8B", {}, "--lora.rank 16 --checkpoint-activations"),
        ("8B", ADAPTED, "--checkpoint-activations"),
        ("8B", ADAPTED | RECOMPUTED | {"tokens_per_microbatch": 131072}, "--tokens-per-microbatch 65536"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would_make_it_fit(size, changes, remedy):
    with pytest.raises(ValueError, match=f"this GPU has 79.1; with {remedy} it needs") as refusal:
        choose(settings(**changes), QWEN[size], H100)
    needed, has, then = map(float, re.findall(r"\d+\.\d", str(refusal.value)))
    assert needed > has * (1 - RESERVE) > then * (1 - RESERVE)
    assert "\n" not in str(refusal.value)


def test_a_remedy_may_have_several_parts():
    """1.7 B parameters want 16 bytes each, 25.6 GiB, and the reference 3.2: on 36 GiB not all of it may stay."""
    with pytest.raises(ValueError, match=r"36\.0; with --offload reference --checkpoint-activations it needs 35\.6"):
        choose(settings(), QWEN["1.7B"], 36 * GIB)


def test_what_nothing_makes_fit_names_the_gpu_it_takes():
    with pytest.raises(ValueError, match=r"take a GPU of \d+ GiB or a smaller model"):
        choose(settings(), QWEN["8B"], 12 * GIB)


def test_what_a_recipe_sets_stays():
    rollout = Rollout(max_len=4096, kv_cache_mib=3000, sleep=True)
    plan = choose(settings(rollout=rollout), QWEN["0.6B"], H100)
    assert (plan.sleep, plan.kv_cache_mib) == (True, 3000)
    awake = replace(rollout, sleep=False, kv_cache_mib=40_000)
    with pytest.raises(ValueError, match=r"with rollout\.sleep and .* left out it needs"):
        choose(settings(rollout=awake), QWEN["1.7B"], H100)


def test_a_cache_is_never_larger_than_what_its_sequences_can_use():
    """Eight episodes at a time, 4 * 8 of 32 windows: the batch has 256 episodes, the engine decodes 8."""
    plan = choose(settings(rollout=Rollout(max_len=4096, max_num_seqs=8)), QWEN["0.6B"], H100)
    assert plan.windows == 8 and not plan.sleep


def test_a_judge_in_an_engine_of_its_own_takes_its_room():
    """Its cache is as large as the policy's and stays while the policy trains."""
    rollout = Rollout(max_len=4096, graphs=True, sleep=False)
    alone, judged = (
        choose(settings(rollout=rollout), QWEN["0.6B"], H100, beside=Beside(judge=judge))
        for judge in (None, QWEN["0.6B"])
    )
    assert judged.kv_cache_mib < alone.kv_cache_mib / 2
    asleep = choose(
        settings(rollout=replace(rollout, sleep=True)), QWEN["0.6B"], H100, beside=Beside(judge=QWEN["0.6B"])
    )
    assert alone.kv_cache_mib > asleep.kv_cache_mib > judged.kv_cache_mib


def test_on_a_cpu_engines_stay_awake_and_nothing_is_refused():
    plan = choose(replace(settings(), precision="fp32"), QWEN["8B"], None)
    assert not plan.sleep and plan.windows == 1


def test_the_table_shows_every_item_and_the_three_ways_to_share():
    config = settings()
    plan = choose(config, QWEN["1.7B"], H100)
    console = Console(width=100, file=io.StringIO())
    console.print(plan.ledger.table(plan, H100))
    text = console.file.getvalue()
    for words in (*(item.name for item in plan.ledger.items), *plan.ledger.totals, "79.1 GiB", "engine sleeps"):
        assert words in text
