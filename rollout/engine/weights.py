"""The trainer's weights on their way to an engine: cut into chunks, laid into memory that both map, checked by sums.

Two routes: "ipc", a buffer on the GPU that trainer and engines share; "store", arrays in shared memory of the host.
The receiving end is receive.py; nothing here needs vllm.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
Handle = tuple[Any, ...]
"""What torch's rebuild_cuda_tensor takes; the device's number is the sender's."""


@dataclass(slots=True)
class Layout:
    """Where each tensor lies in a buffer of bytes, one behind another."""

    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    size: int = 0

    def add(self, name: str, tensor: Tensor) -> int:
        """Reserve room for a tensor and return where it begins."""
        offset = self.size
        self.names.append(name)
        self.dtypes.append(_dtype_name(tensor.dtype))
        self.shapes.append(tuple(tensor.shape))
        self.offsets.append(offset)
        self.size += room(tensor)
        return offset


def room(tensor: Tensor) -> int:
    """Bytes that a tensor takes up in a buffer."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def views(buffer: Tensor, layout: Layout) -> list[Named]:
    """The tensors in a buffer of bytes; they share its memory."""
    pairs = []
    for name, dtype, shape, offset in zip(layout.names, layout.dtypes, layout.shapes, layout.offsets, strict=True):
        kind = getattr(torch, dtype)
        size = math.prod(shape) * kind.itemsize
        pairs.append((name, buffer[offset : offset + size].view(kind).view(shape)))
    return pairs


def put(buffer: Tensor, layout: Layout, name: str, tensor: Tensor) -> None:
    """Copy a tensor behind those that are in the buffer."""
    offset = layout.add(name, tensor)
    target = buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    target.copy_(tensor.detach(), non_blocking=True)


def fill(source: Iterable[Named], allocate: Callable[[int], Tensor], size: int) -> Iterator[tuple[Tensor, Layout]]:
    """Copy tensors into a buffer as they come, and give it out each time that it is full.

    A source may take a tensor back when the next one is asked for. A stack of experts that does not fit goes one by
    one; for any other tensor that does not fit, a larger buffer is allocated.

    Args:
        allocate: makes a buffer of so many bytes.
        size: of the first buffer; it is made when the first tensor is there.
    """
    buffer, layout = None, Layout()
    for pair in source:
        for name, tensor in one_by_one([pair]) if room(pair[1]) > size else [pair]:
            if layout.size and layout.size + room(tensor) > size:
                assert buffer is not None
                yield buffer, layout
                layout = Layout()
            if buffer is None or room(tensor) > len(buffer):
                size = max(size, room(tensor))
                buffer = allocate(size)
            put(buffer, layout, name, tensor)
    if buffer is not None:
        yield buffer, layout


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


def shared_chunks(source: Iterable[Named], readers: int) -> Iterator[tuple[Layout, list[Handle]]]:
    """Weights in memory that engines on this GPU can map: a chunk's layout, and the memory's handle for each reader.

    A reader opens its handle once and closes it at the end of the update: the count of the readers decides when the
    memory is free. All have read a chunk before the next is asked for. The trainer must not use expandable segments,
    which cannot be shared so.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    exported: list[Handle] = []

    def allocate(size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        exported[:] = [reduce_tensor(buffer)[1] for _ in range(readers)]
        return buffer

    for _, layout in fill(source, allocate, CHUNK_BYTES):
        torch.cuda.current_stream().synchronize()
        yield layout, list(exported)


def to_arrays(pairs: Iterable[Named]) -> list[Array]:
    """Tensors copied to bytes in host memory, which travel between processes without being pickled."""
    arrays = []
    for name, tensor in pairs:
        here = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        flat = here.view(-1).view(torch.uint8)
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
    """The part of the model a weight belongs to: embed, layers.3.attention, layers.3.mlp, layers.3.router,
    layers.3.norm, norm, head."""
    layer = re.search(r"layers\.(\d+)\.(\w+)(\.gate\.)?", name)
    if layer:
        part = layer[2]
        kind = "norm" if part.endswith("norm") else "attention" if "attn" in part else "router" if layer[3] else "mlp"
        return f"layers.{layer[1]}.{kind}"
    known = {"embed_tokens": "embed", "lm_head": "head", "norm": "norm"}
    return next((group for part, group in known.items() if part in name.split(".")), name)


@torch.no_grad()
def checksums(pairs: Iterable[Named]) -> dict[str, float]:
    """The sum of the weights of each group, in float64.

    Weights that an engine holds fused (queries, keys and values; gate and up; experts) sum as their parts do, up to
    rounding; an engine that rounds a router which the trainer keeps in float32 differs in that group. A group of which
    a weight cannot be read (it is empty: a CPU has packed it) is left out.
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
