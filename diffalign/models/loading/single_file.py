"""Bases in one .safetensors file, as ComfyUI and A1111 use them, read by diffusers' converter."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from diffalign.engine.schedule import NoiseSchedule
from diffalign.io.loaded_weights import check_module, named
from diffalign.io.weight_files import check_weights, refuse_pickle
from diffalign.models.hub import local_file
from diffalign.models.loading.components import check_tokenizer, complete_scheduler
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.spec import ModelSpec

log = logging.getLogger(__name__)

_UNET_KEY = "model.diffusion_model."
_VAE_KEYS = ("first_stage_model.", "vae.")
_CONFIG_IS = (
    "single_file_config, a folder with the configs and tokenizers of the matching pipeline (model_index.json, "
    "unet/config.json, tokenizer/, …)"
)
_FAMILY_KEYS = {"sdxl": "conditioner.embedders.", "sd": "cond_stage_model."}


def is_single_file(name: str) -> bool:
    """Whether a base is given as one weights file. Raises ModelError for pickled checkpoints."""
    refuse_pickle(name)
    return name.endswith(".safetensors")


def load_single_file(
    spec: ModelSpec, vae_and_text: bool, dtype: torch.dtype
) -> tuple[Any, dict[str, Any], NoiseSchedule]:
    """The diffusers pipeline in a file, its completed scheduler config and its noise.

    `single_file_config` is a folder with the matching pipeline's configs and tokenizers (no weights); without it
    diffusers asks the Hub. Checkpoints that have the keys `v_pred` and `ztsnr` (NoobAI's convention) are taken at
    their word: v-prediction, zero terminal SNR. The file's VAE is left out where the spec names another. Raises
    ModelError, also where the file lacks tensors that its config asks for.
    """
    import diffusers

    path = str(local_file(spec.name, spec.revision))
    config, own_vae = spec.single_file_config, spec.pretrained_vae_model_name_or_path is None
    header = check_weights(path)
    keys = header.shapes.keys()
    family = next((name for name, key in _FAMILY_KEYS.items() if any(k.startswith(key) for k in keys)), None)
    if family is None:
        raise ModelError(
            f"{path!r} is not a full SD or SDXL checkpoint: none of its {len(keys)} tensors starts with "
            f"{' or '.join(_FAMILY_KEYS.values())}. A LoRA or a bare UNet belongs in the tuned weights, not the base"
        )
    edm = sorted(key for key in keys if key.startswith("edm_"))
    if edm:
        raise ModelError(
            f"{path!r} has the tensor{'s' * (len(edm) > 1)} {', '.join(edm)}: it was trained on "
            "continuous EDM noise (CosXL, Playground v2.5), and only models with a discrete table of "
            "betas are supported. Use another base"
        )
    if vae_and_text and own_vae and not any(key.startswith(_VAE_KEYS) for key in keys):
        raise ModelError(
            f"{path!r} has no VAE (none of its {len(keys)} tensors starts with {_VAE_KEYS[0]}): name one with "
            "pretrained_vae_model_name_or_path (--vae), a diffusers folder or Hub id"
        )
    if config is not None and not (Path(config) / "model_index.json").is_file():
        raise ModelError(f"single_file_config: {config!r} has no model_index.json; {_CONFIG_IS}")
    cls = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    without = {} if vae_and_text else dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    if not own_vae:
        without["vae"] = None
    if not vae_and_text and family == "sdxl":
        without |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    try:
        pipeline = cls.from_single_file(path, config=config, torch_dtype=dtype, **without)
    except NotImplementedError as error:  # diffusers moves a tensor that the file lacks
        raise ModelError(
            f"{path!r} is not complete: {_missing(path, config) or 'it lacks tensors that its config asks for'}. "
            "Download it again, or set single_file_config to the configs of its own pipeline"
        ) from error
    except Exception as error:  # diffusers raises many kinds of errors here, all with the same remedies
        raise ModelError(
            f"cannot read {path!r} (single_file_config: {config}): {' '.join(str(error).split())[:400]}. "
            f"Set {_CONFIG_IS}; without it they are fetched from the Hub, which needs a connection"
        ) from error
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (module := getattr(pipeline, name, None)) is not None:
            check_module(f"the {name} of {path!r}", module)
    _check_all_used(path, keys, pipeline.unet)
    for suffix in ("", "_2"):
        if (tokenizer := getattr(pipeline, f"tokenizer{suffix}", None)) is not None:
            what = f"the tokenizer{suffix} in {config or 'the Hub config of'} for {path!r}"
            check_tokenizer(what, tokenizer, getattr(pipeline, f"text_encoder{suffix}"))
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    if "v_pred" in keys:
        scheduler["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        scheduler["rescale_betas_zero_snr"] = True
    completed, schedule = complete_scheduler(scheduler, spec)
    if header.metadata.get("modelspec.prediction_type") == "v" and schedule.prediction_type != "v_prediction":
        log.warning(
            "%s: its metadata say that it predicts v, and it is used as a model that predicts %s; if the metadata are "
            "right, set model.prediction_type: v_prediction (--prediction-type)",
            *(path, schedule.prediction_type),
        )
    return pipeline, completed, schedule


def _missing(path: str, config: str | None) -> str | None:
    """Which tensors of UNet or VAE a file lacks, by the local configs; None where that is unknown."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    for name, cls, convert in (
        ("unet", diffusers.UNet2DConditionModel, convert_ldm_unet_checkpoint),
        ("vae", diffusers.AutoencoderKL, convert_ldm_vae_checkpoint),
    ):
        try:
            facts = cls.load_config(str(config), subfolder=name)
            with torch.device("meta"):
                needed = cls.from_config(facts).state_dict()
                given = {key: torch.empty(shape) for key, shape in check_weights(path).shapes.items()}
            missing = sorted(needed.keys() - convert(given, config=facts).keys())
        except Exception:  # diffusers' converters fail in many ways on a file of another structure
            continue
        if missing:
            return f"{len(missing)} of {len(needed)} tensors of its {name} are missing ({named(missing)})"
    return None


def _check_all_used(path: str, keys: Collection[str], unet: UNet) -> None:
    """Raises ModelError where the file's UNet has more tensors than the config's: diffusers ignores the others."""
    given, used = sum(key.startswith(_UNET_KEY) for key in keys), len(unet.state_dict())
    if given != used:
        raise ModelError(
            f"the UNet in {path!r} has {given} tensors, and the one of its config has {used}: the "
            f"structures differ, and only a part would be used. Set {_CONFIG_IS}"
        )
