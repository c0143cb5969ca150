"""On-policy distillation: the KL of each domain to its own teacher, over all tokens, on what the student sampled."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from test_faults_mathematics import ONE, group
from test_trainer import BATCH, weights
from tiny import save_tiny_deepseek, tiny_deepseek, tiny_tokenizer

from trimtab.grpo.batch import pack, trajectories
from trimtab.grpo.config import Domain, LossSettings
from trimtab.grpo.cost.ledger import Beside, count
from trimtab.grpo.cost.shape import shape_of
from trimtab.grpo.policy.policy import Policy
from trimtab.grpo.setup.prepare import check_selects, check_vocabulary
from trimtab.grpo.trainer import Trainer

TEACHERS = {"a": ("first", 0.5), "b": ("second", 2.0), "c": ("", 0.25)}


def policy(seed: int) -> Policy:
    return Policy(tiny_deepseek(seed, initializer_range=0.1))


def student(offload: str = "none") -> Trainer:
    domains = {
        name: Domain(task="x:y", teacher=teacher, loss=LossSettings(beta=beta, surrogate=False))
        for name, (teacher, beta) in TEACHERS.items()
    }
    config = replace(ONE, kl="full", domains=domains, offload=offload, tokens_per_microbatch=300)
    teachers = {"first": policy(1), "second": policy(2)}
    trainer = Trainer(config, policy(0), policy(3), Accelerator(cpu=True), teachers=teachers)
    trainer.optimizers = [torch.optim.SGD(trainer.learning, lr=1e-3)]
    return trainer


BY_DOMAIN = [
    replace(one, domain="abc"[i % 3], advantage=0.0, settings=LossSettings(beta=TEACHERS["abc"[i % 3]][1]))
    for i, one in enumerate(BATCH[:6])
]


def test_each_domain_is_drawn_to_its_own_teacher_by_the_exact_kl():
    trainer = student()
    before = weights(trainer)
    ours, references = policy(0), {"first": policy(1), "second": policy(2), "": policy(3)}
    total = torch.zeros(())
    for one in BY_DOMAIN:
        (packed,) = pack([one], 10**6)
        teacher, beta = TEACHERS[one.domain]

        def logp(model: Policy, routes, packed=packed) -> torch.Tensor:
            hidden = model(packed.ids_N, packed.cu_seqlens, lengths=packed.lengths, routes_NLK=routes).hidden_ND
            return (hidden[packed.predict_S] @ model.head_weight.T).log_softmax(-1)

        own_SV, theirs_SV = logp(ours, packed.routes_NLK), logp(references[teacher], None).detach()
        total = total + beta * (own_SV.exp() * (own_SV - theirs_SV)).sum(-1).mean() / len(BY_DOMAIN)
    total.backward()
    trainer.train_on(BY_DOMAIN, 5)
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    expected = {name: weight.grad for name, weight in ours.model.named_parameters() if weight.grad is not None}
    assert len(expected) > 20
    for name, weight in weights(trainer).items():
        if name in expected:
            torch.testing.assert_close(weight - before[name], -lr * expected[name], rtol=5e-3, atol=3e-7)


def test_teachers_that_rest_in_host_memory_teach_the_same():
    plain, resting = student(), student("reference")
    assert len(resting._shelves) == 3
    plain.train_on(BY_DOMAIN, 5)
    resting.train_on(BY_DOMAIN, 5)
    theirs = weights(plain)
    assert all((weight == theirs[name]).all() for name, weight in weights(resting).items())


def test_without_a_surrogate_rewards_train_nothing_but_the_kl_stays():
    settings = {"any": LossSettings(beta=1.0, surrogate=False)}
    batch = trajectories([group(0.0, 1.0, 1.0)], settings)
    assert len(batch) == 3 and all(one.advantage == 0.0 and one.has_gradient for one in batch)
    with pytest.raises(ValueError, match="surrogate is false and beta is 0: nothing would train"):
        LossSettings(beta=0.0, surrogate=False)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    save_tiny_deepseek(tmp_path / "student")
    save_tiny_deepseek(tmp_path / "twin", seed=1)
    check_vocabulary(str(tmp_path / "twin"), str(tmp_path / "student"))
    save_tiny_deepseek(tmp_path / "padded", vocab_size=512)
    with pytest.raises(ValueError, match=r"has 512 ids and .* has 384: pad them"):
        check_vocabulary(str(tmp_path / "padded"), str(tmp_path / "student"))
    tiny_tokenizer(vocab_size=370).save_pretrained(tmp_path / "twin")
    with pytest.raises(ValueError, match=r"has another vocabulary than .* \(\d+ and 384 tokens; they differ at id \d+"):
        check_vocabulary(str(tmp_path / "twin"), str(tmp_path / "student"))
    with pytest.raises(ValueError, match="needs a model to start from"):
        check_vocabulary(str(tmp_path / "twin"), "")


def test_teachers_count_in_the_ledger():
    trainer = student()
    config = replace(trainer.config, precision="bf16", rollout=replace(trainer.config.rollout, max_len=128))
    shape = shape_of(tiny_deepseek().config.to_dict() | {"architectures": ["DeepseekV32ForCausalLM"]})
    beside = Beside(teachers=(shape, shape))
    (item,) = [one for one in count(config, shape, 0, beside=beside).items if one.name == "3 references"]
    assert item.size == 3 * 2 * shape.parameters
    resting = count(replace(config, offload="reference"), shape, 0, beside=beside)
    (item,) = [one for one in resting.items if one.name == "reference"]
    assert item.size == 2 * shape.parameters and item.moments == ("reference",)


def test_a_selection_to_keep_needs_an_indexer_and_positions_of_16_bits():
    check_selects({"index_topk": 16}, 65536)
    with pytest.raises(ValueError, match="a LlamaForCausalLM has none: leave it out"):
        check_selects({"architectures": ["LlamaForCausalLM"]}, 512)
    with pytest.raises(ValueError, match=r"rollout\.max_len is at most 65536"):
        check_selects({"index_topk": 16}, 65537)
