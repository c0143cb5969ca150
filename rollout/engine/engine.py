"""One vLLM engine in this process: requests in, completions with everything the sampler knew out."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.rollout.engine.architectures import CPU_ENVIRONMENT, SUPPORTED, moe_layers, options
from trimtab.rollout.types import Completion, Request

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_DEEP_GEMM": "0",  # kernels for quantised weights, of which there are none
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRITON_F32_DEFAULT": "ieee",  # vLLM's own kernels: fp32 means fp32, not TF32
    # Buffers of a step are megabytes: taken from the system anew each time, their page faults cost more than the sums.
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
}
"""Must be set before the process starts (the allocator's part) or imports vllm (the rest)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine.

    Raises:
        ValueError: a missing checkpoint, an architecture that is not supported, an impossible size.
    """

    model: str
    """A checkpoint folder."""
    max_model_len: int
    dtype: str = "float32"
    kv_cache_bytes: int = 256 << 20
    max_num_seqs: int = 128
    max_batched_tokens: int = 4096
    """Tokens of one step; longer prompts are computed in chunks."""
    seed: int = 0

    def __post_init__(self) -> None:
        policy = read_config(self.model)
        architecture = policy.get("architectures", [None])[0]
        if architecture not in SUPPORTED:
            names = ", ".join(SUPPORTED)
            raise ValueError(f"{self.model} holds {architecture}, which is not supported; use one of {names}")
        longest = policy.get("max_position_embeddings", self.max_model_len)
        if self.max_model_len > longest:
            raise ValueError(
                f"max_model_len is {self.max_model_len}, but {self.model} has max_position_embeddings = {longest}; "
                "lower the window (rollout.max_len in a run)"
            )
        for name in ("max_model_len", "kv_cache_bytes", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens must be at least max_num_seqs = {self.max_num_seqs}, got {self.max_batched_tokens}"
            )


def read_config(model: str) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        ValueError: there is none.
    """
    path = Path(model) / "config.json"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {model}: config.json is missing")
    return json.loads(path.read_text())


class Engine:
    """A continuous batch: add requests at any time, step while busy.

    Importing vllm takes seconds and reads the environment, so it happens here and not above.
    """

    def __init__(self, config: EngineConfig):
        os.environ.update(ENVIRONMENT if torch.cuda.is_available() else ENVIRONMENT | CPU_ENVIRONMENT)
        from vllm import LLM

        from trimtab.rollout.engine import plugin, weights

        plugin.register()
        policy = read_config(config.model)
        eos = policy.get("eos_token_id")
        self.config, self.version = config, 0
        self._stop = [] if eos is None else [eos] if isinstance(eos, int) else eos
        self._moe_layers = moe_layers(policy)
        self._experts_per_token = policy.get("num_experts_per_tok", 0)
        self._running: set[str] = set()
        self._count = 0
        self._llm = LLM(
            model=config.model,
            skip_tokenizer_init=True,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_batched_tokens,
            kv_cache_memory_bytes=config.kv_cache_bytes,
            seed=config.seed,
            enforce_eager=True,
            enable_prefix_caching=True,
            enable_chunked_prefill=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            enable_return_routed_experts=bool(self._moe_layers),
            weight_transfer_config={"backend": weights.BACKEND},
            **options(policy["architectures"][0]),
            **_device_options(),
        )
        self._llm.init_weight_transfer_engine({"init_info": {}})

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._running)

    def add(self, request: Request) -> str:
        """Queue a request and return the key under which step will return its completions.

        Raises:
            ValueError: its prompt leaves no room for a token, or its routes_start is wrong.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        length, sampling = len(request.prompt_ids), request.sampling
        room = self.config.max_model_len - length
        if not length or room < 1:
            raise ValueError(
                f"{request.name}: a prompt of {length} tokens does not fit max_model_len = {self.config.max_model_len}"
            )
        if not 0 <= request.routes_start < length:
            raise ValueError(f"{request.name}: routes_start must lie in [0, {length}), got {request.routes_start}")
        params = SamplingParams(
            n=request.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=min(sampling.max_tokens or room, room),
            seed=request.seed,
            logprobs=0,
            flat_logprobs=True,
            stop_token_ids=self._stop,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            routed_experts_prompt_start=request.routes_start,
        )
        self._count += 1
        key = f"{self._count} {request.name}"
        self._llm.llm_engine.add_request(key, {"prompt_token_ids": list(request.prompt_ids)}, params)
        self._running.add(key)
        return key

    def step(self) -> list[tuple[str, list[Completion]]]:
        """Compute one token of each running sequence; return the keys of the requests that it
        finished, with their completions."""
        finished = []
        for output in self._llm.llm_engine.step():
            if output.finished:
                self._running.remove(output.request_id)
                outputs = sorted(output.outputs, key=lambda o: o.index)
                finished.append((output.request_id, [self._completion(o) for o in outputs]))
        return finished

    def load_weights(self, weights: Mapping[str, Any] | Iterable[tuple[str, Any]], version: int) -> None:
        """Copy weights into the model and forget what was cached under the old ones.

        Args:
            weights: tensors or arrays by the names transformers gives them; those left out stay.

        Raises:
            ValueError: requests are unfinished, or a name or shape does not fit.
        """
        if self.busy:
            raise ValueError(f"{len(self._running)} requests are unfinished; load weights between requests")
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        tensors = [(name, torch.as_tensor(weight)) for name, weight in pairs]
        self._drain()
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"weights": tensors}})
        self._llm.finish_weight_update(weight_version=str(version))
        assert self._llm.reset_prefix_cache()
        self.version = version

    def _drain(self) -> None:
        """Finish the step that a GPU began ahead, for sequences that ended meanwhile: it holds blocks of the cache."""
        core = self._llm.llm_engine.engine_core.engine_core
        while core.batch_queue:
            self._llm.llm_engine.step()

    def close(self) -> None:
        """Shut the engine down; nothing of it stays behind."""
        self._llm.llm_engine.engine_core.shutdown()

    def _completion(self, output: Any) -> Completion:
        """What vLLM returned, as arrays. Nothing is checked here: a Segment refuses what is missing."""
        kept = [] if output.sampling_mask is None else output.sampling_mask.token_ids
        if not self._moe_layers:
            routes = np.zeros((0, 0, 0), np.uint8)
        elif output.routed_experts is None:
            routes = np.zeros((0, len(self._moe_layers), self._experts_per_token), np.uint8)
        else:
            routes = output.routed_experts[:, self._moe_layers]
        return Completion(
            token_ids=np.array(output.token_ids, np.int32),
            logp=np.array(output.logprobs.logprobs if output.logprobs else [], np.float32),
            kept_ids=np.array([i for ids in kept for i in ids], np.int32),
            kept_offsets=np.cumsum([0, *map(len, kept)], dtype=np.int64),
            routes=routes,
            weight_version=self.version,
            finish="stop" if output.finish_reason == "stop" else "length",
        )


def _device_options() -> dict[str, Any]:
    """How kept sets are recorded here: by vLLM itself on a GPU, by our worker on a CPU."""
    if torch.cuda.is_available():
        # The cache's size is given, so this share need only be free at the start: others live on the same GPU.
        return {"return_sampling_mask": True, "gpu_memory_utilization": 0.01}
    from trimtab.rollout.engine.recording import RecordingCPUWorker, RecordingScheduler

    return {
        "worker_cls": f"{RecordingCPUWorker.__module__}.{RecordingCPUWorker.__qualname__}",
        "scheduler_cls": f"{RecordingScheduler.__module__}.{RecordingScheduler.__qualname__}",
    }
