"""One vLLM engine in this process: requests in, completions with everything the sampler knew out."""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.rollout.checkpoint import moe_layers, read_config, stop_ids
from trimtab.rollout.engine.architectures import CPU_ENVIRONMENT, DSA, SUPPORTED, options
from trimtab.rollout.engine.sequences import Running, SequenceRecord
from trimtab.rollout.engine.weights import Array, Handle, Layout, Named, to_tensors
from trimtab.rollout.types import POSITIONS, Completion, Request, Sampling

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_DEEP_GEMM": "0",  # kernels for quantised weights, of which there are none
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it keeps no sets
    "HF_HUB_OFFLINE": "1",  # a checkpoint is a folder here
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
    graphs: bool = False
    """Decode in CUDA graphs; needs a GPU."""
    sleep: bool = False
    """Whether the engine can rest with its GPU memory given back; needs a GPU."""
    keep_selection: bool = False
    """Record which keys the indexers select."""
    prefix_caching: bool = True
    """Keep what was computed of a prompt for others that begin alike."""
    stop_ids: tuple[int, ...] | None = None
    """Ids that end a turn; None: those of the checkpoint."""
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
        if self.keep_selection and architecture not in DSA:
            raise ValueError(f"keep_selection records what indexers select, and {architecture} has none")
        if self.keep_selection and self.max_model_len > POSITIONS:
            raise ValueError(
                f"keep_selection records positions in 16 bits: max_model_len is at most {POSITIONS}, got "
                f"{self.max_model_len}"
            )
        for name in ("max_model_len", "kv_cache_bytes", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens must be at least max_num_seqs = {self.max_num_seqs}, got {self.max_batched_tokens}"
            )


