"""A real vLLM engine against transformers' own models in fp32, over the kept sets it recorded."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import save_tiny, save_tiny_deepseek, tiny_deepseek

from trimtab.grpo.config import Rollout
from trimtab.grpo.policy.policy import load_policy
from trimtab.grpo.policy.selection import agreement, noting_selection
from trimtab.grpo.recipes import quickstart
from trimtab.grpo.sampling import players
from trimtab.grpo.sampling.sync import differing, selection_agreement
from trimtab.grpo.stages.config import Indexer
from trimtab.grpo.stages.convert import convert
from trimtab.kernels import reference
from trimtab.rollout.engine.engine import Engine, EngineConfig
from trimtab.rollout.engine.weights import checksums
from trimtab.rollout.types import Completion, Request, Sampling

SAMPLING = Sampling(temperature=1.3, top_p=0.9, top_k=64, max_tokens=24)
GATHERED = 12 * 16 + 10  # beyond 12 times index_topk attention gathers rows


def config(path: Path, **changes: Any) -> EngineConfig:
    """Room for few tokens a step, so that prompts are computed in chunks."""
    sizes: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 16, "max_batched_tokens": 64}
    return EngineConfig(model=str(path), kv_cache_bytes=32 << 20, **(sizes | changes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny_deepseek")
    save_tiny_deepseek(path)
    return path


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    engine = Engine(config(checkpoint))
    yield engine
    engine.close()


@pytest.fixture
def stable_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give transformers' indexer the tie rule of this project: a lower position wins."""
    topk = torch.Tensor.topk

    def stable(self: torch.Tensor, k: int, dim: int = -1, **options: Any) -> Any:
        if self.dim() != 3:
            return topk(self, k, dim=dim, **options)
        values, indices = self.sort(dim=dim, descending=True, stable=True)
        return torch.return_types.topk((values[..., :k], indices[..., :k]))

    monkeypatch.setattr(torch.Tensor, "topk", stable)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(360) for _ in range(length))


def run(engine: Engine, requests: list[Request]) -> list[list[Completion]]:
    """All completions, in the order of the requests."""
    keys = [engine.add(request) for request in requests]
    finished: dict[str, list[Completion]] = {}
    while engine.busy:
        finished |= dict(engine.step())
    return [finished[key] for key in keys]


@torch.no_grad()
def worst_difference(model: torch.nn.Module, prompt_ids: tuple[int, ...], one: Completion) -> float:
    """Largest distance of the recorded log-probabilities to model's, both normalised over the kept sets."""
    ids = torch.tensor([[*prompt_ids, *one.token_ids.tolist()]])
    logit_SV = model(ids).logits[0, len(prompt_ids) - 1 : -1] / SAMPLING.temperature
    worst = 0.0
    for t, token in enumerate(one.token_ids.tolist()):
        kept = one.kept_ids[one.kept_offsets[t] : one.kept_offsets[t + 1]].tolist()
        logp = logit_SV[t, kept].log_softmax(-1)[kept.index(token)]
        worst = max(worst, abs(logp.item() - one.logp[t].item()))
    return worst


@torch.no_grad()
def routes_of(model: torch.nn.Module, ids: list[int], layers: list[int]) -> np.ndarray:
    """The experts model itself chooses, sorted: [N, L, K]."""
    chosen: dict[int, torch.Tensor] = {}
    hooks = [
        model.model.layers[i].mlp.gate.register_forward_hook(lambda _m, _in, out, i=i: chosen.update({i: out[2]}))
        for i in layers
    ]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack([chosen[i].sort(-1).values for i in layers], 1).numpy()


def test_log_probabilities_equal_transformers_over_the_kept_sets(engine, checkpoint, stable_ties):
    """In chunks, with shared prefixes, within and beyond index_topk = 16, masked and gathered, four each."""
    model = transformers.DeepseekV32ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompts = [prompt(5), prompt(40, 1), prompt(100, 2), prompt(100, 2) + prompt(30, 3), prompt(GATHERED, 4)]
    requests = [Request(name=f"p{i}", prompt_ids=ids, sampling=SAMPLING, n=4, seed=i) for i, ids in enumerate(prompts)]
    for request, completions in zip(requests, run(engine, requests), strict=True):
        assert len({tuple(one.token_ids.tolist()) for one in completions}) == 4
        for one in completions:
            assert worst_difference(model, request.prompt_ids, one) < 1e-5
            ids = [*request.prompt_ids, *one.token_ids.tolist()]
            assert one.routes.dtype == np.uint8 and one.routes.shape == (len(ids) - 1, 2, 2)
            assert (np.sort(one.routes, -1) == routes_of(model, ids, [1, 2])[:-1]).all()


