from dataclasses import replace

import pytest

from trimtab.grpo.config import Config, Domain, Rollout
from trimtab.grpo.recipes import quickstart
from trimtab.grpo.setup.resolve import LONGEST_WINDOW, resolve
from trimtab.rollout.types import Sampling

OPEN = Config(domains={"a": Domain(task="x:y")})


@pytest.mark.parametrize(("positions", "window"), [(2048, 2048), (131072, LONGEST_WINDOW), (None, LONGEST_WINDOW)])
def test_the_window_comes_from_the_models_positions(positions, window):
    assert resolve(OPEN, {"max_position_embeddings": positions}, gpu=False).rollout.max_len == window


def test_a_window_beyond_the_models_positions_is_refused():
    with pytest.raises(ValueError, match="max_len is 4096, but the model has 2048 positions"):
        resolve(replace(OPEN, rollout=Rollout(max_len=4096)), {"max_position_embeddings": 2048}, gpu=False)


@pytest.mark.parametrize(
    ("domain", "sampling", "soft", "hard"),
    [
        (Domain(task="x:y"), Sampling(), 1536, 2048),  # the window is all that limits a turn
        (Domain(task="x:y"), Sampling(max_tokens=100), 75, 100),
        (Domain(task="x:y", length_soft=300), Sampling(max_tokens=100), 300, 301),
        (Domain(task="x:y", length_hard=60), Sampling(), 45, 60),
        (Domain(task="x:y", length_soft=10, length_hard=20), Sampling(), 10, 20),
    ],
)
def test_the_length_penalty_follows_what_a_turn_may_sample(domain, sampling, soft, hard):
    config = Config(domains={"a": domain}, sampling=sampling, rollout=Rollout(max_len=2048))
    filled = resolve(config, {}, gpu=False).domains["a"]
    assert (filled.length_soft, filled.length_hard) == (soft, hard)


@pytest.mark.parametrize(("gpu", "precision", "graphs"), [(True, "bf16", True), (False, "fp32", False)])
def test_precision_and_graphs_follow_the_machine(gpu, precision, graphs):
    config = resolve(OPEN, {}, gpu=gpu)
    assert (config.precision, config.rollout.graphs) == (precision, graphs)


def test_what_is_set_stays():
    config = resolve(quickstart(), {"max_position_embeddings": 2048}, gpu=True)
    assert config == replace(quickstart(), rollout=replace(quickstart().rollout, graphs=True))


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match=r"rollout.graphs is true, but there is no GPU"):
        resolve(replace(OPEN, rollout=Rollout(graphs=True)), {}, gpu=False)
