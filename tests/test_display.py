"""What a person sees of a run, and the advice that comes with it."""

import io

import pytest
from rich.console import Console

from trimtab.grpo.config import Config, Domain, Rollout
from trimtab.grpo.cost.advice import advice
from trimtab.grpo.cost.clock import metrics as clock_metrics
from trimtab.grpo.results.display import LiveTable

GPU = {"memory/trainer_gib": 20.0, "memory/engine_gib": 30.0, "memory/gpu_gib": 79.1}
STEP = {
    "step": 4,
    "reward/reasoning": 0.51,
    "reward/agent": 0.25,
    "reward/alignment": 1.0,
    "kl": 0.012,
    "mismatch_kl": 3e-4,
    "masked": 0.05,
    "kept_mean": 12.3,
    "kept_singletons": 0.61,
    "route_coverage": 1.0,
    "tokens_per_s/rollout": 123456.0,
    "tokens_per_s/train": 98765.0,
    "mfu": 0.34,
    "seconds": 10.0,
    "routes/bytes": 3 * 2**20,
    "routes/seconds": 0.012,
    "masks/bytes": 2**19,
    **GPU,
}


def settings(**changes) -> Config:
    domains = {name: Domain(task="any:Task") for name in ("reasoning", "agent", "alignment")}
    return Config(domains=domains, **changes)


def of_ten_seconds(**phases: float) -> dict[str, float]:
    return STEP | {f"seconds/{name}": value for name, value in phases.items()}


def shown(metrics: dict, *, terminal: bool, times: int = 1) -> str:
    console = Console(width=120, file=io.StringIO(), force_terminal=terminal, color_system=None)
    with LiveTable(settings(), console) as table:
        for _ in range(times):
            table.show(metrics)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_shows_its_figures_phases_memory_and_records(terminal):
    text = shown(of_ten_seconds(rollout=5.0, forward_and_backward=3.25, weights=0.5), terminal=terminal)
    for words in (
        "0.51",
        "123456",
        "98765",
        "34%",
        "rollout 5.0 s, forward and backward 3.2 s, weights 0.5 s",
        "trainer 20.0 GiB, engine 30.0 GiB",
        "routes 3.0 MiB in 12 ms, masks 0.5 MiB",
    ):
        assert words in text


def test_the_table_is_read_on_120_columns_without_a_folded_figure():
    lines = shown(of_ten_seconds(rollout=5.0), terminal=True).splitlines()
    row = next(line for line in lines if "123456" in line)
    assert len(row.rstrip()) <= 120
    assert " ".join(row.split()) == "5 0.51 0.25 1.00 0.012 3e-04 5.0% 12.30 61% 100% 123456 98765 34% 10.0"


def test_what_a_step_lacks_is_a_dash_and_short_phases_are_left_out():
    text = shown({"step": 0, "seconds": 1.0, "seconds/rollout": 1.0, "seconds/saving": 0.001}, terminal=False)
    assert "MFU -" in text and "rollout 1.0 s" in text and "saving" not in text and "GiB" not in text


def test_the_same_advice_is_printed_once():
    assert shown(of_ten_seconds(weights=4.0), terminal=False, times=3).count("advice: weights: 40%") == 1


def test_seconds_have_the_names_of_their_phases():
    assert clock_metrics({"forward and backward": 2.0}) == {"seconds/forward_and_backward": 2.0}


ASLEEP = {"rollout": Rollout(sleep=True)}
ADVISED = {
    "weights": (of_ten_seconds(weights=3.1), {}, "weights: 31% of the batch: sample more"),
    "weights, few": (of_ten_seconds(weights=2.9), {}, None),
    "saving": (of_ten_seconds(saving=5.0), {}, "--save-every above 10"),
    "rewards": (of_ten_seconds(rewards=4.0), {}, "no engine samples"),
    "reference": (of_ten_seconds(reference=4.0), {}, "beta 0 in every domain"),
    "reference, offloaded": (of_ten_seconds(reference=4.0), {"offload": "all"}, "--offload none"),
    "optimiser": (of_ten_seconds(optimiser=4.0), {}, "fewer minibatches than 4"),
    "optimiser, offloaded": (of_ten_seconds(optimiser=4.0), {"offload": "optimizer"}, "--offload none"),
    "sleeps for nothing": (of_ten_seconds(wake_and_sleep=1.0), ASLEEP, "(20.0 and 30.0 GiB of 79.1): --rollout.sleep"),
    "sleeps for a reason": (of_ten_seconds(wake_and_sleep=1.0) | {"memory/trainer_gib": 45.0}, ASLEEP, None),
    "sleeps for little": (of_ten_seconds(wake_and_sleep=0.4), ASLEEP, None),
    "small packs": (
        of_ten_seconds(forward_and_backward=5.0) | {"mfu": 0.1},
        {},
        "at an MFU of 10% in packs of 8192: --tokens-per-microbatch 16384",
    ),
    "recomputed for nothing": (
        of_ten_seconds(forward_and_backward=5.0) | {"mfu": 0.1},
        {"checkpoint_activations": True},
        "leave --checkpoint-activations out",
    ),
    "small packs, no room": (
        of_ten_seconds(forward_and_backward=5.0) | {"mfu": 0.1, "memory/trainer_gib": 60.0},
        {},
        None,
    ),
    "good MFU": (of_ten_seconds(forward_and_backward=5.0), {}, None),
    "one long answer": (
        of_ten_seconds(rollout=7.0) | {"longest_answer": 2000, "sampled_tokens": 30_000, "episodes": 100},
        {},
        "longest answer has 2000 tokens, the mean 300",
    ),
    "idle engine": (
        of_ten_seconds(rollout=7.0) | {"longest_answer": 500, "sampled_tokens": 30_000, "episodes": 100},
        {},
        "with 100 of 256 sequences decoding",
    ),
    "busy engine": (
        of_ten_seconds(rollout=7.0) | {"longest_answer": 500, "sampled_tokens": 60_000, "episodes": 200},
        {},
        None,
    ),
    "nothing known": ({"step": 0}, {}, None),
}


@pytest.mark.parametrize("name", ADVISED)
def test_advice_where_one_phase_has_more_than_its_share(name):
    metrics, changes, words = ADVISED[name]
    line = advice(metrics, settings(**changes))
    assert line is None if words is None else line is not None and words in line
