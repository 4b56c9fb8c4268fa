"""How many draws of (t, ε) a pair needs: Diffusion-DPO on the embedded world with K repeated draws a pair, K × seeds.

    python benchmarks/draws_world.py --out runs/draws                          # everything
    python benchmarks/draws_world.py --out runs/draws --only "all" "K: 1"
    python benchmarks/draws_world.py --out runs/draws --table                  # the table of the results so far

A line is training_configs/world/dpo.yaml with `data.draws_per_pair` (and fewer pairs) from SETTINGS. It is trained
once for each seed and compared with the base on held-out prompts. Runs with repeated draws read the reference's errors
from a cache in OUT. This changes no result, not even in the last bit (tests/training/test_reference_errors.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from world_lines import main, packaged

# Name of a line -> what it changes. 300 steps of 32 pairs visit each of 1,024 pairs 9.4 times, each of 256 37.5 times.
SETTINGS: dict[str, dict[str, int]] = {
    "all": {},
    **{f"K: {k}": {"draws_per_pair": k} for k in (1, 2, 4, 8)},
    "256 pairs, all": {"max_pairs": 256},
    **{f"256 pairs, K: {k}": {"max_pairs": 256, "draws_per_pair": k} for k in (1, 4, 16)},
}


def described(setting: str) -> dict[str, Any]:
    """The config of a line."""
    return packaged("dpo", [f"data.{key}={value}" for key, value in SETTINGS[setting].items()])


def cached(trained: dict[str, Any], out: Path) -> dict[str, Any]:
    """A line's config with its latent cache, and the reference's errors where draws repeat."""
    data = trained["data"]
    folder = out / "cache" / str(data["max_pairs"] or "all")
    kept = data["draws_per_pair"] is not None
    return {**trained, "data": {**data, "cache_dir": str(folder), "cache_reference_errors": kept}}


if __name__ == "__main__":
    main(__doc__, list(SETTINGS), described, None, cached)
