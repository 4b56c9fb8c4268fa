"""bfloat16 weights and 8-bit moments compared with float32 weights: Diffusion-DPO on the embedded world, × seeds.

    python benchmarks/optimizers_world.py --out runs/optimizers                # everything; needs torchao
    python benchmarks/optimizers_world.py --out runs/optimizers --table        # the table of the results so far

A line is training_configs/world/dpo.yaml in bf16 with another optimiser, trained once for each seed and compared with
the base on held-out prompts. `torchao_8bit_bf16` is torchao's AdamW8bit with stochastic rounding in place of ours; its
operators run uncompiled, because each shape of the UNet's weights would be compiled on its own. Seconds are of a CPU
without bfloat16 arithmetic.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from world_lines import main, packaged

from diffalign.training import build
from diffalign.training.optim.optimizers import make_optimizer

TORCHAO = "torchao_8bit_bf16"
SETTINGS = ("adamw", "adamw_bf16", "adamw_8bit_bf16", TORCHAO)


def described(setting: str) -> dict[str, Any]:
    """The config of a line, whose runs are built with the setting's optimiser."""
    build.make_optimizer = torchao_optimizer if setting == TORCHAO else make_optimizer  # type: ignore[attr-defined]
    ours = "adamw_8bit_bf16" if setting == TORCHAO else setting
    return packaged("dpo", [f"training.optimizer={ours}", "training.mixed_precision=bf16"])


def torchao_optimizer(parameters: Any, training: Any, lr: float, seed: int = 0) -> Any:
    """torchao's optimiser with the settings of a config."""
    import torch
    from torchao.optim import AdamW8bit

    torch.compile = lambda function, **_: function  # type: ignore[assignment]  # the same operators, uncompiled
    torch.manual_seed(seed)  # it rounds by the global generator
    betas = (training.adam_beta1, training.adam_beta2)
    decay, eps = training.adam_weight_decay, training.adam_epsilon
    return AdamW8bit(list(parameters), lr, betas, eps, decay, bf16_stochastic_round=True)


if __name__ == "__main__":
    main(__doc__, SETTINGS, described, None)
