"""LoRA on a base stored in 8 or 4 bits compared with the base as it is: Diffusion-DPO on the embedded world, × seeds.

    python benchmarks/quantized_world.py --out runs/quantized                # everything
    python benchmarks/quantized_world.py --out runs/quantized --table        # the table of the results so far

A line is training_configs/world/dpo_lora.yaml with `tuning.quantize_base`, trained once for each seed. Its LoRA is
evaluated on the base as it is, as a user would load it, and compared with that base on held-out prompts.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from world_lines import main, packaged

SETTINGS = ("none", "int8", "nf4")


def described(setting: str) -> dict[str, Any]:
    """The config of a line."""
    return packaged("dpo_lora", [] if setting == "none" else [f"tuning.quantize_base={setting}"])


if __name__ == "__main__":
    main(__doc__, SETTINGS, described, None)
