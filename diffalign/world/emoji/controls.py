"""Controls: a file of pairs with other labels, which a run on the true labels is compared with.

    python -m diffalign.world.emoji.controls --out shuffled.parquet
    python -m diffalign.world.emoji.controls --out flipped.parquet --labels flipped

Shuffled labels are those of the file, dealt out again at random: what a run gains on them, it gains from nothing.
Flipped labels are all wrong. Images, captions and scores stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.errors import DiffalignError, ExistingFileError
from diffalign.world.emoji import pairs_path

Labels = Literal["shuffled", "flipped"]


def write_control(
    out: str | Path, pairs: str | Path, labels: Labels = "shuffled", seed: int = 0, *, overwrite: bool = False
) -> Path:
    """Writes the parquet file `pairs` with other labels to `out` and returns it; `seed` is for the shuffle.

    Raises DiffalignError for other labels and for a file without the columns label_0 and label_1, ExistingFileError
    for an `out` that is there (`overwrite` allows it).
    """
    out = Path(out)
    if labels not in ("shuffled", "flipped"):
        raise DiffalignError(f"labels is {labels!r}; it must be 'shuffled' or 'flipped'")
    if out.exists() and not overwrite:
        raise ExistingFileError(f"{out} exists; name another file, or overwrite it (--overwrite)")
    table = pq.read_table(pairs)
    missing = {"label_0", "label_1"} - set(table.column_names)
    if missing:
        raise DiffalignError(
            f"{pairs} has no column {min(missing)!r}; controls are made of pairs in Pick-a-Pic's columns"
        )
    first = table["label_0"].to_numpy()
    first = 1.0 - first if labels == "flipped" else np.random.default_rng(seed).permutation(first)
    for name, values in (("label_0", first), ("label_1", 1.0 - first)):
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, out, compression="zstd", row_group_size=pq.ParquetFile(pairs).metadata.row_group(0).num_rows)
    return out


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m diffalign.world.emoji.controls", description="write pairs with shuffled or flipped labels"
    )
    parser.add_argument("--out", required=True, help="a .parquet file")
    parser.add_argument("--pairs", type=Path, help="pairs in Pick-a-Pic's columns; the committed ones by default")
    parser.add_argument("--labels", choices=("shuffled", "flipped"), default="shuffled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    a = parser.parse_args()
    print(f"written: {write_control(a.out, a.pairs or pairs_path(), a.labels, a.seed, overwrite=a.overwrite)}")


if __name__ == "__main__":
    main()
