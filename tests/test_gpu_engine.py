"""Engines beside a trainer on one GPU: graphs against eager, two routes for weights, sleep."""

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from kernel_checks import needs_gpu
from test_rollout_engine import DENSE, ROUTED, SAMPLING, prompt, run
from tiny import save_tiny_deepseek
from torch import Tensor, nn

from trimtab.rollout.engine import pool as pool_module
from trimtab.rollout.engine import weights as weights_module
from trimtab.rollout.engine.engine import Engine, EngineConfig, capture_sizes
from trimtab.rollout.engine.pool import Pool, gpu_share
from trimtab.rollout.types import Completion, Request, Sampling

WIDE = DENSE | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": WIDE | {"tie_word_embeddings": True},
    "Qwen3": WIDE,
    "Qwen3Moe": WIDE | ROUTED | {"moe_intermediate_size": 64, "mlp_only_layers": [0]},
}
PROBE = Request(name="probe", prompt_ids=prompt(70), sampling=Sampling(top_p=1.0, top_k=64, max_tokens=16), seed=1)


def save(family: str, folder: Path) -> nn.Module:
    """A tiny policy in bf16 on the GPU, saved to folder."""
    torch.manual_seed(0)
    if family == "DeepseekV32":
        model: nn.Module = save_tiny_deepseek(folder)
    else:
        config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        model.save_pretrained(folder)
    return model.eval().to("cuda", torch.bfloat16)


def config(folder: Path, **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "model": str(folder),
        "dtype": "bfloat16",
        "max_model_len": 256,
        "kv_cache_bytes": 256 << 20,
        "max_num_seqs": 16,
        "max_batched_tokens": 256,
    }
    return EngineConfig(**(values | changes))


def source(model: nn.Module, scale: float = 1.0) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    """The weights an engine must have, each made when it is asked for."""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, weight in model.named_parameters():
            yield name, weight.detach() * scale
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                yield name, buffer.float()

    return stream


def same(one: Completion, two: Completion) -> bool:
    return one.token_ids.tolist() == two.token_ids.tolist() and bool((one.logp == two.logp).all())


def sampled(folder: Path, *, graphs: bool) -> list[Completion]:
    """What 16 sequences sample, in chunks of prompts and then decoding together until one after another ends."""
    engine = Engine(config(folder, graphs=graphs))
    requests = [Request(name=f"p{i}", prompt_ids=prompt(20 + 9 * i, i), sampling=SAMPLING, seed=i) for i in range(16)]
    completions = [one for (one,) in run(engine, requests)]
    runner = engine._core.engine_core.model_executor.driver_worker.worker.model_runner
    captured = 0 if runner.cudagraph_manager is None else len(runner.cudagraph_manager.graphs)
    assert captured == (len(capture_sizes(16)) if graphs else 0)
    assert all(seconds > -0.1 for seconds in engine.start_seconds.values()), engine.start_seconds
    engine.close()
    del engine, runner
    gc.collect()
    torch.cuda.empty_cache()
    return completions


@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_computes_what_eager_computes(family, tmp_path):
    """On tokens that both sampled after the same ones, log-probabilities agree to what bf16 explains, and so do routes
    and kept sets but for near ties; a graph's attention may be split otherwise over the keys."""
    save(family, tmp_path)
    tokens = shared = 0
    for eager, graph in zip(sampled(tmp_path, graphs=False), sampled(tmp_path, graphs=True), strict=True):
        equal = eager.token_ids == graph.token_ids
        length = len(equal) if equal.all() else int(equal.argmin())
        tokens, shared = tokens + len(equal), shared + length
        assert np.abs(eager.logp[:length] - graph.logp[:length]).max(initial=0.0) < 0.1
        assert len(graph.kept_offsets) == len(graph.token_ids) + 1
        assert graph.routes.shape == eager.routes.shape
        if graph.routes.size:
            rows = len(graph.routes) - len(equal) + length
            agree = np.sort(graph.routes[:rows], -1) == np.sort(eager.routes[:rows], -1)
            assert agree.mean() > 0.95 and not (graph.routes[:, :, 0] == graph.routes[:, :, 1]).any()
    assert shared > 0.8 * tokens


@needs_gpu
@pytest.mark.parametrize("family", [*FAMILIES, "DeepseekV32"])
def test_shared_memory_of_the_gpu_brings_the_same_bits_as_the_store(family, tmp_path, monkeypatch):
    model = save(family, tmp_path)
    monkeypatch.setattr(weights_module, "CHUNK_BYTES", 1 << 17)  # many chunks, and a tensor larger than one
    sent = []
    chunks = pool_module.shared_chunks
    monkeypatch.setattr(pool_module, "shared_chunks", lambda pairs, n: (sent.append(n), chunks(pairs, n))[1])
    pool = Pool(config(tmp_path, graphs=True), 1, gpu_share(1))
    try:
        pool.wait_until_ready()
        pool.load_weights(source(model, 1.1), 1)
        (probe,), (sums,) = pool.probe(PROBE), pool.checksums()
        assert sent == [1]
        pool.load_weights(source(model), 2)
        assert not same(pool.probe(PROBE)[0], probe) and sent == [1, 1]
        monkeypatch.setattr(pool_module, "gpu_identity", lambda: None)  # as if the trainer were elsewhere
        pool.load_weights(source(model, 1.1), 3)
        assert sent == [1, 1] and pool.versions() == [3]
        assert pool.checksums() == [sums] and same(pool.probe(PROBE)[0], probe)
    finally:
        pool.close()


@needs_gpu
@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe", "DeepseekV32"])
def test_an_engine_sleeps_takes_weights_and_wakes_as_it_was(family, tmp_path):
    model = save(family, tmp_path)
    pool = Pool(config(tmp_path, graphs=True, sleep=True, kv_cache_bytes=2 << 30), 1, gpu_share(1))
    try:
        pool.wait_until_ready()
        pool.load_weights(source(model, 1.1), 1)
        other = pool.probe(PROBE)[0]
        pool.load_weights(source(model), 2)
        first = pool.probe(PROBE)[0]
        awake = torch.cuda.mem_get_info()[0]
        for version in range(3, 6):
            pool.sleep()
            assert torch.cuda.mem_get_info()[0] > awake + (2 << 30) * 0.95
            memory = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")  # as a trainer would
            del memory
            torch.cuda.empty_cache()  # or this process keeps what the next round measures
            pool.load_weights(source(model, 1.1), version)
            pool.load_weights(source(model), version)
            pool.wake()
            assert same(pool.probe(PROBE)[0], first)
        pool.sleep()
        pool.wake()
        assert same(pool.probe(PROBE)[0], first) and not same(other, first)
        asyncio.run(request_while_asleep(pool))
    finally:
        pool.close()


async def request_while_asleep(pool: Pool) -> None:
    """A request that comes while the engine sleeps waits for it."""
    pool.sleep()
    task = asyncio.create_task(pool.generate(PROBE))
    await asyncio.sleep(1.0)
    assert not task.done()
    pool.wake()
    assert len((await task)[0].token_ids) == 16