class Engine:
    """A continuous batch: add requests at any time, step while busy.

    Speaks with vLLM's engine core directly: its front end turns every recorded array into lists, token by token.
    Importing vllm takes seconds and reads the environment, so it happens here and not above.

    Raises:
        ValueError: graphs or sleep without a GPU.
    """

    def __init__(self, config: EngineConfig):
        check_device(config, on_gpu=torch.cuda.is_available())
        started = time.perf_counter()
        os.environ.update(ENVIRONMENT if torch.cuda.is_available() else ENVIRONMENT | CPU_ENVIRONMENT)
        from vllm import LLM

        from trimtab.rollout.engine import plugin, receive
        from trimtab.rollout.engine.dsa import recording

        plugin.register()
        policy = read_config(config.model)
        if policy["architectures"][0] not in DSA:
            plugin.resolve(policy["architectures"][0])
        imported = time.perf_counter()
        self.config, self.version, self.asleep = config, 0, False
        self._stop = list(stop_ids(config.model) if config.stop_ids is None else config.stop_ids)
        self._moe_layers = moe_layers(policy)
        self._experts_per_token = policy.get("num_experts_per_tok", 0)
        self._running: dict[str, tuple[Running, SequenceRecord]] = {}
        self._count = self._looks = 0
        self._topk = policy.get("index_topk")
        keys = int(policy["index_topk"]) if config.keep_selection else 0
        self._selects = (policy["num_hidden_layers"], keys) if keys else (0, 0)
        self._llm = LLM(
            model=config.model,
            skip_tokenizer_init=True,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_batched_tokens,
            kv_cache_memory_bytes=config.kv_cache_bytes,
            seed=config.seed,
            enable_prefix_caching=config.prefix_caching,
            enable_chunked_prefill=True,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            enable_return_routed_experts=bool(self._moe_layers or keys),
            additional_config={recording.KEYS: keys},
            weight_transfer_config={"backend": receive.BACKEND},
            **options(policy["architectures"][0]),
            **_graph_options(config),
            **_device_options(config),
        )
        self._core = self._llm.llm_engine.engine_core
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self._llm.update_weight_version(str(self.version))
        self.start_seconds = {"imports": imported - started, **self._llm.collective_rpc("start_seconds")[0]}
        """Where the time of the start went."""
        known = sum(self.start_seconds.values())
        self.start_seconds["rest"] = time.perf_counter() - started - known

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._running)

    def add(self, request: Request, *, salt: str | None = None) -> str:
        """Queue a request and return the key under which step will return its completions.

        Args:
            salt: prefixes are shared with requests of the same salt; None: with all under the same weights.

        Raises:
            ValueError: its prompt leaves no room for a token, or its routes_start is wrong.
        """
        from vllm.v1.engine import EngineCoreRequest

        length = len(request.prompt_ids)
        room = self.config.max_model_len - length
        if not length or room < 1:
            raise ValueError(
                f"{request.name}: a prompt of {length} tokens does not fit max_model_len = {self.config.max_model_len}"
            )
        if not 0 <= request.routes_start < length:
            raise ValueError(f"{request.name}: routes_start must lie in [0, {length}), got {request.routes_start}")
        self._count += 1
        running = Running(f"{self._count} {request.name}", [SequenceRecord() for _ in range(request.n)])
        for i, record in enumerate(running.records):
            key = f"{self._count}.{i}"
            self._core.add_request(
                EngineCoreRequest(
                    request_id=key,
                    prompt_token_ids=list(request.prompt_ids),
                    mm_features=None,
                    sampling_params=self._sampling_params(replace(request, seed=request.seed + i), room),
                    pooling_params=None,
                    arrival_time=time.time(),
                    lora_request=None,
                    cache_salt=salt or str(self.version),  # what other weights cached is never found
                    data_parallel_rank=None,
                )
            )
            self._running[key] = running, record
        return running.key

    def _sampling_params(self, request: Request, room: int) -> Any:
        from vllm import SamplingParams

        sampling = request.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=min(sampling.max_tokens or room, room),
            seed=request.seed,
            logprobs=0,
            stop_token_ids=self._stop,
            detokenize=False,
            routed_experts_prompt_start=request.routes_start,
        )

    def step(self) -> list[tuple[str, list[Completion]]]:
        """Compute one token of each running sequence; return the keys of the requests that it
        finished, with their completions."""
        finished = []
        for output in self._core.get_output().outputs:
            running, record = self._running[output.request_id]
            record.add(output)
            if record.finish is not None:
                del self._running[output.request_id]
                if all(one.finish is not None for one in running.records):
                    finished.append((running.key, [self._completion(one) for one in running.records]))
        return finished

    def _completion(self, record: SequenceRecord) -> Completion:
        return record.completion(
            layers=self._moe_layers,
            experts_per_token=self._experts_per_token,
            selects=self._selects,
            version=self.version,
        )

    def load_weights(self, weights: Mapping[str, Any] | Iterable[Named], version: int) -> None:
        """Copy weights into the model.

        Args:
            weights: tensors by the names transformers gives them; those left out stay.

        Raises:
            ValueError: requests are unfinished, or a name or shape does not fit.
        """
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        tensors = [(name, torch.as_tensor(weight)) for name, weight in pairs]
        self.begin_update()
        self._receive({"weights": tensors})
        self.finish_update(version)

    def begin_update(self) -> None:
        """Make ready for chunks of weights.

        Raises:
            ValueError: requests are unfinished.
        """
        if self.busy:
            raise ValueError(f"{len(self._running)} sequences are unfinished; load weights between requests")
        self._drain()
        self._llm.start_weight_update()

    def receive_shared(self, layout: Layout, handle: Handle) -> None:
        """Load a chunk from a buffer that this GPU shares; afterwards it may be filled anew.

        Raises:
            ValueError: a name or shape does not fit; the update is over.
        """
        self._receive({"layout": layout, "handle": handle})

    def receive_stored(self, arrays: Iterable[Array]) -> None:
        """Load a chunk of arrays of this host; raises as receive_shared does."""
        self._receive({"weights": to_tensors(arrays)})

    def _receive(self, update: dict[str, Any]) -> None:
        self._llm.update_weights({"update_info": update})

    def finish_update(self, version: int) -> None:
        """All chunks are there: sample with them from now on, under this version."""
        self._llm.finish_weight_update(weight_version=str(version))
        self.version = version

    def weight_version(self) -> int:
        """The version of the weights, as vLLM has it."""
        return int(self._llm.get_weight_version())

    def checksums(self) -> dict[str, float]:
        """The sum of the weights of each tensor group (weights.checksums), as they lie in this engine."""
        return self._llm.collective_rpc("checksums")[0]

    def selection(self, token_ids: tuple[int, ...]) -> np.ndarray:
        """The keys that the indexers select for a sequence, for queries from position index_topk on.

        Returns:
            Bits of booleans [layers, N - index_topk, N], packed along the keys (np.packbits).

        Raises:
            ValueError: a model without indexers, requests that are unfinished, a sequence no longer than index_topk.
        """
        if not self._topk or len(token_ids) <= self._topk:
            raise ValueError(f"{len(token_ids)} tokens and index_topk = {self._topk}: nothing is selected")
        if self.busy:
            raise ValueError(f"{len(self._running)} sequences are unfinished; look at the selection between requests")
        self._drain()
        self._llm.collective_rpc("watch_selection")
        self._looks += 1
        self.add(
            Request(name="selection", prompt_ids=token_ids, sampling=Sampling(max_tokens=1)),
            salt=f"{self.version} selection {self._looks}",  # computed as a whole
        )
        while self.busy:
            self.step()
        self._drain()
        return self._llm.collective_rpc("selection", args=(len(token_ids),))[0]

    def sleep(self) -> None:
        """Give the GPU memory back: weights wait in host memory, the cache is dropped.

        Raises:
            ValueError: the engine was not made to sleep, or requests are unfinished.
        """
        if not self.config.sleep:
            raise ValueError("this engine cannot sleep; make it with sleep=True")
        if self.busy:
            raise ValueError(f"{len(self._running)} sequences are unfinished; an engine sleeps between requests")
        self._drain()
        self._llm.sleep(level=1)
        self.asleep = True

    def wake(self, what: str) -> None:
        """Take GPU memory again, for "weights" and then for the "kv_cache"; with both the engine can serve.

        Safe to repeat. The addresses are those from before, so graphs stay valid.
        """
        core = self._core.engine_core.model_executor
        if what in core.sleeping_tags:
            self._llm.wake_up(tags=[what])
        self.asleep = bool(core.sleeping_tags)

    def _drain(self) -> None:
        """Finish the step that a GPU began ahead for sequences that ended meanwhile: it reads weights and cache."""
        while self._core.engine_core.batch_queue:
            self._core.get_output()

    def close(self) -> None:
        """Shut the engine down; nothing of it stays behind."""
        self._core.shutdown()


