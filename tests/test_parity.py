"""The first inner step on unchanged weights: the trainer's ratio to the engines is 1, before and after an update.

Of DeepSeek-V3.2 in two actors, of every other family in one engine of this process.
"""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_rollout_engine import run
from tiny import save_tiny, save_tiny_deepseek

from trimtab.grpo.batch import Trajectory, pack
from trimtab.grpo.config import LossSettings
from trimtab.grpo.policy.attention import attend_sparse
from trimtab.grpo.policy.families import ARCHITECTURES
from trimtab.grpo.policy.policy import Policy, load_policy
from trimtab.kernels.reference import kept_logp
from trimtab.rollout.attempt import Track
from trimtab.rollout.checkpoint import policy_shape, read_config
from trimtab.rollout.engine.architectures import DSA, SUPPORTED
from trimtab.rollout.engine.engine import Engine, EngineConfig
from trimtab.rollout.engine.pool import Pool
from trimtab.rollout.types import Completion, Request, Sampling, Segment

SAMPLING = Sampling(temperature=1.3, top_p=0.9, top_k=64, max_tokens=24)
LENGTHS = (3, 14, 40, 90, 150)  # index_topk is 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny_deepseek")
    save_tiny_deepseek(path, initializer_range=0.1)
    return path


@pytest.fixture(scope="module")
def pool(checkpoint: Path) -> Iterator[Pool]:
    pool = Pool(EngineConfig(model=str(checkpoint), max_model_len=256, kv_cache_bytes=32 << 20, max_num_seqs=16), 2)
    yield pool
    pool.close()


def segment(name: str, prompt: tuple[int, ...], one: Completion) -> Segment:
    return Segment(
        name=name,
        token_ids=np.array([*prompt, *one.token_ids], np.int32),
        sampled=np.array([False] * len(prompt) + [True] * len(one.token_ids)),
        logp=one.logp,
        kept_ids=one.kept_ids,
        kept_offsets=one.kept_offsets,
        selected=one.selected,
        routes=one.routes if one.routes.shape[1] else np.zeros((len(prompt) + len(one.token_ids) - 1, 0, 0), np.uint8),
        weight_version=np.full(len(one.token_ids), one.weight_version, np.int32),
    )


def requests() -> list[Request]:
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(360) for _ in range(length)) for length in LENGTHS]
    return [Request(name=f"p{i}", prompt_ids=ids, sampling=SAMPLING, n=4, seed=i) for i, ids in enumerate(prompts)]


def trajectories(asked: list[Request], answers: list[list[Completion]]) -> list[Trajectory]:
    return [
        Trajectory(
            name=f"{request.name}/{j}",
            domain="any",
            segments=(segment(f"{request.name}/{j}", request.prompt_ids, one),),
            advantage=1.0,
            settings=LossSettings(),
        )
        for request, completions in zip(asked, answers, strict=True)
        for j, one in enumerate(completions)
    ]


def sample(pool: Pool) -> list[Trajectory]:
    """Four continuations of each prompt, from both actors at once."""

    async def ask() -> list[list[Completion]]:
        return list(await asyncio.gather(*map(pool.generate, requests())))

    return trajectories(requests(), asyncio.run(ask()))


def move(policy: Policy) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for name, buffer in policy.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.02 * torch.randn_like(buffer))


@torch.no_grad()
def worst_log_ratio(policy: Policy, trajectories: list[Trajectory], *, replay: bool = False) -> float:
    worst = 0.0
    for packed in pack(trajectories, max_tokens=1024):
        selected = packed.selected_NLK if replay else None
        hidden_ND = policy(
            packed.ids_N, packed.cu_seqlens, routes_NLK=packed.routes_NLK, selected_NLK=selected
        ).hidden_ND
        logp_S = kept_logp(
            hidden_ND[packed.predict_S],
            policy.head_weight,
            packed.token_S,
            packed.kept_id_E,
            packed.kept_offset_S,
            SAMPLING.temperature,
        )
        worst = max(worst, float((logp_S - packed.old_logp_S).abs().max()))
    return worst


