"""How many bytes of tensors are alive while code runs, on fake or meta tensors as on real ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, counts the storages that operations make, until nobody refers to them any more.

    What a kernel takes for itself while it runs is not seen. A storage that several tensors share counts once.

    Attributes:
        now: bytes that are alive.
        most: the most since it was made, or since `restart`.

    Args:
        known: tensors whose memory does not count: it was there before.
        granule: storages take a multiple of so many bytes.
    """

    def __init__(self, known: Iterable[Tensor] = (), granule: int = 64) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.most = 0
        self._granule = granule
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in known:
            self._seen.add(tensor.untyped_storage())

    def restart(self) -> int:
        """Return the most so far, and look for it anew from now on."""
        most, self.most = self.most, self.now
        return most

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        num_bytes = -(-storage.nbytes() // self._granule) * self._granule
        self._seen.add(storage)
        self.now += num_bytes
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, num_bytes).atexit = False

    def _forget(self, num_bytes: int) -> None:
        self.now -= num_bytes
