"""The tensors of a LoRA file under one set of names, whichever program wrote it; `lora_file.py` lists the programs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet

PEFT_PREFIX = "base_model.model."
TEXT = ("text_encoder.", "text_encoder_2.")
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
PART = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")  # a saved adapter's name may stand before the weight


def converted_names(
    file: Path, weights: dict[str, Tensor], unet: UNet
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float], dict[str, float]]:
    """The UNet's tensors by "module.lora_A.weight", the text encoders', and the alphas of both.

    Alphas of the UNet are by module; what is of text encoders has the names that diffusers takes.
    """
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    names = list(weights)
    given: dict[str, Any] = {name: weights[name] for name in names if name.endswith(".alpha")}
    if all(name.startswith(KOHYA) for name in names):
        try:
            converted, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(weights), unet_config=unet.config)
        except (ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"{file} has kohya's key names, and diffusers cannot convert it "
                f"({' '.join(str(error).split())[:300]}): "
                "some of its tensors are missing, or it is for another kind of model"
            ) from error
        given = dict(alphas or {})
    else:
        converted = {name: value for name, value in weights.items() if name not in given}
    plain: dict[str, Tensor] = {}
    bare = {_bare(name): value for name, value in converted.items()}
    text = {name: value for name, value in bare.items() if name.startswith(TEXT)}
    own = {name: value for name, value in bare.items() if name not in text}
    for name, value in convert_unet_state_dict_to_peft(own).items():
        part = PART.fullmatch(name)
        plain[name if part is None else f"{part[1]}.lora_{part[2]}.weight"] = value
    if len(plain) + len(text) < len(converted):
        raise ModelError(
            f"{file} contains some layers twice, e.g. as two adapters in one file: write one file per adapter"
        )
    alphas = {_bare(name): value for name, value in given.items()}
    for name, value in alphas.items():
        if not is_alpha(value):
            raise ModelError(f"{file}: {name} is {value!r:.60}; an alpha is one finite number above 0")
    text_alphas = {name: float(value) for name, value in alphas.items() if name.startswith(TEXT)}
    own_alphas = {name: float(value) for name, value in alphas.items() if name not in text_alphas}
    modules = {module_of_alpha(name): value for name, value in convert_unet_state_dict_to_peft(own_alphas).items()}
    return plain, text, modules, text_alphas


def text_peft_name(name: str) -> str:
    """A text encoder's tensor in peft's names, from diffusers' (.lora_linear_layer.down; older: to_q_lora.down)."""
    name = re.sub(r"\.to_(q|k|v|out)_lora\.", r".\1_proj.lora_linear_layer.", name)
    for theirs, ours in ((".down.", ".lora_A."), (".up.", ".lora_B.")):
        name = name.replace(f".lora_linear_layer{theirs}", ours).replace(f".lora{theirs}", ours)
    return name


def module_of_alpha(alpha: str) -> str:
    """The module that an alpha is of: kohya's are keyed by a weight of it once they are converted."""
    return re.sub(r"(\.lora_[AB](\.weight)?)?\.alpha$", "", alpha)


def _bare(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).removeprefix("unet.")


def is_alpha(value: Any) -> bool:
    """Whether a value is one finite number above 0."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return False
    try:
        return math.isfinite(float(value)) and float(value) > 0
    except (TypeError, ValueError):
        return False