def test_the_ratio_is_one_on_unchanged_weights_before_and_after_an_update(pool, checkpoint):
    policy = load_policy(checkpoint)
    first = sample(pool)
    assert len(first) == 4 * len(LENGTHS)
    assert worst_log_ratio(policy, first) < 1e-5

    move(policy)
    assert worst_log_ratio(policy, first) > 1e-2, "the weights moved: what the old ones sampled is off-policy"

    pool.load_weights(lambda: policy.weights().items(), version=1)
    second = sample(pool)
    assert all((t.segments[0].weight_version == 1).all() for t in second)
    assert worst_log_ratio(policy, second) < 1e-5


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
MSCALE = YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}
FAMILIES: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {"q_lora_rank": None, "rope_parameters": MSCALE},
    "DeepseekV3ForCausalLM": {"rope_parameters": MSCALE},
    "GlmMoeDsaForCausalLM": {},
    "LlamaForCausalLM": {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "MistralForCausalLM": {"sliding_window": 512},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True, "rope_parameters": YARN},
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
}


UNSCALED = [("DeepseekV3ForCausalLM", {})]
"""Without RoPE scaling another class of vLLM's rotates, with code of its own on a CPU."""


@pytest.mark.parametrize(("name", "features"), [*FAMILIES.items(), *UNSCALED])
def test_every_family_has_a_ratio_of_one_before_and_after_an_update(name, features, tmp_path):
    save_tiny(tmp_path, name, **({"initializer_range": 0.1} | features))
    policy = load_policy(tmp_path)
    engine = Engine(EngineConfig(model=str(tmp_path), max_model_len=256, kv_cache_bytes=32 << 20, max_num_seqs=16))
    try:
        first = trajectories(requests(), run(engine, requests()))
        assert worst_log_ratio(policy, first) < 1e-5
        move(policy)
        assert worst_log_ratio(policy, first) > 1e-2
        engine.load_weights(policy.weights(), 1)
        assert worst_log_ratio(policy, trajectories(requests(), run(engine, requests()))) < 1e-5
    finally:
        engine.close()


@pytest.mark.parametrize("name", DSA)
def test_replayed_selections_give_a_ratio_of_one_to_a_policy_whose_indexer_selects_others(name, tmp_path):
    """Prompts in chunks, prefixes found in the cache, and a second turn behind the first."""
    save_tiny(tmp_path, name, initializer_range=0.1)
    policy = load_policy(tmp_path)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in policy.indexer_parameters():
            weight.copy_(0.1 * torch.randn_like(weight))
    sizes: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 16, "max_batched_tokens": 64}
    engine = Engine(EngineConfig(model=str(tmp_path), kv_cache_bytes=32 << 20, keep_selection=True, **sizes))
    try:
        tracks = [Track() for _ in requests() for _ in range(4)]
        asked = requests()
        answers = [one for several in run(engine, asked) for one in several]
        for track, request, one in zip(tracks, [r for r in asked for _ in range(4)], answers, strict=True):
            track.add(request.prompt_ids, one)
        more = [
            Request(name=f"{i}", prompt_ids=(*ids, 5, 6, 7), sampling=SAMPLING, seed=i, routes_start=len(ids) - 1)
            for i, ids in enumerate(track.ids for track in tracks)
        ]
        for track, request, (one,) in zip(tracks, more, run(engine, more), strict=True):
            track.add(request.prompt_ids, one)
    finally:
        engine.close()
    segments = [track.segment(f"{i}") for i, track in enumerate(tracks)]
    shape = policy_shape(read_config(tmp_path), 0, keep_selection=True)
    for one in segments:
        one.check_against(shape)
    played = [
        Trajectory(name=one.name, domain="any", segments=(one,), advantage=1.0, settings=LossSettings())
        for one in segments
    ]
    assert worst_log_ratio(policy, played) > 1e-2, "the indexers differ, or this test would prove nothing"
    for choose in (None, lambda T, topk: attend_sparse):
        policy.choose_attend = choose
        assert worst_log_ratio(policy, played, replay=True) < 1e-5


def test_engine_and_trainer_know_the_same_families():
    assert tuple(ARCHITECTURES) == SUPPORTED
    assert {*FAMILIES, "DeepseekV32ForCausalLM"} == {*SUPPORTED}
