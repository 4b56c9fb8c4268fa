"""bfloat16 weights and 8-bit moments compared with float32 weights: Diffusion-DPO on the embedded world, × seeds.

    python benchmarks/optimizers_world.py --out runs/optimizers                # everything
    python benchmarks/optimizers_world.py --out runs/optimizers --table        # the table of the results so far

A line is training_configs/world/dpo.yaml in bf16 with another optimiser, trained once for each seed and compared with
the base on held-out prompts. Seconds are of a CPU without bfloat16 arithmetic.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from world_lines import main, packaged

SETTINGS = ("adamw", "adamw_bf16", "adamw_8bit_bf16")


def described(setting: str) -> dict[str, Any]:
    """The config of a line."""
    return packaged("dpo", [f"training.optimizer={setting}", "training.mixed_precision=bf16"])


if __name__ == "__main__":
    main(__doc__, SETTINGS, described, None)
