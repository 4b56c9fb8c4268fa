"""A LoRA in the layout of kohya's sd-scripts, which ComfyUI, A1111 and diffusers read.

    lora_unet_<module, dots as underscores>.lora_down.weight    A
    lora_unet_<module, dots as underscores>.lora_up.weight      B
    lora_unet_<module, dots as underscores>.alpha               a number; the update is (alpha / rank) · B A

sd-scripts trains SDXL on the original UNet and SD on diffusers', so modules have the names of the one or the other.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffalign.export.files import DTYPES, TensorEntry, check_out, write_entries
from diffalign.export.names import ExportError, unet_module
from diffalign.export.tuned_run import find_tuned_run
from diffalign.models.adapters.merge import lora_updates
from diffalign.models.loading.base import Base, outline_base

_SAI = "https://github.com/Stability-AI/generative-models"
# family, cross-attention width, predicts v -> sd-scripts' name of the base, modelspec's architecture and implementation
_RELEASED = {
    ("sdxl", 2048, False): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", _SAI),
    ("sdxl", 2048, True): ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", _SAI),
    ("sd", 768, False): ("sd_v1", "stable-diffusion-v1/lora", "diffusers"),
    ("sd", 768, True): ("sd_v1_v", "stable-diffusion-v1/lora", "diffusers"),
    ("sd", 1024, False): ("sd_v2", "stable-diffusion-v2-512/lora", "diffusers"),
    ("sd", 1024, True): ("sd_v2_v", "stable-diffusion-v2-768-v/lora", "diffusers"),
}
_PREDICTION = {"epsilon": "epsilon", "v_prediction": "v"}


def export_kohya(
    run: str | Path, out: str | Path, *, base: str | None = None, dtype: str = "fp32", overwrite: bool = False
) -> Path:
    """Write the LoRA at `run` to the file `out` in kohya's layout; returns `out`.

    `base`: as in `find_tuned_run`. Only the base's configs are read, not its weights, unless it is a single file.
    `dtype` is fp32, in which LoRA weights are trained and which loses nothing, fp16 or bf16. Raises ExportError,
    ModelError and, for settings that this release cannot read, ConfigError; all are DiffalignErrors.
    """
    out = Path(out)
    tuned_run = find_tuned_run(run, base)
    if tuned_run.tuned.kind != "lora":
        raise ExportError(
            f"{tuned_run.tuned.path} is a full UNet, which is no LoRA; export it with --to single-file, or train with "
            "tuning.method=lora"
        )
    check_out(out, overwrite, [tuned_run.tuned.path])
    outline = outline_base(tuned_run.base_spec())
    modules = [
        (kohya_module(name, outline), down, up, scale * down.shape[0])
        for name, down, up, scale in lora_updates(outline.unet, tuned_run.tuned.path)
    ]
    entries = []
    for name, down, up, alpha in modules:
        entries += [_entry(f"{name}.lora_down.weight", down), _entry(f"{name}.lora_up.weight", up)]
        entries.append(TensorEntry(f"{name}.alpha", (), partial(torch.tensor, alpha), torch.float32))
    ranks = {down.shape[0] for _, down, _, _ in modules}
    alphas = {alpha for _, _, _, alpha in modules}
    write_entries(
        out, entries, DTYPES[dtype], kohya_metadata(outline, ranks, alphas, out.stem) | tuned_run.provenance()
    )
    return out


def kohya_module(name: str, base: Base) -> str:
    """sd-scripts' name of a module of the base's UNet, by diffusers' name; raises ExportError where it has none."""
    original = unet_module(name, base.unet.config) if base.family.name == "sdxl" else name
    return f"lora_unet_{original.replace('.', '_')}"


def kohya_metadata(base: Base, ranks: set[int], alphas: set[float], title: str) -> dict[str, str]:
    """What sd-scripts writes of a network, as far as it is known here; `Dynamic` where modules differ, as in its own.

    The base's version and the modelspec block are for bases of a released architecture only: A1111 sorts LoRA files
    by them. A field that would be a guess (of data, hashes, thumbnails) is left out.
    """
    known = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": f"{min(ranks)}" if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{min(alphas):g}" if len(alphas) == 1 else "Dynamic",
        "ss_output_name": title,
    }
    v = base.schedule.prediction_type == "v_prediction"
    released = _RELEASED.get((base.family.name, base.unet.config.cross_attention_dim, v))
    if released is None:
        return known
    version, architecture, implementation = released
    known |= {"ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2"))}
    known |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture}
    known |= {"modelspec.implementation": implementation, "modelspec.title": title}
    if base.schedule.prediction_type in _PREDICTION:
        known["modelspec.prediction_type"] = _PREDICTION[base.schedule.prediction_type]
    return known


def _entry(name: str, value: Tensor) -> TensorEntry:
    return TensorEntry(name, tuple(value.shape), lambda: value)