def check_device(config: EngineConfig, *, on_gpu: bool) -> None:
    """Raises ValueError where a config needs a GPU and there is none."""
    for name in ("graphs", "sleep"):
        if getattr(config, name) and not on_gpu:
            raise ValueError(f"{name}=True needs a GPU, and this engine has none; leave {name} out")


def weight_bytes(config: EngineConfig) -> int:
    """Bytes of a policy's weights in an engine, read off the checkpoint's files."""
    stored = str(read_config(config.model).get("dtype") or read_config(config.model).get("torch_dtype") or "float32")
    files = sum(file.stat().st_size for file in Path(config.model).glob("*.safetensors"))
    return files * getattr(torch, config.dtype).itemsize // getattr(torch, stored).itemsize


def capture_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes with a CUDA graph: a batch is padded by an eighth at most beyond 64 sequences, by 7 below.

    Each costs a fraction of a second at the start and some memory.
    """
    sizes = [size for size in (1, 2, 4, 8) if size < max_num_seqs]
    while sizes and sizes[-1] >= 8:
        step = max(8, (1 << sizes[-1].bit_length() - 1) // 8)
        if sizes[-1] + step >= max_num_seqs:
            break
        sizes.append(sizes[-1] + step)
    return [*sizes, max_num_seqs]


def _graph_options(config: EngineConfig) -> dict[str, Any]:
    """Whole decoding steps in graphs, prompts eager; nothing is compiled, so a start takes seconds."""
    if not torch.cuda.is_available():  # vLLM's CPU rotation pairs neighbours wrongly, as in DeepSeek-V3
        return {"enforce_eager": True, "compilation_config": {"custom_ops": ["-rotary_embedding"]}}
    if not config.graphs:
        return {"enforce_eager": True}
    return {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": capture_sizes(config.max_num_seqs),
        }
    }


def _device_options(config: EngineConfig) -> dict[str, Any]:
    """How kept sets are recorded here: by vLLM itself on a GPU, by our worker on a CPU."""
    if torch.cuda.is_available():
        return {
            "worker_cls": "trimtab.rollout.engine.gpu_worker.GpuWorker",
            "return_sampling_mask": True,
            "enable_sleep_mode": config.sleep,
            "enable_flashinfer_autotune": False,  # for kernels of quantised weights
            # The cache's size is given, so this share need only be free at the start: others live on the same GPU.
            "gpu_memory_utilization": 0.01,
        }
    return {
        "worker_cls": "trimtab.rollout.engine.recording.RecordingCPUWorker",
        "scheduler_cls": "trimtab.rollout.engine.recording.RecordingScheduler",
    }
