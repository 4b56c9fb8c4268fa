"""One component of a diffusers folder or Hub repository at a time, with errors that say what to do.

Weights come from safetensors only: a pickled .bin or .ckpt can run code when it is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.models.family import ModelError

_A_BASE_IS = "a base is a diffusers pipeline folder, a Hub id or one .safetensors file"


@dataclass(frozen=True)
class Where:
    """Revision, variant and dtype that all components of one load share."""

    revision: str | None
    variant: str | None
    dtype: torch.dtype

    def load(self, cls: Any, source: str, subfolder: str | None, **dtype: torch.dtype) -> nn.Module:
        """`cls.from_pretrained` of safetensors weights. Raises ModelError naming component, cause and remedy."""
        try:
            module = cls.from_pretrained(
                source,
                subfolder=subfolder or "",
                revision=self.revision,
                variant=self.variant,
                use_safetensors=True,
                **dtype,
            )
        except (OSError, ValueError) as error:
            raise ModelError(_why_no_weights(source, subfolder or "", self.variant, error)) from error
        return module


def read_index(source: str, revision: str | None) -> dict[str, Any]:
    """The pipeline's model_index.json. Raises ModelError when there is none to be had."""
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(source, revision=revision))
    except (OSError, ValueError) as error:
        raise ModelError(_why_no_pipeline(source, error)) from error


def load_unet(source: str, where: Where) -> nn.Module:
    """UNet2DConditionModel of a pipeline."""
    from diffusers import UNet2DConditionModel

    return where.load(UNet2DConditionModel, source, "unet", torch_dtype=where.dtype)


def outline_unet(source: str, where: Where) -> nn.Module:
    """The UNet of a pipeline as its config describes it, without weights, on the meta device."""
    from diffusers import UNet2DConditionModel

    try:
        config = UNet2DConditionModel.load_config(source, subfolder="unet", revision=where.revision)
    except (OSError, ValueError) as error:
        raise ModelError(_why_no_weights(source, "unet", where.variant, error)) from error
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def load_vae(source: str, subfolder: str | None, where: Where) -> nn.Module:
    """The autoencoder in `source[/subfolder]`, of the class its config names."""
    return where.load(_vae_class(source, subfolder, where), source, subfolder, torch_dtype=where.dtype)


def load_text(source: str, names: tuple[str, ...], where: Where) -> tuple[tuple[Any, ...], tuple[nn.Module, ...]]:
    """Tokenizers and text models; `names` are the model_index keys, e.g. ("", "_2") for both of SDXL."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizers, models = [], []
    for suffix in names:
        cls = CLIPTextModelWithProjection if suffix else CLIPTextModel
        models.append(where.load(cls, source, f"text_encoder{suffix}", dtype=where.dtype))
        try:
            tokenizers.append(
                CLIPTokenizer.from_pretrained(source, subfolder=f"tokenizer{suffix}", revision=where.revision)
            )
        except (OSError, ValueError) as error:
            raise ModelError(_why_no_weights(source, f"tokenizer{suffix}", None, error)) from error
    return tuple(tokenizers), tuple(models)


def load_scheduler_config(source: str, revision: str | None) -> dict[str, Any]:
    """The scheduler's config, completed with the defaults of its own class. Raises ModelError as `schedule_of` does."""
    from diffusers import DDIMScheduler

    try:
        config = dict(DDIMScheduler.load_config(source, subfolder="scheduler", revision=revision))
    except OSError as error:
        raise ModelError(f"no scheduler/scheduler_config.json in {source!r}: {_first_line(error)}") from error
    return complete_scheduler_config(config, source)


def complete_scheduler_config(config: dict[str, Any], source: str) -> dict[str, Any]:
    """`config` with the keys it leaves out, which mean the defaults of the class it names.

    Raises ModelError as `schedule_of` does, and for a class that lacks a package.
    """
    import diffusers

    schedule_of(config, source)  # refuses before diffusers makes a DDIM of anything
    name = config.get("_class_name")
    try:
        full = dict(config) if name is None else dict(getattr(diffusers, name).from_config(config).config)
    except ImportError as error:  # LMSDiscreteScheduler and others want packages of their own
        raise ModelError(f"the scheduler of {source!r}: {' '.join(str(error).split())}") from error
    return {key: value for key, value in full.items() if not key.startswith("_")} | {
        "_class_name": name or "DDIMScheduler"
    }


def schedule_of(config: dict[str, Any], source: str) -> NoiseSchedule:
    """The noise schedule of a scheduler config. Raises ModelError that names the base for noise not tuned here."""
    try:
        return NoiseSchedule.from_config(config)
    except DiffalignError as error:
        raise ModelError(f"the scheduler of {source!r}: {error}") from error


def _vae_class(source: str, subfolder: str | None, where: Where) -> Any:
    import diffusers

    try:
        config = diffusers.AutoencoderKL.load_config(source, subfolder=subfolder, revision=where.revision)
    except OSError as error:
        raise ModelError(_why_no_weights(source, subfolder or "", where.variant, error)) from error
    name = config.get("_class_name", "AutoencoderKL")
    if not (name.startswith("A") and "Autoencoder" in name and hasattr(diffusers, name)):
        raise ModelError(
            f"the VAE of {source!r} is a {name!r}; allowed are diffusers' autoencoders (AutoencoderKL, AutoencoderDC, "
            "AutoencoderTiny, …). Give another one with pretrained_vae_model_name_or_path"
        )
    return getattr(diffusers, name)


def _why_no_pipeline(source: str, error: Exception) -> str:
    folder = Path(source)
    if folder.is_dir():
        if (folder / "unet").is_dir() or list(folder.glob("*.safetensors")):
            return (
                f"{source!r} holds tuned weights but no model_index.json: it is not a base model. Give the model "
                "it was tuned from as pretrained_model_name_or_path and this folder as the tuned weights"
            )
        return f"{source!r} has no model_index.json; {_A_BASE_IS}"
    if folder.suffix or source.startswith((".", "/", "~")) or source.count("/") != 1:
        return f"{source!r} does not exist; {_A_BASE_IS}"
    return (
        f"{source!r} is no folder here and could not be read from the Hugging Face Hub ({_first_line(error)}). "
        f"With a connection: check the name, and HF_TOKEN for a gated model. Without: run `hf download {source}` "
        "where there is one, then set HF_HUB_OFFLINE=1 and the same HF_HOME here, or give the path of a local copy"
    )


def _why_no_weights(source: str, subfolder: str, variant: str | None, error: Exception) -> str:
    what = f"{subfolder or 'the weights'} of {source!r}"
    folder = Path(source) / subfolder
    if not folder.is_dir():
        hint = "the folder is missing" if Path(source).is_dir() else _first_line(error)
        return f"cannot load {what}: {hint}"
    names = sorted(path.name for path in folder.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights and any(name.endswith((".bin", ".ckpt", ".pt")) for name in names):
        return (
            f"cannot load {what}: only pickled weights are there ({', '.join(names)}), and those are not opened "
            "because they can run code. If you trust them, convert them once: load the pipeline with diffusers' "
            "from_pretrained(..., use_safetensors=False) and save it with save_pretrained(..., safe_serialization=True)"
        )
    return f"cannot load {what} (variant: {variant}): found {', '.join(names) or 'nothing'}. {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
