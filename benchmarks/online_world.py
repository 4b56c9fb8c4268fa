"""Methods that generate their pairs during training, on the embedded world: packaged configs × training seeds.

    python benchmarks/online_world.py --out runs/online                        # everything
    python benchmarks/online_world.py --out runs/online --only spo raft --seeds 0 1 2
    python benchmarks/online_world.py --out runs/online --table                # the table of the results so far

A line is a config of training_configs/world with the changes in SETTINGS, trained once for each seed and compared with
the base on held-out prompts, as in `inversion_world.py`. Several processes may share OUT if their lines differ.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from world_lines import main, packaged

# As long as a run of the arena, with its batch and warm-up and the learning rate that its sweep chose for LPO.
LPO = (
    "training.max_train_steps=60", "training.train_batch_size=32", "training.learning_rate=5e-6",
    "training.lr_scheduler=constant_with_warmup", "training.lr_warmup_steps=10",
)  # fmt: skip
# Name of a line -> the packaged config and what is changed in it.
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dpo, offline pairs": ("dpo", ()),
    "sft, offline winners": ("sft", ()),
    "spo, judge: oracle": ("spo", ()),
    "spo, judge: step-aware": ("spo", ("source.scorer=world-step-aware", "source.threshold=0.05")),
    "lpo": ("lpo", LPO),
    "lpo, judge without guidance": ("lpo", ("source.scorer=latent-judge=runs/world/unguided", *LPO)),  # docs/lpo.md
    "seppo": ("seppo", ()),
    "spin": ("spin", ()),
    "raft": ("raft", ()),
    "online dpo": ("online_dpo", ()),
}


def described(setting: str) -> dict[str, Any]:
    """The config of a line."""
    return packaged(*SETTINGS[setting])


if __name__ == "__main__":
    main(__doc__, list(SETTINGS), described, None)
