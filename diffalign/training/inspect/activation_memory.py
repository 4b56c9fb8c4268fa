"""How much memory a forward leaves behind for its backward, counted without a GPU.

Autograd's saved-tensor hooks do not see what gradient checkpointing saves. So this counts storages: every one that an
operation of the forward made and that is still alive when the backward begins. It works on any device, `meta` included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class SavedForBackward(TorchDispatchMode):
    """Bytes alive at the beginning of a backward pass; of several, those of the largest.

    A compiled block runs uncompiled within it.
    """

    def __init__(self, weights: Iterable[nn.Parameter] = ()) -> None:
        """Copies of `weights` in another dtype are counted apart: they are the same for every batch."""
        super().__init__()
        self.bytes = 0  # grows with the number of images and their size
        self.casts = 0  # weights in autocast's dtype
        self._shapes = {shape for p in weights if p.ndim > 1 for shape in (p.shape, p.shape[::-1])}
        self._made: dict[int, tuple[StorageWeakRef, int, bool]] = {}
        self._backward = False  # there was one: what is made after the last is an optimiser's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._current_graph_task_id() != -1:
            self._backward = True
            self._count()
            return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        given = None  # storages of the arguments, asked for only where there is an answer with one
        for x in _tensors((out,)):
            if given is None:
                given = {a.untyped_storage()._cdata for a in _tensors((*args, *(kwargs or {}).values()))}
            storage = x.untyped_storage()
            if storage._cdata not in given:
                cast = func is torch.ops.aten._to_copy.default and x.shape in self._shapes
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), cast)
        return out

    def __exit__(self, *error: Any) -> None:
        if not self._backward:
            self._count()
        super().__exit__(*error)

    def _count(self) -> None:
        """Counts the storages that are alive, once for each forward."""
        if not self._made:
            return
        sizes = {True: 0, False: 0}
        for reference, size, cast in self._made.values():
            if not reference.expired():
                sizes[cast] += size
        self._made.clear()
        self.bytes, self.casts = max(self.bytes, sizes[False]), max(self.casts, sizes[True])


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or answers, also those in lists and tuples: there is nothing else."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
