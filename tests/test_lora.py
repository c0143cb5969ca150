"""Adapters by peft: what they adapt, what engines and checkpoints get of them."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import PeftModel
from test_trainer import BATCH, CONFIG, weights
from tiny import tiny_model
from torch import Tensor

from trimtab.grpo.batch import Trajectory
from trimtab.grpo.config import Config, Lora
from trimtab.grpo.policy.families import ARCHITECTURES
from trimtab.grpo.policy.lora import adapt, adapters, check_targets, load_adapter, resolve
from trimtab.grpo.policy.policy import Policy, load_policy
from trimtab.grpo.runs.folder import RunFolder
from trimtab.grpo.runs.saving import Saving
from trimtab.grpo.trainer import Trainer

LORA = {"rank": 4, "alpha": 8.0, "targets": ("all-linear",)}
DENSE: list[Trajectory] = [
    replace(t, segments=tuple(replace(s, routes=np.zeros((len(s.routes), 0, 0), np.uint8)) for s in t.segments))
    for t in BATCH
]


@pytest.fixture(scope="module", autouse=True)
def processes_of_this_file() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def base(name: str = "Qwen2ForCausalLM") -> Policy:
    return Policy(tiny_model(name, initializer_range=0.1))


def logp(policy: Policy) -> Tensor:
    torch.manual_seed(1)
    ids_N = torch.randint(0, 384, (30,))
    with torch.no_grad():
        hidden_ND = policy(ids_N, torch.tensor([0, 30])).hidden_ND
    return (hidden_ND @ policy.head_weight.T).float().log_softmax(-1)


def start(config: Config) -> Trainer:
    return Trainer(config, adapt(base(), **LORA), None, Accelerator(cpu=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapted_policy_starts_as_its_base_and_learns_in_its_adapters_alone(name):
    policy = adapt(base(name), **LORA)
    assert torch.equal(logp(policy), logp(base(name)))
    learning = {key for key, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert learning and all(".lora_" in key for key in learning)
    adapted = {key.split(".")[-4] for key in learning}
    assert "o_proj" in adapted and ("down_proj" in adapted) == (not policy.moe_layers)
    assert not adapted & {"kv_b_proj", "weights_proj", "wq_b", "wk", "gate", "lm_head"}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("nonsense",), r"names 'nonsense', and no linear layer is called that; take from \['kv_a_proj_with_mqa', "),
        (("experts",), "names 'experts', and no linear layer"),
        (("up_proj",), r"up_proj, which takes no adapter \(in a policy with experts, peft means the experts by it\)"),
        (("lm_head",), "names 'lm_head', and no linear layer"),
        (("o_proj", "kv_b_proj"), r"kv_b_proj, which takes no adapter \(attention reads its weight in absorbed form\)"),
        ((), "lora.targets is empty"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_with_those_that_can(targets, message):
    with pytest.raises(ValueError, match=message):
        resolve(base("DeepseekV32ForCausalLM"), targets)
    config = base("DeepseekV32ForCausalLM").config.to_dict() | {"architectures": ["DeepseekV32ForCausalLM"]}
    with pytest.raises(ValueError, match=message):
        check_targets(config, targets)


def test_a_rank_below_1_is_refused():
    with pytest.raises(ValueError, match=r"lora\.rank must be at least 1, got 0"):
        adapt(base(), rank=0, alpha=1.0, targets=("q_proj",))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engines_get_merged_weights_under_the_names_of_the_base(precision):
    trainer = start(replace(CONFIG, precision=precision))
    trainer.train_on(DENSE, step=0)
    names = {name for name, _ in base().model.named_parameters()}
    merged = weights(trainer)
    assert merged.keys() == names
    plain = base()
    plain.model.load_state_dict({name: weight.float() for name, weight in merged.items()}, strict=False)
    segment = DENSE[1].segments[0]
    other = Trainer(replace(CONFIG, precision="fp32"), plain, None, Accelerator(cpu=True))
    tolerance = {"fp32": 1e-5, "bf16": 0.1}[precision]
    torch.testing.assert_close(trainer.score(segment), other.score(segment), rtol=0, atol=tolerance)
    start_of_run = {name: weight.detach() for name, weight in base().model.named_parameters()}
    moved = {
        name
        for name in names
        if not torch.equal(merged[name].float(), start_of_run[name].to(merged[name].dtype).float())
    }
    assert moved and all(name.endswith("_proj.weight") for name in moved)


def test_frozen_weights_rest_in_bf16_and_adapters_learn_in_fp32():
    trainer = start(replace(CONFIG, precision="bf16"))
    trainer.train_on(DENSE, step=0)
    kinds = {".lora_" in name: parameter.dtype for name, parameter in trainer.policy.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert {state["exp_avg"].dtype for state in trainer.optimizers[0].state.values()} == {torch.float32}


def test_the_reference_of_adapters_is_their_base_without_a_copy_of_it():
    config = replace(CONFIG, precision="fp32", minibatches=1)
    ours = start(config)
    theirs = Trainer(config, adapt(base(), **LORA), base(), Accelerator(cpu=True))
    theirs_reference = Trainer(config, base(), base(), Accelerator(cpu=True))
    for step in (0, 1):
        found = ours.train_on(DENSE, step)
        assert theirs.train_on(DENSE, step)["kl"] == found["kl"]
    assert found["kl"] > 0
    refs = ours._references([ours._packs(DENSE)])
    expected = theirs_reference._references([theirs_reference._packs(DENSE)])
    assert torch.equal(refs[0][0], expected[0][0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_holds_the_adapter_which_peft_loads_on_the_base(precision, tmp_path):
    trainer = start(replace(CONFIG, precision=precision))
    trainer.train_on(DENSE, step=0)
    trainer.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(ValueError, match="an adapter alone"):
        load_policy(tmp_path)
    ids = torch.randint(0, 384, (1, 30), generator=torch.Generator().manual_seed(2))
    model = PeftModel.from_pretrained(tiny_model("Qwen2ForCausalLM", initializer_range=0.1), tmp_path)
    trainer.save_merged(tmp_path / "merged")
    whole = load_policy(tmp_path / "merged").model
    with torch.no_grad():
        theirs = model(ids).logits.log_softmax(-1)
        hidden_ND = Policy(whole)(ids[0], torch.tensor([0, 30])).hidden_ND
    tolerance = {"fp32": 1e-5, "bf16": 0.1}[precision]
    torch.testing.assert_close((hidden_ND @ whole.lm_head.weight.T).log_softmax(-1), theirs[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("merge", [False, True])
def test_a_checkpoint_holds_the_merged_model_with_its_tokenizer_where_asked(merge, tmp_path):
    tokenizer = tmp_path / "base"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    trainer = start(replace(CONFIG, model=str(tokenizer), lora=Lora(rank=4, merge=merge)))
    folder = RunFolder(tmp_path)
    saving = Saving(folder, trainer, 0, model=tokenizer, merge=merge)
    saving.trained(3)
    assert saving.save()
    checkpoint = folder.checkpoints.latest()
    assert (checkpoint / "adapter_model.safetensors").is_file() and (checkpoint / "tokenizer.json").is_file()
    assert (checkpoint / "merged").exists() == merge
    if merge:
        assert load_policy(checkpoint / "merged") and (checkpoint / "merged" / "tokenizer.json").is_file()


def test_adapters_that_resume_go_on_as_if_they_had_not_stopped(tmp_path):
    config = replace(CONFIG, precision="bf16")
    straight, stopped = start(config), start(config)
    for step in (0, 1):
        straight.train_on(DENSE, step)
    stopped.train_on(DENSE, 0)
    stopped.save(tmp_path)
    policy = adapt(base(), **LORA, seed=9)
    load_adapter(policy, tmp_path)
    resumed = Trainer(config, policy, None, Accelerator(cpu=True))
    resumed.load_optimizer(tmp_path)
    resumed.train_on(DENSE, 1)
    expected, found = weights(straight), weights(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_of_another_rank_or_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter"):
        load_adapter(adapt(base(), **LORA), tmp_path)
    start(CONFIG).save(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit lora.rank and lora.targets: it differs at model.layers.0"):
        load_adapter(adapt(base(), **LORA | {"rank": 2}), tmp_path)


def test_adapting_freezes_a_copy_and_leaves_the_random_numbers_as_they_were():
    policy = base()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert len(adapters(adapt(copy.deepcopy(policy), **LORA))) > 0 and torch.equal(torch.rand(3), expected)
    assert not adapters(policy)
