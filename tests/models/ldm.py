"""A diffusers pipeline's weights under the names of single-file checkpoints, to have something to load.

Written from the layout of CompVis' latent-diffusion and Stability's generative-models; read back by diffusers' own
converter, which is what makes it a test.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def single_file_state(pipeline) -> dict[str, Tensor]:
    """All weights of an SD or SDXL pipeline, keyed as in a single .safetensors file."""
    state = {f"model.diffusion_model.{k}": v for k, v in _unet(pipeline.unet).items()}
    state |= {f"first_stage_model.{k}": v for k, v in _vae(pipeline.vae).items()}
    first = {
        k if k.startswith("text_model.") else f"text_model.{k}": v
        for k, v in pipeline.text_encoder.state_dict().items()
    }
    if not hasattr(pipeline, "text_encoder_2"):
        state |= {f"cond_stage_model.transformer.{k}": v for k, v in first.items()}
    else:
        state |= {f"conditioner.embedders.0.transformer.{k}": v for k, v in first.items()}
        state |= {f"conditioner.embedders.1.model.{k}": v for k, v in _open_clip(pipeline.text_encoder_2).items()}
    return {key: value.contiguous() for key, value in state.items()}


def _unet(unet) -> dict[str, Tensor]:
    per = unet.config.layers_per_block + 1
    out = {}
    for key, value in unet.state_dict().items():
        head, _, tail = key.rpartition(".")
        if head in _UNET_TOP:
            out[f"{_UNET_TOP[head]}.{tail}"] = value
            continue
        match = re.match(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.*)", key)
        side, block, kind, index, rest = match.groups()
        block, index = int(block or 0), int(index)
        if kind == "resnets":
            name, _, leaf = rest.rpartition(".")
            rest = f"{_RESNET[name]}.{leaf}"
        if side is None:
            place = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
        elif kind == "downsamplers":
            place, rest = f"input_blocks.{(block + 1) * per}.0", rest.replace("conv", "op")
        elif kind == "upsamplers":
            after = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
            place = f"output_blocks.{block * per + per - 1}.{after}"
        else:
            first = 1 + block * per if side == "down" else block * per
            stack = "input_blocks" if side == "down" else "output_blocks"
            place = f"{stack}.{first + index}.{1 if kind == 'attentions' else 0}"
        out[f"{place}.{rest}"] = value
    return out


def _vae(vae) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    out = {}
    for key, value in vae.state_dict().items():
        key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", key)
        key = key.replace("down_blocks.", "down.").replace(".resnets.", ".block.")
        key = re.sub(r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = re.sub(r"(down|up)samplers\.0", r"\1sample", key)
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in key:
            key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            key = key.replace("to_out.0", "proj_out")
            key = re.sub(r"to_([qkv])", r"\1", key)
            if value.ndim == 2:
                value = value[:, :, None, None]
        out[key] = value
    return out


def _open_clip(model) -> dict[str, Tensor]:
    state = {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    for i in range(model.config.num_hidden_layers):
        layer, block = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for leaf in ("weight", "bias"):
            qkv = [state[f"{layer}self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            out[f"{block}attn.in_proj_{leaf}"] = torch.cat(qkv)
            for theirs, ours in _OPEN_CLIP.items():
                out[f"{block}{ours}.{leaf}"] = state[f"{layer}{theirs}.{leaf}"]
    return out
