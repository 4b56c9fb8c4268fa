"""Bases in one .safetensors file, as ComfyUI and A1111 use them, read by diffusers' own converter."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.models.components import complete_scheduler_config
from diffalign.models.family import ModelError
from diffalign.weight_files import check_weights, refuse_pickle

_FAMILY_KEYS = {"sdxl": "conditioner.embedders.", "sd": "cond_stage_model."}


def is_single_file(name: str) -> bool:
    """Whether a base is given as one weights file. Raises ModelError for pickled checkpoints."""
    refuse_pickle(name)
    return name.endswith(".safetensors")


def load_single_file(
    path: str, config: str | None, vae_and_text: bool, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """The diffusers pipeline in the file, and its completed scheduler config.

    `config` is a folder with the matching pipeline's configs and tokenizers (no weights); without it diffusers
    asks the Hub. Checkpoints that carry the keys `v_pred` and `ztsnr` (NoobAI's convention) are taken at their word:
    v-prediction, zero terminal SNR. Raises ModelError.
    """
    import diffusers

    keys = check_weights(path).shapes.keys()
    family = next((name for name, key in _FAMILY_KEYS.items() if any(k.startswith(key) for k in keys)), None)
    if family is None:
        raise ModelError(
            f"{path!r} is no full SD or SDXL checkpoint: none of its {len(keys)} tensors starts with "
            f"{' or '.join(_FAMILY_KEYS.values())}. A LoRA or a bare UNet belongs in the tuned weights, not the base"
        )
    edm = sorted(key for key in keys if key.startswith("edm_"))
    if edm:
        raise ModelError(
            f"{path!r} has the tensor{'s' * (len(edm) > 1)} {', '.join(edm)}: it was trained on continuous EDM noise "
            "(CosXL, Playground v2.5), and only models with a discrete table of betas are tuned here. Take another base"
        )
    cls = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    without = {} if vae_and_text else dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if not vae_and_text and family == "sdxl":
        without |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    try:
        pipeline = cls.from_single_file(path, config=config, torch_dtype=dtype, **without)
    except Exception as error:  # diffusers raises many kinds here, all with the same remedies
        raise ModelError(
            f"cannot read {path!r} (config folder: {config}): {error}. Give single_file_config, a folder with the "
            "configs and tokenizers of the matching pipeline (model_index.json, unet/config.json, tokenizer/, …); "
            "without it they are fetched from the Hub"
        ) from error
    scheduler = dict(pipeline.scheduler.config)
    if "v_pred" in keys:
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        scheduler["rescale_betas_zero_snr"] = True
    return pipeline, complete_scheduler_config(scheduler | {"_class_name": type(pipeline.scheduler).__name__}, path)
