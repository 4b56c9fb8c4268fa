"""The peak memory of a computation, counted from its operations on any device, `meta` included."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Peak(TorchDispatchMode):
    """Bytes of the storages made within it and alive together, at most; forward, checkpoints' second one, backward.

    What an operation takes inside its kernel is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._at_most = 0  # what is alive, and what was when it was last looked for

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator and adds what it made."""
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in given:
                self._add(key, x.untyped_storage())
        if self._at_most > self.bytes:  # only then can the peak have risen
            self._made = {key: kept for key, kept in self._made.items() if not kept[0].expired()}
            self._at_most = sum(size for _, size in self._made.values())
            self.bytes = max(self.bytes, self._at_most)
        return out

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        before = self._made.get(key)
        if before is not None and not before[0].expired():
            return  # a view of what is counted
        self._at_most += storage.nbytes() - (before[1] if before else 0)
        self._made[key] = (StorageWeakRef(storage), storage.nbytes())