def test_a_kept_set_holds_at_most_top_k_ids_and_reaches_top_p(engine, checkpoint):
    model = transformers.DeepseekV32ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    sampling = Sampling(temperature=0.7, top_p=0.5, top_k=5, max_tokens=1)
    (completions,) = run(engine, [Request(name="k", prompt_ids=prompt(12), sampling=sampling, n=8, seed=1)])
    with torch.no_grad():
        logit_V = model(torch.tensor([prompt(12)])).logits[0, -1] / 0.7
    best = logit_V.topk(5)
    better = best.values.softmax(-1).cumsum(-1) - best.values.softmax(-1)
    expected = best.indices[better < 0.5].tolist()
    assert all(sorted(one.kept_ids.tolist()) == sorted(expected) for one in completions)


def test_the_same_seed_samples_the_same_from_a_cached_prefix(engine):
    request = Request(name="again", prompt_ids=prompt(80, 9), sampling=SAMPLING, n=2, seed=5)
    other = Request(name="other", prompt_ids=prompt(90, 10), sampling=SAMPLING, n=4, seed=6)
    (first,), (again, _) = run(engine, [request]), run(engine, [request, other])
    for one, two in zip(first, again, strict=True):
        assert one.token_ids.tolist() == two.token_ids.tolist()
        assert np.abs(one.logp - two.logp).max() < 1e-5
        assert (np.sort(one.routes, -1) == np.sort(two.routes, -1)).all()


def test_only_the_routes_asked_for_are_sent(engine):
    whole = Request(name="whole", prompt_ids=prompt(50, 7), sampling=SAMPLING, seed=1)
    rest = Request(name="rest", prompt_ids=prompt(50, 7), sampling=SAMPLING, seed=1, routes_start=40)
    ((one,), (two,)) = run(engine, [whole, rest])
    assert len(two.routes) == 50 + len(two.token_ids) - 1 - 40
    assert (np.sort(one.routes[40:], -1) == np.sort(two.routes, -1)).all()


def test_a_turn_ends_at_the_end_of_sentence_or_at_its_length(engine, checkpoint):
    eos = transformers.DeepseekV32Config.from_pretrained(checkpoint).eos_token_id
    sampling = Sampling(temperature=2.0, top_p=1.0, top_k=384, max_tokens=200)
    (completions,) = run(engine, [Request(name="e", prompt_ids=prompt(10), sampling=sampling, n=16, seed=3)])
    assert {one.finish for one in completions} == {"stop", "length"}
    for one in completions:
        ends = one.token_ids[-1] == eos
        assert (one.finish == "stop") == ends and eos not in one.token_ids[:-1]
        assert ends or len(one.token_ids) == 200


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_ids": prompt(256)}, "prompt of 256 tokens does not fit max_model_len = 256"),
        ({"prompt_ids": ()}, "prompt of 0 tokens"),
        ({"routes_start": 9}, "routes_start must lie in"),
    ],
)
def test_an_impossible_request_is_refused_by_name(engine, changes, reason):
    with pytest.raises(ValueError, match=f"^mine: .*{reason}"):
        engine.add(Request(**({"name": "mine", "prompt_ids": prompt(9), "sampling": SAMPLING} | changes)))
    assert not engine.busy


def test_new_weights_are_the_models_and_the_cached_prefix_is_forgotten(engine, stable_ties):
    request = Request(name="w", prompt_ids=prompt(70, 11), sampling=SAMPLING, n=2, seed=2)
    ((before, _),) = run(engine, [request])
    model = tiny_deepseek(seed=1, eos_token_id=368)
    engine.load_weights(model.state_dict(), 7)  # experts stacked, as a trainer has them
    (completions,) = run(engine, [request])
    assert all(one.weight_version == 7 for one in completions) and before.weight_version == 0
    assert max(worst_difference(model, request.prompt_ids, one) for one in completions) < 1e-5
    assert worst_difference(model, request.prompt_ids, before) > 0.1


