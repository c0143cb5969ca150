"""The trainer's weights on their way to an engine: cut into chunks, laid into memory that both map, checked by sums.

Two routes: "ipc", a buffer on the GPU that trainer and engines share; "store", arrays in shared memory of the host.
The receiving end is receive.py; nothing here needs vllm.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

CHUNK_BYTES = 256 << 20
"""Of one transfer: large against the cost of an exchange, small against a GPU."""
ALIGNMENT = 16  # bytes: a tensor's element size must divide where it begins

Named = tuple[str, Tensor]
Array = tuple[str, str, tuple[int, ...], np.ndarray]
"""Name, dtype, shape, bytes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor lies in a buffer of bytes."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    size: int


def layout_of(pairs: Iterable[Named]) -> Layout:
    """Lay tensors one behind another, each at a multiple of ALIGNMENT."""
    names, dtypes, shapes, offsets, end = [], [], [], [], 0
    for name, tensor in pairs:
        names.append(name)
        dtypes.append(_dtype_name(tensor.dtype))
        shapes.append(tuple(tensor.shape))
        offsets.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(names), tuple(dtypes), tuple(shapes), tuple(offsets), end)


def views(buffer: Tensor, layout: Layout) -> list[Named]:
    """The tensors in a buffer of bytes; they share its memory."""
    pairs = []
    for name, dtype, shape, offset in zip(layout.names, layout.dtypes, layout.shapes, layout.offsets, strict=True):
        kind = getattr(torch, dtype)
        size = int(np.prod(shape)) * kind.itemsize
        pairs.append((name, buffer[offset : offset + size].view(kind).view(shape)))
    return pairs


def chunks(pairs: Iterable[Named], limit: int = CHUNK_BYTES) -> Iterator[list[Named]]:
    """Gather tensors into lists of at most limit bytes.

    A stack of experts that is larger goes one by one; any other tensor that is larger goes alone.
    """
    chunk: list[Named] = []
    total = 0
    for name, tensor in _divided(pairs, limit):
        if chunk and total + tensor.nbytes + ALIGNMENT > limit:
            yield chunk
            chunk, total = [], 0
        chunk.append((name, tensor))
        total += tensor.nbytes + ALIGNMENT
    if chunk:
        yield chunk


def _divided(pairs: Iterable[Named], limit: int) -> Iterator[Named]:
    for pair in pairs:
        yield from one_by_one([pair]) if pair[1].nbytes > limit else [pair]


def one_by_one(pairs: Iterable[Named]) -> Iterator[Named]:
    """Weights by a checkpoint's names: a trainer's stacked experts become one weight an expert."""
    for name, weight in pairs:
        before, _, projection = name.partition(".experts.")
        if projection == "gate_up_proj":
            for i, (gate, up) in enumerate(one.chunk(2) for one in weight):
                yield f"{before}.experts.{i}.gate_proj.weight", gate
                yield f"{before}.experts.{i}.up_proj.weight", up
        elif projection == "down_proj":
            yield from ((f"{before}.experts.{i}.down_proj.weight", one) for i, one in enumerate(weight))
        else:
            yield name, weight


class SharedBuffer:
    """Memory of a GPU that the engines on it map: filled, read by all of them, filled again.

    Each reader gets a handle of its own, which it opens once and closes at the end of the update: the count of the
    readers decides when the memory is free. The trainer must not use expandable segments, which cannot be shared so.
    """

    def __init__(self, readers: int):
        self._readers = readers
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.handles: list[tuple[Any, ...]] = []
        """What rebuild_cuda_tensor takes, for each reader."""

    def fill(self, pairs: list[Named]) -> Layout:
        """Copy tensors in and wait until they are there; no reader may still read what was there before."""
        layout = layout_of(pairs)
        if layout.size > len(self._buffer):
            size = max(layout.size, CHUNK_BYTES)
            self._buffer = torch.empty(size, dtype=torch.uint8, device=pairs[0][1].device)
            self.handles = [reduce_tensor(self._buffer)[1] for _ in range(self._readers)]
        for (_, target), (_, source) in zip(views(self._buffer, layout), pairs, strict=True):
            target.copy_(source.detach(), non_blocking=True)
        torch.accelerator.current_stream().synchronize()
        return layout


def to_arrays(pairs: Iterable[Named]) -> list[Array]:
    """Tensors as bytes in host memory, which travel between processes without being pickled."""
    arrays = []
    for name, tensor in pairs:
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        arrays.append((name, _dtype_name(tensor.dtype), tuple(tensor.shape), flat.numpy()))
    return arrays


def to_tensors(arrays: Iterable[Array]) -> list[Named]:
    """What to_arrays was given; the memory stays where it is and must not be written."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return [(n, torch.from_numpy(data).view(getattr(torch, d)).view(shape)) for n, d, shape, data in arrays]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_group(name: str) -> str:
    """The part of the model a weight belongs to: embed, layers.3.attention, layers.3.mlp, layers.3.norm, norm, head."""
    layer = re.search(r"layers\.(\d+)\.(\w+)", name)
    if layer:
        part = layer[2]
        kind = "norm" if part.endswith("norm") else "attention" if "attn" in part else "mlp"
        return f"layers.{layer[1]}.{kind}"
    known = {"embed_tokens": "embed", "lm_head": "head", "norm": "norm"}
    return next((group for part, group in known.items() if part in name.split(".")), name)


@torch.no_grad()
def checksums(pairs: Iterable[Named]) -> dict[str, float]:
    """The sum of the weights of each group, in float64.

    Weights that an engine holds fused (queries, keys and values; gate and up; experts) sum as their parts do, up to
    rounding. Give the weights in the engine's dtype. A group of which a weight cannot be read (it is empty: a CPU has
    packed it) is left out.
    """
    sums: dict[str, Tensor] = {}
    unreadable = set()
    for name, tensor in pairs:
        group = tensor_group(name)
        if not tensor.numel():
            unreadable.add(group)
            continue
        part = tensor.detach().sum(dtype=torch.float64)
        sums[group] = sums[group] + part if group in sums else part
    return {group: float(total) for group, total in sums.items() if group not in unreadable}


def differing(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[str]:
    """The groups known to both whose sums differ by more than the order of a float64 sum explains."""
    both = [group for group in ours if group in theirs]
    return [g for g in both if not abs(ours[g] - theirs[g]) <= 1e-6 + 1e-9 * abs(ours[g])]
