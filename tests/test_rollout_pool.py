"""Engines in Ray actors: spreading, updates, and what happens when one dies."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from tiny import save_tiny_deepseek
from transformers import DeepseekV32ForCausalLM

from trimtab.grpo.sampling.sync import differing
from trimtab.rollout.engine.engine import EngineConfig
from trimtab.rollout.engine.pool import EngineError, Pool, gpu_share
from trimtab.rollout.engine.weights import checksums
from trimtab.rollout.types import Request, Sampling


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny_deepseek")
    save_tiny_deepseek(path)
    return path


@pytest.fixture(scope="module")
def pool(checkpoint: Path) -> Iterator[Pool]:
    pool = Pool(EngineConfig(model=str(checkpoint), max_model_len=512, kv_cache_bytes=32 << 20, max_num_seqs=16), 2)
    pool.wait_until_ready()  # on a busy machine a start takes longer than a request may be silent
    yield pool
    pool.close()
    assert not ray.is_initialized()


def request(name: str, tokens: int = 300, **changes: object) -> Request:
    """A long one: a random policy hardly ever ends by itself."""
    sampling = Sampling(temperature=1.0, top_k=64, max_tokens=tokens)
    return Request(**({"name": name, "prompt_ids": tuple(range(20)), "sampling": sampling, "n": 2} | changes))


def test_requests_are_spread_and_those_of_a_group_stay_together(pool):
    async def play() -> tuple[list[int], int]:
        tasks = [asyncio.create_task(pool.generate(request(f"{g}#{i}", 8))) for g in "abcd" for i in range(3)]
        await asyncio.sleep(0)
        loads = list(pool._unfinished)
        return loads, sum(len(completions) for completions in await asyncio.gather(*tasks))

    loads, completions = asyncio.run(play())
    assert loads == [12, 12] and completions == 24 and pool._unfinished == [0, 0]


def test_every_actor_gets_new_weights(pool):
    pool.load_weights(lambda: [("model.norm.weight", torch.ones(64))], 4)

    async def play() -> list[int]:
        answers = await asyncio.gather(*(pool.generate(request(name, 4)) for name in "ab"))
        return [one.weight_version for completions in answers for one in completions]

    assert asyncio.run(play()) == [4, 4, 4, 4]


def test_every_engine_plays_the_probe_with_the_same_result(pool):
    one, two = pool.probe(request("probe", 8))
    assert one.token_ids.tolist() == two.token_ids.tolist() and len(one.token_ids) == 8
    assert abs(one.logp - two.logp).max() < 1e-6


def test_a_corrupted_tensor_is_found_in_every_engine_by_its_group(pool, checkpoint):
    """The engines get layer 1's o_proj with a single weight off by 2e-3; the trainer sums its own."""
    weights = DeepseekV32ForCausalLM.from_pretrained(checkpoint).state_dict()
    sent = dict(weights)
    name = "model.layers.1.self_attn.o_proj.weight"
    sent[name] = weights[name].clone()
    sent[name][3, 5] += 2e-3
    pool.load_weights(lambda: sent.items(), 7)
    for sums in pool.checksums():
        assert sums.keys() >= {"embed", "layers.0.mlp", "layers.1.attention", "layers.2.norm", "norm", "head"}
        assert differing(sums, checksums(weights.items())) == ["layers.1.attention"]
        assert differing(sums, checksums(sent.items())) == []
    pool.load_weights(lambda: weights.items(), 8)
    assert all(differing(sums, checksums(weights.items())) == [] for sums in pool.checksums())


def test_an_engine_that_was_not_made_to_sleep_stays_awake(pool):
    pool.sleep()
    assert len(asyncio.run(pool.generate(request("awake", 4)))) == 2
    pool.wake()


@pytest.mark.parametrize("name", ["graphs", "sleep"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(checkpoint, name):
    config = EngineConfig(model=str(checkpoint), max_model_len=64, **{name: True})
    with pytest.raises(ValueError, match=f"{name}=True needs a GPU"):
        Pool(config, 1)


def test_a_start_is_told_by_its_parts(pool):
    for parts in pool.start_seconds:
        assert parts.keys() >= {"process", "imports", "model", "warm-up"}
        assert all(seconds >= 0 for seconds in parts.values())


def test_weights_that_do_not_fit_are_refused(pool):
    with pytest.raises(ValueError, match=r"version 5 do not load.*no parameter 'nope'"):
        pool.load_weights(lambda: [("nope", torch.ones(1))], 5)
    pool.load_weights(lambda: [], 6)
    assert pool.versions() == [6, 6]


def test_a_request_the_engine_refuses_names_itself(pool):
    with pytest.raises(ValueError, match="long: a prompt of 600 tokens"):
        asyncio.run(pool.generate(request("long", prompt_ids=(1,) * 600)))
    assert pool.restarts == 0


def test_an_actor_killed_at_work_is_replaced_with_the_newest_weights_and_nothing_is_lost(pool):
    pool.load_weights(lambda: [("model.norm.weight", torch.full((64,), 1.5))], 9)

    async def play() -> list[int]:
        tasks = [asyncio.create_task(pool.generate(request(f"k{i}#0"))) for i in range(8)]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in tasks)
        ray.kill(pool._actors[0])
        answers = await asyncio.gather(*tasks)
        return [one.weight_version for completions in answers for one in completions]

    assert asyncio.run(play()) == [9] * 16
    assert pool.restarts == 1 and pool._unfinished == [0, 0] and pool.versions() == [9, 9]


def test_engines_that_cannot_start_end_in_one_clear_error(checkpoint):
    broken = EngineConfig(model=str(checkpoint), max_model_len=512, kv_cache_bytes=1, max_num_seqs=16)
    pool = Pool(broken, 1)
    with pytest.raises(EngineError, match=r"^the engines did not start: .*memory"):
        pool.wait_until_ready()
    pool.close()  # as whoever started it does in the end


def test_a_pool_without_actors_is_refused(checkpoint):
    with pytest.raises(ValueError, match="num_actors must be at least 1"):
        Pool(EngineConfig(model=str(checkpoint), max_model_len=64), 0)


@pytest.mark.parametrize(
    ("gpus", "engines", "share"), [(0, 3, 0.0), (1, 3, 0.25), (1, 2, 0.33), (2, 3, 0.5), (8, 3, 1.0)]
)
def test_engines_and_trainer_share_the_gpus_there_are(monkeypatch, gpus, engines, share):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert gpu_share(engines) == share
