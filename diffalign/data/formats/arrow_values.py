"""Values of an Arrow column as Python objects, whatever its text is encoded in."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from diffalign.data.cells import Absent


def plain(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; text that is not UTF-8 (Parquet does not check) has lone surrogates for its bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar):
            return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        return Absent("a string in it is not UTF-8; write UTF-8")
