"""Safetensors files of which single rows are read again and again, by memory map.

safetensors reads rows as well, and keeps one Python integer for each tensor or slice that it reads (32 bytes; seen in
0.5 to 0.8): five for every pair that a run visits, as long as the process lives. So it only checks the header here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.io.weight_files import check_weights, read_header

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class MappedTensors:
    """The tensors of a file by name.

    Raises ModelError as `check_weights` does, and KeyError for tensors of a type that this package does not write.
    """

    def __init__(self, file: Path) -> None:
        self.metadata = check_weights(file).metadata
        text = read_header(file)
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        content = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
        self._tensors: dict[str, Tensor] = {}
        for name, facts in header.items():
            dtype = _DTYPES[facts["dtype"]]
            first = (8 + len(text) + facts["data_offsets"][0]) // dtype.itemsize  # the library aligns what it writes
            self._tensors[name] = torch.empty(0, dtype=dtype).set_(content, first, facts["shape"])  # type: ignore[call-overload]

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, of which nothing is read."""
        return self._tensors[name].shape

    def read(self, name: str, *place: int | slice) -> Tensor:
        """What a tensor has at a place, copied: a view would take the whole file along to another process."""
        return self._tensors[name][place].clone()
