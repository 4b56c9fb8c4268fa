"""Names of a UNet's modules in the original releases (CompVis, Stability), from those that diffusers gives them.

The original numbers its blocks through: input_blocks has the first convolution, then each level's resnets (with the
transformer behind each, if the level has them) and its downsampler; output_blocks likewise, but an upsampler stands in
the block of its level's last resnet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PLACE = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)")


def unet_place(name: str, config: Mapping[str, Any]) -> str | None:
    """A UNet's module, e.g. down_blocks.1.attentions.0.proj_in as input_blocks.4.1.proj_in; None for one without place.

    `config` is the UNet's: its `layers_per_block` and `up_block_types` are read.
    """
    if name in _ENDS:
        return _ENDS[name]
    layers = config["layers_per_block"]
    found = _PLACE.fullmatch(name)
    if found is None or not isinstance(layers, int):
        return None
    side, level, kind, index, inner = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        if inner not in _RESNET:
            return None
        inner = _RESNET[inner]
    per_level = layers + 1  # a downsampler below the resnets, or one resnet more above
    if side is None and kind in ("resnets", "attentions"):
        return f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}.{inner}"
    first = level * per_level + (side == "down")
    blocks = "input_blocks" if side == "down" else "output_blocks"
    if side is not None and kind in ("resnets", "attentions"):
        return f"{blocks}.{first + index}.{int(kind == 'attentions')}.{inner}"
    if (side, kind, inner) == ("down", "downsamplers", "conv"):
        return f"input_blocks.{first + layers}.0.op"
    if (side, kind, inner) == ("up", "upsamplers", "conv"):
        behind_attention = "CrossAttn" in config["up_block_types"][level]
        return f"output_blocks.{first + layers}.{1 + behind_attention}.conv"
    return None
