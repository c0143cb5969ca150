"""What a batch cost, from the phases of a clock."""

import pytest

from trimtab.grpo.config import Config, Domain
from trimtab.grpo.cost.advice import advice
from trimtab.grpo.cost.clock import Clock
from trimtab.grpo.cost.flops import Work
from trimtab.grpo.cost.meter import Meter
from trimtab.grpo.cost.shape import shape_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_a_checkpoint_counts_to_the_batch_behind_it_and_is_advised_about():
    config = Config(domains={"any": Domain(task="x:y")}, save_every=2)
    seconds = [0.0]
    clock = Clock(now=lambda: seconds[0])
    meter, nothing = Meter(shape_of(LLAMA), clock), Work(lengths=[], sampled=0)
    for phase, lasts in (("rollout", 5.0), ("saving", 100.0)):
        with clock.phase(phase):
            seconds[0] += lasts
    meter.start()
    first = meter.metrics(nothing, sampled_tokens=1)
    assert "seconds/rollout" not in first and first["seconds/saving"] == 100.0
    assert first["seconds"] == pytest.approx(100.0, abs=1.0), "nothing took time since, but for this test"
    assert "--save-every above 2" in advice(first, config)
    meter.start()
    assert "seconds/saving" not in meter.metrics(nothing, sampled_tokens=1)
