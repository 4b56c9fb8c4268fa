"""torch.compile, block by block.

A UNet repeats a few kinds of blocks, so compiling each kind once gives most of the gain of compiling the UNet, in a
fraction of the time. Blocks are compiled in place (`Module.compile`): names of modules and weights, hooks, LoRA layers
and DDP are unaffected, and checkpoints have the same keys.

There is one graph for each kind of block, input shape, grad mode and state of the LoRA switch: policy and reference
have their own, and a change from one to the other compiles nothing.
"""

from __future__ import annotations

import torch

from diffalign.models.loading.modules import UNet

BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
BACKEND = "inductor"
# SDXL has 12 shapes of resnet blocks; policy and reference, and one more resolution or batch. PyTorch stops at 8 and
# from then on runs uncompiled, with a warning.
GRAPHS_PER_BLOCK = 96


def compile_blocks(unet: UNet, backend: str | None = None) -> int:
    """Compiles every transformer and resnet block at its first call; returns their number.

    backend: of torch.compile; None means inductor. Shapes are fixed: another batch or image size compiles again.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_BLOCK)
    blocks = [module for module in unet.modules() if type(module).__name__ in BLOCKS]
    for block in blocks:
        block.compile(backend=backend or BACKEND, dynamic=False)
    return len(blocks)
