"""The two layouts of the core: diffusers' UNet folder and diffusers' LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.io.loaded_weights import is_finite
from diffalign.io.weight_files import check_weights
from diffalign.models.adapters.lora import load_lora, lora_layers, lora_parameters, place_lora, save_lora
from diffalign.models.adapters.lora_file import LORA_FILE, PEFT_FILE, LoraFile, is_dora, read_lora
from diffalign.models.adapters.methods import WeightLayout
from diffalign.models.loading.family import Family, ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.loading.stored import UNET_STEM, check_folder_weights, stored_unet

UNET_FOLDER = "unet"


class UNetFolder(WeightLayout):
    """All weights of the UNet: a diffusers folder, or its one file alone, as some models are released."""

    kind = "unet"
    label = "a full UNet"
    names = (UNET_FOLDER,)

    def find(self, folder: Path) -> list[Path]:
        """The folder itself, or `unet/` in it."""
        configs = (folder / "config.json", folder / UNET_FOLDER / "config.json")
        return [config.parent for config in configs if config.is_file()]

    def owns(self, file: Path) -> bool:
        """Whether it has a UNet's first convolution, under diffusers' name."""
        return "conv_in.weight" in check_weights(file).shapes

    def check_whole(self, path: Path) -> None:
        """Every shard is there."""
        if path.is_dir():
            check_folder_weights(path, UNET_STEM)

    def check_fit(self, unet: UNet, path: Path) -> None:
        """The same tensors with the same shapes."""
        stored_unet(path, unet)

    def is_on(self, unet: UNet) -> bool:
        """Every UNet has weights."""
        return True

    def save(self, unet: UNet, folder: Path, family: Family) -> Path:
        """`unet/` as diffusers writes it."""
        unet.save_pretrained(folder / UNET_FOLDER, safe_serialization=True)
        return folder / UNET_FOLDER

    def load(self, unet: UNet, path: Path) -> None:
        """In place and in the UNet's dtype."""
        load_full(unet, path)

    def apply_at(self, pipeline: Any, path: Path, strength: float) -> None:
        """The weights between base and tuned, or beyond, computed in float64."""
        load_full(pipeline.unet, path, strength)


class LoraWeights(WeightLayout):
    """A LoRA: diffusers' file with the adapter's metadata."""

    kind = "lora"
    label = "a LoRA"
    names = (LORA_FILE,)

    def find(self, folder: Path) -> list[Path]:
        """Our name for the file, or peft's."""
        return [folder / name for name in (LORA_FILE, PEFT_FILE) if (folder / name).is_file()]

    def check_fit(self, unet: UNet, path: Path) -> None:
        """Each tensor belongs to a layer of this UNet, and none to a text encoder."""
        read_lora(path, unet).unet_only()

    def is_on(self, unet: UNet) -> bool:
        """Whether peft's layers are there."""
        return bool(lora_layers(unet))

    def adds(self, parameter: str) -> bool:
        """A, B, and a DoRA's lengths of rows."""
        return ".lora_" in parameter

    def save(self, unet: UNet, folder: Path, family: Family) -> Path:
        """The file that diffusers' `load_lora_weights` reads."""
        return save_lora(unet, folder, family)

    def load(self, unet: UNet, path: Path) -> None:
        """Into the UNet's adapter, or into a new one; the layers stay separate."""
        load_lora(unet, path)

    def apply(self, pipeline: Any, path: Path, user: Any = None) -> None:
        """Onto the UNet and, where the file says so, the text encoders."""
        apply_lora(pipeline, read_lora(path, pipeline.unet))

    def apply_at(self, pipeline: Any, path: Path, strength: float) -> None:
        """The factor of every layer's update, as diffusers' `set_adapters` has it, text encoders included."""
        if is_dora(path):
            raise ModelError(
                f"{path} is a DoRA, and its strength cannot be changed: its update is no sum that a factor scales; "
                "leave the strength at 1"
            )
        self.apply(pipeline, path)
        tuned: list[Any] = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        for layer in (layer for part in tuned for layer in lora_layers(part)):
            layer.scale_layer(strength)


UNET, LORA = UNetFolder(), LoraWeights()


def load_full(unet: UNet, folder: Path, strength: float = 1.0) -> None:
    """Puts the UNet in a diffusers folder onto a base's, in place and in its dtype. Raises ModelError if unlike it.

    With another strength than 1 the result is own + strength · (folder's − own).
    """
    read = stored_unet(folder, unet)
    with torch.no_grad():
        for name, own in unet.state_dict().items():
            value = read(name)
            if not is_finite(value):
                raise ModelError(
                    f"the tuned UNet in {folder} has NaN or infinite values in {name}: the training that "
                    "wrote it had diverged; use an earlier checkpoint"
                )
            own.copy_(value if strength == 1 else own.double().lerp(value.to(own.device).double(), strength))


def apply_lora(pipeline: Any, lora: LoraFile) -> None:
    """A LoRA on the UNet and, where the file says so, the text encoders. Raises ModelError unless all of it acts."""
    if lora_layers(pipeline.unet):
        raise ModelError(f"this pipeline already has a LoRA, and {lora.file} would replace it; load a new pipeline")
    parts = [(pipeline.unet, lora)] if lora.state else []
    for component in sorted({name.split(".")[0] for name in lora.text}):
        encoder = getattr(pipeline, component, None)
        if encoder is None:
            raise ModelError(
                f"{lora.file} has LoRA weights for {component}, and this base has none: use the base it was made for"
            )
        parts.append((encoder, lora.for_text(component, encoder)))
    for module, part in parts:  # nothing is placed before all of it fits
        place_lora(module, part)
        dtype = module.dtype  # asked once: diffusers goes through all modules for it
        for parameter in lora_parameters(module):
            parameter.data = parameter.data.to(dtype)
