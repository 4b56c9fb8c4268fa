"""Model folders and pairs to measure on: random weights in published sizes, and noise images.

    tiny    a few hundred thousand parameters in SDXL's structure, 64 px
    small   SDXL's structure with its proportions between UNet, VAE and text encoders, 64 px
    world   the embedded world's base model, 16 px
    sd15    SD1.5's published sizes, 512 px
    sdxl    SDXL's published sizes, 1024 px (10 GB of float32 UNet in memory, half of that on disk)

The speed does not depend on the weights, as long as they are not zeros. The folders are ordinary diffusers pipelines,
so that every contender loads the same bytes with its own loader.
"""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.gpu_models import SDXL_SCHEDULER, SDXL_UNET
from tests.tiny import make_tiny

MODELS = {"tiny": 64, "small": 64, "world": 16, "sd15": 512, "sdxl": 1024}  # name -> resolution in pixels

SD15_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
}
SMALL_UNET = {
    **SDXL_UNET,
    "sample_size": 8,
    "addition_time_embed_dim": 16,
    "attention_head_dim": (1, 2, 4),
    "block_out_channels": (32, 64, 128),
    "cross_attention_dim": 96 + 160,
    "projection_class_embeddings_input_dim": 6 * 16 + 160,
    "transformer_layers_per_block": (1, 2, 10),
}
KL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Text:
    """A CLIP text encoder's sizes."""

    width: int
    layers: int
    heads: int
    act: str
    projection: int | None = None


CLIP_L = Text(768, 12, 12, "quick_gelu")
CLIP_BIGG = Text(1280, 32, 20, "gelu", 1280)


def unet_config(model: str) -> dict[str, Any]:
    """The UNet's config of a model that is made here; for `world` and `tiny` read the folder's."""
    return {"sdxl": SDXL_UNET, "sd15": SD15_UNET, "small": SMALL_UNET}[model]


def model_folder(model: str, folder: Path, seed: int = 0) -> Path:
    """The diffusers folder of a model, made there unless it is already."""
    if model not in MODELS:
        raise ValueError(f"model = {model!r}; allowed: {', '.join(MODELS)}")
    if model == "world":
        from diffalign.world import base_path

        return Path(base_path())
    if (folder / "model_index.json").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_tiny(partial, "sd" if model == "sd15" else "sdxl", seed=seed)
    if model != "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _replace_networks(model, partial)
    partial.rename(folder)
    return folder


def _replace_networks(model: str, folder: Path) -> None:
    """Networks of other sizes into a tiny pipeline's folder; tokenizers and index stay. Stored as bfloat16."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    dtype = torch.float32 if model == "small" else torch.bfloat16
    small = (
        {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8, "sample_size": 64} if model == "small" else {}
    )
    scaling = 0.18215 if model == "sd15" else 0.13025
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**unet_config(model)),
        "vae": AutoencoderKL(**{**KL_VAE, "scaling_factor": scaling, "force_upcast": model != "sd15", **small}),
    }
    if model == "sd15":
        parts["text_encoder"] = _text(CLIP_L)
    else:
        first, second = (
            (Text(96, 3, 4, "quick_gelu"), Text(160, 8, 4, "gelu", 160))
            if model == "small"
            else (
                CLIP_L,
                CLIP_BIGG,
            )
        )
        parts |= {"text_encoder": _text(first), "text_encoder_2": _text(second)}
        EulerDiscreteScheduler(**{k: v for k, v in SDXL_SCHEDULER.items() if k[0] != "_"}).save_pretrained(
            folder / "scheduler"
        )
    for name, module in parts.items():
        shutil.rmtree(folder / name)
        module.to(dtype).save_pretrained(folder / name, safe_serialization=True)


def _text(sizes: Text) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=77,
        projection_dim=sizes.projection or sizes.width,
        hidden_act=sizes.act,
        bos_token_id=0,
        eos_token_id=2,
    )
    return CLIPTextModel(config) if sizes.projection is None else CLIPTextModelWithProjection(config)


def pairs_file(file: Path, pairs: int, resolution: int, seed: int = 0) -> Path:
    """A parquet file of noise pictures as JPEG in Pick-a-Pic's columns with scores, every pair with its own prompt."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(seed)

    def jpeg() -> bytes:
        coarse = rng.integers(0, 255, (max(resolution // 8, 2), max(resolution // 8, 2), 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((resolution, resolution), Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
        return out.getvalue()

    labels = [float(rng.integers(0, 2)) for _ in range(pairs)]
    columns = {
        "caption": [f"a photo of a small red circle, number {i}" for i in range(pairs)],
        "jpg_0": [jpeg() for _ in range(pairs)],
        "jpg_1": [jpeg() for _ in range(pairs)],
        "label_0": labels,
        "label_1": [1.0 - x for x in labels],
        "score_0": labels,
        "score_1": [1.0 - x for x in labels],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file
