"""Tensors whose bytes lie in host memory while nobody needs them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, UntypedStorage

from trimtab.grpo.policy.shard import local


class Shelf:
    """A place in host memory for tensors of a GPU. They stay the same objects: only their memory comes and goes."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, constant: bool = False) -> None:
        """tensors: what may rest, asked anew each time because an optimiser makes its state late; constant: their bytes
        never change, so they are copied to the host once."""
        self._tensors, self._constant = tensors, constant
        self._copies: dict[UntypedStorage, Tensor] = {}
        self.resting = False

    def rest(self) -> None:
        """Move everything to pinned host memory."""
        if self.resting:
            return
        all_storages = dict.fromkeys(local(tensor).untyped_storage() for tensor in self._tensors())
        storages = [storage for storage in all_storages if storage.resizable()]  # a file mapped on a CPU is not
        known, self._copies = self._copies, {}
        for storage in storages:
            fresh = storage not in known
            self._copies[storage] = _room(storage) if fresh else known[storage]
            if fresh or not self._constant:
                self._copies[storage].copy_(_bytes(storage), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        for storage in storages:
            storage.resize_(0)
        self.resting = True

    def resume(self) -> None:
        """Move everything back. The host does not wait for it: what the device is given next comes behind it."""
        if not self.resting:
            return
        for storage, copy in self._copies.items():
            storage.resize_(len(copy))
            _bytes(storage).copy_(copy, non_blocking=True)
        self.resting = False

    @contextmanager
    def taken_down(self) -> Iterator[None]:
        """On the device inside, at rest behind."""
        self.resume()
        try:
            yield
        finally:
            self.rest()


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _room(storage: UntypedStorage) -> Tensor:
    return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