def test_a_prefix_is_reused_under_its_own_weights_only(engine):
    """Two requests of one prompt: the second computes its last block alone; under a new version, all of it again."""

    def computed(name: str) -> int:
        scheduler = engine._core.engine_core.scheduler
        counts: list[int] = []
        schedule = scheduler.schedule

        def counting(*args: Any) -> Any:
            output = schedule(*args)
            counts.append(output.total_num_scheduled_tokens)
            return output

        scheduler.schedule = counting
        run(engine, [Request(name=name, prompt_ids=prompt(64, 20), sampling=replace(SAMPLING, max_tokens=1))])
        scheduler.schedule = schedule
        return sum(counts)

    assert (computed("first"), computed("again")) == (64, 16)
    engine.load_weights({}, 30)
    assert (computed("new"), computed("again")) == (64, 16)


def test_weights_wait_for_an_idle_engine_and_must_fit(engine):
    engine.add(Request(name="busy", prompt_ids=prompt(5), sampling=SAMPLING))
    with pytest.raises(ValueError, match="1 sequences are unfinished"):
        engine.load_weights({}, 8)
    while engine.busy:
        engine.step()
    with pytest.raises(ValueError, match="no parameter 'nope'"):
        engine.load_weights({"nope": torch.zeros(1)}, 8)
    with pytest.raises(ValueError, match="has shape"):
        engine.load_weights({"lm_head.weight": torch.zeros(1)}, 8)
    assert engine.version != 8 and engine.weight_version() == engine.version


def test_the_ids_that_end_a_turn_are_those_of_the_config(checkpoint):
    """A checkpoint whose eos never comes, with a config that ends turns at any of the first 100 ids."""
    engine = Engine(config(checkpoint, stop_ids=tuple(range(100))))
    sampling = Sampling(temperature=2.0, top_p=1.0, top_k=384, max_tokens=200)
    (completions,) = run(engine, [Request(name="e", prompt_ids=prompt(10), sampling=sampling, n=8, seed=3)])
    engine.close()
    assert all(one.finish == "stop" and one.token_ids[-1] < 100 for one in completions)
    assert all((one.token_ids[:-1] >= 100).all() for one in completions)


def test_an_engine_that_was_not_made_to_sleep_says_so(engine):
    with pytest.raises(ValueError, match="make it with sleep=True"):
        engine.sleep()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("name", ["graphs", "sleep"])
def test_what_needs_a_gpu_is_refused_without_one(checkpoint, name):
    with pytest.raises(ValueError, match=f"{name}=True needs a GPU"):
        Engine(config(checkpoint, **{name: True}))


DENSE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


@pytest.mark.parametrize(
    ("name", "values", "layers"),
    [("Llama", DENSE, 0), ("Qwen3", DENSE, 0), ("Qwen3Moe", DENSE | ROUTED | {"mlp_only_layers": [0]}, 1)],
)
def test_models_of_vllm_equal_transformers_before_and_after_an_update(name, values, layers, tmp_path):
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    model = model_class(getattr(transformers, f"{name}Config")(**values)).eval()
    model.save_pretrained(tmp_path)
    engine = Engine(config(tmp_path))
    request = Request(name="m", prompt_ids=prompt(100), sampling=SAMPLING, n=2, seed=1)
    for version in range(3):
        if version:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            engine.load_weights(model.state_dict(), version)
        for one in run(engine, [request])[0]:
            assert worst_difference(model, request.prompt_ids, one) < 1e-5
            assert one.routes.shape == ((len(one.token_ids) + 99, layers, 2) if layers else (0, 0, 0))
            assert one.weight_version == version == engine.weight_version()
            if layers:
                ids = [*request.prompt_ids, *one.token_ids.tolist()]
                assert (np.sort(one.routes, -1) == routes_of(model, ids, [1])[:-1]).all()
        theirs, ours = engine.checksums(), checksums(model.named_parameters())
        assert theirs.keys() >= {"embed", "layers.0.norm", "norm"}  # a CPU packs its products' weights away
        assert differing(theirs, {group: ours[group] for group in theirs}) == []
    engine.close()


def test_a_config_that_cannot_run_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ValueError, match="GPT2LMHeadModel, which is not supported"):
        config(tmp_path)
    with pytest.raises(ValueError, match="max_model_len must be at least 1"):
        config(checkpoint, max_model_len=0)
    with pytest.raises(ValueError, match=r"max_model_len is 10000000, .* lower the window"):
        config(checkpoint, max_model_len=10**7)
    with pytest.raises(ValueError, match="max_batched_tokens must be at least max_num_seqs"):
        config(checkpoint, max_batched_tokens=8)


