"""What our workers tell beyond vLLM's: where the time of a start went, and the sums of their weights."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from trimtab.rollout.engine.weights import checksums

START = {
    "init_device": "device",
    "load_model": "model",
    "determine_available_memory": "first run",
    "initialize_from_config": "cache",
    "compile_or_warm_up_model": "warm-up",
}
DERIVED = (".W_UV", ".W_UK_T")
"""What vLLM's latent attention computes with: copies of kv_b_proj."""


def reporting(worker: Any) -> Any:
    """A worker class of vLLM that times its start and sums its weights."""

    class Reporting(worker):
        def start_seconds(self) -> dict[str, float]:
            parts = vars(self)["_seconds"]
            graphs = parts.get("graphs", 0.0)  # captured during the warm-up
            return parts | {"warm-up": parts["warm-up"] - graphs}

        def watch_selection(self) -> None:
            for layer in self.model_runner.get_model().model.layers:
                layer.self_attn.watched = []

        def selection(self, length: int) -> np.ndarray:
            layers = self.model_runner.get_model().model.layers
            return np.stack([np.packbits(layer.self_attn.selected(length).cpu().numpy(), axis=-1) for layer in layers])

        def checksums(self) -> dict[str, float]:
            seen: set[int] = set()
            pairs = []
            for name, weight in self.model_runner.get_model().named_parameters():
                if name.endswith(DERIVED):
                    continue
                if not weight.numel() or weight.data_ptr() not in seen:  # a tied head counts once
                    seen.add(weight.data_ptr())
                    pairs.append((name, weight))
            return checksums(pairs)

    for method, part in START.items():
        setattr(Reporting, method, _timed(part, getattr(worker, method)))
    return Reporting


@contextmanager
def watch(worker: Any, part: str) -> Iterator[None]:
    """Note the seconds of a part of a worker's start."""
    started = time.perf_counter()
    yield
    vars(worker).setdefault("_seconds", {})[part] = time.perf_counter() - started


def _timed(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with watch(self, part):
            return method(self, *args, **kwargs)

    return run
