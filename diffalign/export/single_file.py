"""A tuned model in one file: the UNet with its LoRA merged or as it was tuned, the base's VAE and text encoders.

Readers of such a file take everything but the weights from the released models. A base that differs there (another
noise schedule, another scaling of latents, predictions of x0) is refused: the file would open, and its images would be
wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.engine.schedule import NoiseSchedule
from diffalign.export.card.facts import Exported
from diffalign.export.card.write import check_card, write_export_card
from diffalign.export.files import DTYPES, check_out, write_entries
from diffalign.export.layout import model_entries
from diffalign.export.metadata import model_spec
from diffalign.export.names import ExportError
from diffalign.export.tuned_run import find_tuned_run
from diffalign.models.adapters.merge import lora_changes
from diffalign.models.adapters.save_load import TunedWeights
from diffalign.models.loading.base import Base, load_base
from diffalign.models.loading.modules import UNet
from diffalign.models.loading.stored import stored_unet

log = logging.getLogger(__name__)

_SCALING = {"sd": 0.18215, "sdxl": 0.13025}  # latents are multiplied by it; a constant in every reader
_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_RELEASED_VAE: dict[str, Any] = {
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


def export_single_file(
    run: str | Path, out: str | Path, *, base: str | None = None, dtype: str = "fp16", overwrite: bool = False
) -> Path:
    """Write the model tuned by `run` to the file `out` in SD's or SDXL's original layout, and a card; returns `out`.

    `base`: as in `find_tuned_run`. A LoRA is merged in float64 and rounded once, to `dtype`: fp16, bf16 or fp32. In
    memory are the base in float32 and one tensor. Raises ExportError, ModelError and, for settings that this release
    cannot read, ConfigError; all are DiffalignErrors.
    """
    out = Path(out)
    tuned_run = find_tuned_run(run, base)
    name = tuned_run.base.pretrained_model_name_or_path
    check_out(out, overwrite, [tuned_run.tuned.path, Path(name)])
    check_card(out.with_suffix(".md"), overwrite)
    vae = tuned_run.base.pretrained_vae_model_name_or_path
    loaded = load_base(tuned_run.base_spec(vae))
    check_released(loaded)
    entries = model_entries(loaded, tuned_weights(loaded.unet, tuned_run.tuned))
    metadata = model_spec(loaded, tuned_run, out.stem, adapter=False) | tuned_run.provenance()
    write_entries(out, entries, DTYPES[dtype], metadata)
    write_export_card(tuned_run, Exported(out, "single-file", dtype), loaded.family.name, overwrite=overwrite)
    for setting in unread_in_comfyui(loaded):
        log.warning(
            "%s: ComfyUI does not read from this file that the model %s; set it with its node ModelSamplingDiscrete",
            *(out, setting),
        )
    return out


def unread_in_comfyui(base: Base) -> list[str]:
    """What ComfyUI's loader does not see: it reads `v_pred` of SDXL alone, and `ztsnr` only beside it.

    It tells SD2's two predictions apart by the weights themselves.
    """
    v = base.schedule.prediction_type == "v_prediction"
    terminal = bool(base.scheduler_config.get("rescale_betas_zero_snr"))
    sdxl, sd2 = base.family.name == "sdxl", base.unet.config.cross_attention_dim == 1024
    found = ["predicts v (v_prediction)"] if v and not sdxl and not sd2 else []
    return found + (["has zero terminal SNR (zsnr)"] if terminal and not (sdxl and v) else [])


def check_released(base: Base) -> None:
    """Raises ExportError for a base with something a single file cannot say: VAE, its scaling, noise, prediction."""
    vae, name = base.vae, base.family.name
    if vae is None or type(vae).__name__ != "AutoencoderKL":
        raise ExportError(
            f"the VAE of {base.source!r} is an {type(vae).__name__}; a single file holds the AutoencoderKL of SD and "
            "SDXL and no other. This model stays a diffusers folder with its tuned weights beside it"
        )
    different = {
        key: vae.config.get(key) for key, value in _RELEASED_VAE.items() if vae.config.get(key, value) != value
    }
    if vae.config.scaling_factor != _SCALING[name]:
        different["scaling_factor"] = vae.config.scaling_factor
    if different:
        found = ", ".join(f"{key} = {value}" for key, value in different.items())
        raise ExportError(
            f"the VAE of {base.source!r} has {found}; readers of a single file take it for {name.upper()}'s "
            f"(scaling_factor = {_SCALING[name]}, {_RELEASED_VAE}), and would decode wrongly"
        )
    terminal = bool(base.scheduler_config.get("rescale_betas_zero_snr"))
    released = NoiseSchedule.from_config(_SCHEDULE | {"rescale_betas_zero_snr": terminal})
    ours = base.schedule.alphas_cumprod
    if ours.shape != released.alphas_cumprod.shape or not torch.allclose(ours, released.alphas_cumprod, rtol=1e-6):
        raise ExportError(
            f"{base.source!r} was trained on another noise schedule than SD and SDXL ({_SCHEDULE}), and a single file "
            "cannot say so: its images would be wrong"
        )
    if base.schedule.prediction_type == "sample":
        raise ExportError(f"{base.source!r} predicts x0 (prediction_type: sample), for which a single file has no mark")


def tuned_weights(unet: UNet, tuned: TunedWeights) -> Callable[[str], Tensor]:
    """The tuned UNet's weights by name, each read or merged when it is asked for; `unet` is the base's, unchanged.

    Raises ModelError for tuned weights that do not fit the base.
    """
    own = unet.state_dict()
    if tuned.kind == "unet":
        return stored_unet(tuned.path, unet)
    changes = lora_changes(unet, tuned.path)

    def merged(name: str) -> Tensor:
        return own[name].double() + changes[name](own[name]) if name in changes else own[name]

    return merged