def test_one_sequence_at_a_time_gives_the_same_bits_in_whatever_order_requests_come(checkpoint, engine):
    """As rollout.deterministic sets it; beside others, the size of a batch decides the last bits."""
    recipe = replace(quickstart(), model=str(checkpoint), rollout=Rollout(max_len=256, kv_cache_mib=32))
    settings = replace(recipe, rollout=replace(recipe.rollout, deterministic=True))
    alone = players.engine_config(settings, str(checkpoint))
    usual = players.engine_config(recipe, str(checkpoint))
    assert (alone.max_num_seqs, alone.prefix_caching) == (1, False) and usual.max_num_seqs > 1 and usual.prefix_caching
    requests = [
        Request(name=f"d{i}", prompt_ids=prompt(30) + prompt(i, i), sampling=SAMPLING, n=2, seed=i) for i in range(1, 5)
    ]
    single = Engine(replace(alone, max_batched_tokens=256))
    try:
        first, second = run(single, requests), run(single, requests[::-1])[::-1]
    finally:
        single.close()
    for one, two in zip(chain(*first), chain(*second), strict=True):
        assert one.token_ids.tolist() == two.token_ids.tolist() and one.logp.tobytes() == two.logp.tobytes()
        assert (one.routes == two.routes).all() and (one.kept_ids == two.kept_ids).all()


def test_a_converted_checkpoint_samples_as_its_dense_source(tmp_path):
    dense = save_tiny(tmp_path / "dense", "DeepseekV3ForCausalLM")
    convert(tmp_path / "dense", tmp_path / "sparse", Indexer(index_topk=128, index_n_heads=4, index_head_dim=16))
    engine = Engine(config(tmp_path / "sparse"))
    try:
        requests = [Request(name="c", prompt_ids=prompt(n), sampling=SAMPLING, n=2, seed=n) for n in (5, 100)]
        for request, completions in zip(requests, run(engine, requests), strict=True):
            assert all(worst_difference(dense, request.prompt_ids, one) < 1e-5 for one in completions)
    finally:
        engine.close()


def test_without_rounding_the_selection_in_fp8_is_the_policys(checkpoint, monkeypatch):
    """The rotation alone changes no product."""
    rotate = reference.hadamard(16, torch.float32, torch.device("cpu")) / 4
    monkeypatch.setattr(reference, "fp8_rows", lambda x: x @ rotate)
    policy, ids = load_policy(checkpoint), prompt(60, 12)
    with torch.no_grad(), noting_selection(policy) as chosen:
        policy(torch.tensor(ids), torch.tensor([0, len(ids)]))
    shares, _ = agreement(chosen, chosen.in_fp8)
    assert min(shares) > 0.999


def test_the_engine_selects_what_the_policy_selects(checkpoint):
    """In chunks of 64 tokens, with requests before and behind that share the beginning; then with other weights."""
    ids = prompt(150, 11)
    engine = Engine(config(checkpoint))
    try:
        run(engine, [Request(name="before", prompt_ids=ids[:100], sampling=SAMPLING)])
        policy = load_policy(checkpoint)
        for version in (0, 1):
            if version:
                with torch.no_grad():
                    for weight in policy.indexer_parameters():
                        weight.add_(0.05 * torch.randn_like(weight))
                engine.load_weights(policy.weights(), version)
            with torch.no_grad(), noting_selection(policy) as chosen:
                policy(torch.tensor(ids), torch.tensor([0, len(ids)]))
            packed = engine.selection(ids)
            assert packed.shape == (3, len(ids) - 16, -(-len(ids) // 8))
            found = selection_agreement([packed], chosen)
            assert found["selection/ids"] > 0.999 and found["selection/mass"] > 0.999
            assert 0.8 < found["selection/fp8_ids"] < 1 and 0.8 < found["selection/fp8_mass"] < 1
            packed[0] = 0
            assert selection_agreement([packed, packed], chosen)["selection/ids"] == pytest.approx(2 / 3, abs=1e-3)
        with pytest.raises(ValueError, match="16 tokens and index_topk = 16: nothing is selected"):
            engine.selection(ids[:16])
        (one,) = run(engine, [Request(name="behind", prompt_ids=ids, sampling=SAMPLING)])[0]
        assert one.weight_version == 1
    finally:
        engine.close()
