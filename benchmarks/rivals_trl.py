"""One run of TRL for rivals.py: its GRPOTrainer with vLLM in the same process, a line of JSON a batch.

    python benchmarks/rivals_trl.py '{"model": FOLDER, "prompts": 32, ...}'

Without a GPU it samples with transformers, which proves that this file runs and measures nothing.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The parent's environment decides about the GPU; these are read at import.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_USE_DEEP_GEMM", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from rivals_task import BETA, MINIBATCHES, chances, question
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Stopwatch:
    """Seconds by part since the last batch; a call is timed with the GPU's work in it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, part: str, call: Callable[..., Any], when: Callable[[], bool] = lambda: True) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not when():
                return call(*args, **kwargs)
            synchronise()
            started = time.perf_counter()
            result = call(*args, **kwargs)
            synchronise()
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started
            return result

        return timed


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Report(TrainerCallback):
    """After the last optimiser step of a batch: its seconds, by part, and the tokens it sampled."""

    def __init__(self, watch: Stopwatch, tokens: list[int]) -> None:
        self.watch, self.tokens, self.started = watch, tokens, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        synchronise()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % MINIBATCHES:
            return
        synchronise()
        now = time.perf_counter()
        whole, found = now - self.started, self.watch.seconds
        # what its trainer needs is all but playing the batch, and of that the passes that score the samples
        update = whole - found.get("playing", 0.0) + found.get("scoring", 0.0)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        row = {"batch": whole, "generation": found.get("generation", 0.0), "weights": found.get("weights", 0.0)}
        print(json.dumps(row | {"update": update, "tokens": sum(self.tokens), "torch_gib": peak}), flush=True)
        self.started = now
        self.watch.seconds = {}
        self.tokens.clear()


def arguments(size: dict[str, Any], gpu: bool) -> GRPOConfig:
    micro, episodes = size["micro"], size["prompts"] * size["group"]
    vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": False,
        "vllm_gpu_memory_utilization": size["vllm_share"],
        "vllm_max_model_length": size["max_len"],
    }
    return GRPOConfig(
        output_dir="runs/rivals-trl",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=episodes // micro // MINIBATCHES,
        generation_batch_size=episodes,
        num_generations=size["group"],
        max_completion_length=size["tokens"],
        temperature=1.0,
        top_p=0.95,
        top_k=64,
        generation_kwargs={} if size["real"] or not gpu else {"ignore_eos": True},
        beta=BETA,
        learning_rate=1e-6,
        optim="adamw_torch_fused" if gpu else "adamw_torch",
        max_steps=size["batches"] * MINIBATCHES,
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=size["checkpointing"],
        use_liger_kernel=size["liger"],
        model_init_kwargs={"dtype": size["dtype"]},
        chat_template_kwargs={"enable_thinking": False},
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10_000,
        disable_tqdm=True,
        **(vllm if gpu else {}),
    )


def main() -> None:
    size = json.loads(sys.argv[1])
    gpu = torch.cuda.is_available()
    watch, tokens = Stopwatch(), []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.extend(map(len, completion_ids))
        return chances(size["group"]) * (len(completion_ids) // size["group"])

    rng = random.Random(0)
    prompts = [[{"role": "user", "content": question(rng)}] for _ in range(size["prompts"] * size["batches"])]
    tokenizer = AutoTokenizer.from_pretrained(size["model"], padding_side="left")
    trainer = GRPOTrainer(
        model=size["model"],
        reward_funcs=reward,
        args=arguments(size, gpu),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[Report(watch, tokens)],
    )
    trainer._generate_and_score_completions = watch.wrap("playing", trainer._generate_and_score_completions)
    trainer._get_per_token_logps_and_entropies = watch.wrap(
        "scoring", trainer._get_per_token_logps_and_entropies, when=lambda: not torch.is_grad_enabled()
    )
    if gpu:
        backend = trainer.vllm_generation
        backend.generate = watch.wrap("generation", backend.generate)
        backend.sync_weights = watch.wrap("weights", backend.sync_weights)
    trainer.train()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
