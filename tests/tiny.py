"""Pipelines with random weights in the structure of SD1.5 and SDXL, small enough for a CPU test.

Everything a loader can meet is there: cross-attention blocks, SDXL's text_time embedding and second text encoder with
another width, a convolutional AutoencoderKL, byte-level CLIP tokenizers with the real padding tokens, the real models'
scheduler configs. Weights are random: nothing here says anything about image quality.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

RESOLUTION = 64  # pixels; latents are 4 x 16 x 16
_WORDS = ("a", "an", "the", "red", "green", "blue", "small", "large", "circle", "square", "photo", "of", "with")
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_UNET = {
    "sample_size": RESOLUTION // 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def make_tiny(directory: str | Path, family: str = "sd", prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write a diffusers pipeline folder of family "sd" or "sdxl" into `directory` and return it."""
    directory = Path(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = {"sd": _sd, "sdxl": _sdxl}[family](directory, prediction_type)
    pipeline.save_pretrained(directory, safe_serialization=True)
    return directory


def _sd(directory: Path, prediction_type: str):
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    tokenizer = _tokenizer(directory / "tokenizer", pad_token="<|endoftext|>")
    unet = UNet2DConditionModel(
        **_UNET,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    scheduler = PNDMScheduler(
        **_BETAS,
        prediction_type=prediction_type,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=_vae(scaling_factor=0.18215),
        text_encoder=CLIPTextModel(_text_config(len(tokenizer), width=32, act="quick_gelu")),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(directory: Path, prediction_type: str):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first = _tokenizer(directory / "tokenizer", pad_token="<|endoftext|>")
    second = _tokenizer(directory / "tokenizer_2", pad_token="!")
    unet = UNet2DConditionModel(
        **_UNET,
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 48,
    )
    scheduler = EulerDiscreteScheduler(
        **_BETAS, prediction_type=prediction_type, timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(_text_config(len(first), width=32, act="quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(len(second), width=48, act="gelu", projection=48)),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _vae(scaling_factor: float):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=RESOLUTION,
        block_out_channels=(8, 16, 16),  # two downsamplings: 4x
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )


def _text_config(vocabulary: int, width: int, act: str, projection: int = 32):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=projection,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,  # as in the released configs: pooling then takes the largest id, which is <|endoftext|>
    )


def _tokenizer(directory: Path, pad_token: str):
    """A CLIPTokenizer over the 256 bytes, their word-final forms and a few whole words; "!" has id 0 as in CLIP."""
    from transformers import CLIPTokenizer

    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in printable]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(other))]
    pieces, merges = characters + [c + "</w>" for c in characters], []
    for word in _WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(parts)):
            left = "".join(parts[:i])
            if (merge := f"{left} {parts[i]}") not in merges:
                merges.append(merge)
                pieces.append(left + parts[i])
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(directory), model_max_length=77, pad_token=pad_token)
