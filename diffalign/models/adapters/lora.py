"""LoRA on peft, stored in the diffusers layout with the metadata that makes alpha travel.

`save_lora_weights` alone loses lora_alpha: a reader then assumes alpha = rank and scales the update wrongly. The
adapter's config is therefore written into the file, and read back.

Dropout is refused, here and in any network that is tuned (`refuse_dropout`): policy and reference would differ by its
draws, and a gradient taken in two passes would belong to another draw than its loss.
Files of others are read by `lora_file.py`. DoRA is `dora.py`. Left out: other variants, adapters on the text encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from diffalign.io.weight_files import order_metadata
from diffalign.models.adapters.dora import MAGNITUDE, reset_magnitudes
from diffalign.models.adapters.lora_file import LORA_FILE, LoraFile, read_lora
from diffalign.models.loading.family import Family, ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.sharding import joined

ADAPTER = "default"
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_WHY_NO_DROPOUT = "its random masks differ between policy and reference, and between the two passes of a gradient"
_ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern")


def add_lora(
    unet: UNet,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] = DEFAULT_TARGETS,
    dropout: float = 0.0,
    seed: int = 0,
    use_dora: bool = False,
) -> None:
    """Freeze `unet` and add trainable float32 LoRA layers to every module whose name ends in a target.

    The update is (alpha / rank) · B A; alpha None means alpha = rank. A ~ N(0, 1/rank²) from `seed` (diffusers'
    "gaussian" init, drawn on the CPU so that it is the same on every device), B = 0. With `use_dora` (linear layers)
    the lengths of the weights' rows are trained as well; `start_magnitudes` once the base is in its place and dtype.
    Raises ModelError for dropout, a target that matches nothing, a rank above a layer's own, or a second adapter.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ModelError(f"rank = {rank}: a LoRA needs a rank of at least 1 (4 to 128 are usual)")
    if dropout:
        raise ModelError(f"dropout = {dropout}: LoRA is tuned without dropout, because {_WHY_NO_DROPOUT}; remove it")
    if lora_layers(unet):
        raise ModelError("this UNet already has LoRA layers; load a fresh base to start another adapter")
    check_targets(unet, target_modules, rank)
    scale: Any = rank if alpha is None else alpha  # peft's annotation says int, and any number is right
    config = LoraConfig(
        r=rank,
        lora_alpha=scale,
        target_modules=list(target_modules),
        init_lora_weights="gaussian",
        use_dora=use_dora,
    )
    _inject(unet, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(unet):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a.copy_(torch.randn(a.shape, generator=generator) / rank)
            b.zero_()
    if use_dora:
        start_magnitudes(unet)


def start_magnitudes(unet: UNet) -> None:
    """Set the lengths of a DoRA to those of its weights as they are now, so that it changes nothing at B = 0."""
    reset_magnitudes(lora_layers(unet), ADAPTER)


def refuse_dropout(network: nn.Module) -> None:
    """Raises ModelError that names the modules of a network to be tuned which drop something at random."""
    found = [
        (name, module.p) for name, module in network.named_modules() if isinstance(module, _DropoutNd) and module.p > 0
    ]
    if found:
        named = ", ".join(f"{name} (p = {p:g})" for name, p in found[:3]) + (", …" if len(found) > 3 else "")
        raise ModelError(
            f"the network to be tuned has dropout in {len(found)} module{'s' * (len(found) > 1)}: {named}. "
            f"It is not supported, because {_WHY_NO_DROPOUT}. Set dropout to 0 in the base's "
            "unet/config.json (its weights stay the same), or p = 0 in those modules"
        )


def lora_layers(unet: UNet) -> list[Any]:
    """The peft layers of `unet` in module order; empty without LoRA. Walks the network: call it once."""
    from peft.tuners.lora import LoraLayer

    return [module for module in unet.modules() if isinstance(module, LoraLayer)]


def lora_parameters(unet: UNet) -> list[nn.Parameter]:
    """The trainable LoRA weights, in module order: A, B and, of a DoRA, the lengths of rows."""
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    return [getattr(layer, p)[ADAPTER].weight for layer in lora_layers(unet) for p in parts if len(getattr(layer, p))]


def leave_casts_to_autocast(unet: UNet) -> None:
    """Stop peft from casting each LoRA input to float32, which autocast only casts back: same numbers, fewer copies.

    For networks that are called under autocast, or whose base computes in float32 as well.
    """
    for layer in lora_layers(unet):
        layer.cast_input_dtype_enabled = False


def fuse_lora(unet: UNet) -> None:
    """Gives the LoRA layers a forward of fewer operators, for training; other rounding than peft's, nothing else."""
    from diffalign.models.adapters.fast_lora import fuse

    fuse(unet)


def save_lora(unet: UNet, directory: str | Path, family: Family) -> Path:
    """Write `pytorch_lora_weights.safetensors`, loadable by the family's pipeline with `load_lora_weights`."""
    return write_lora(unet.peft_config[ADAPTER], adapter_state(unet), directory, family)


def adapter_state(unet: UNet) -> dict[str, Tensor]:
    """The adapter's weights on the CPU, with peft's keys. Shards are joined, for which all processes must call."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    return {key: joined(value.detach()).cpu() for key, value in state.items()}


def write_lora(config: Any, state: dict[str, Tensor], directory: str | Path, family: Family) -> Path:
    """Write a peft LoraConfig and weights keyed "module.lora_A.weight", as such a file."""
    import diffusers

    cls = {"sdxl": diffusers.StableDiffusionXLPipeline, "sd": diffusers.StableDiffusionPipeline}[family.name]
    cls.save_lora_weights(
        str(directory),
        unet_lora_layers=state,
        unet_lora_adapter_metadata=_adapter_metadata(config),
        safe_serialization=True,
    )
    order_metadata(Path(directory) / LORA_FILE)
    return Path(directory) / LORA_FILE


def load_lora(unet: UNet, path: str | Path) -> None:
    """Load a LoRA (`read_lora`: a file or a folder with one) exactly, in float32 and with its alpha.

    A UNet without an adapter gets the file's; one that has an adapter must have the same shape of it.
    Raises ModelError when the file has no UNet LoRA, has more than that, or does not fit.
    """
    lora = read_lora(path, unet).unet_only()
    if lora_layers(unet):
        _check_same(unet, lora)
    place_lora(unet, lora)


def place_lora(unet: UNet, lora: LoraFile) -> None:
    """Put a file's weights onto a UNet that it fits, into the adapter that is there or a new one."""
    if not lora_layers(unet):
        _inject(unet, lora.config(unet))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.copy_(lora.state[_name_in_file(name)])


def adapter_weights(unet: UNet, path: str | Path) -> dict[str, Tensor]:
    """The weights in a LoRA file by the names of the parameters that they are for, of a UNet with an adapter.

    Raises ModelError unless the file's adapter has the shape of this one: rank, alpha, modules.
    """
    lora = read_lora(path, unet).unet_only()
    _check_same(unet, lora)
    own = [name for name, _ in unet.named_parameters() if ".lora_" in name]
    return {name: lora.state[_name_in_file(name)] for name in own}


def _name_in_file(parameter: str) -> str:
    """The name in a LoRA file of a parameter of the adapter; that of a DoRA's lengths ends without ".weight"."""
    bare = parameter.removesuffix(f".{ADAPTER}.weight")
    return bare if bare.endswith(MAGNITUDE) else f"{bare}.weight"


def _check_same(unet: UNet, lora: LoraFile) -> None:
    """Raise ModelError unless the UNet's adapter is of the file's shape."""
    present, config = unet.peft_config[ADAPTER], lora.config(unet)
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora"):
        if getattr(present, field) != getattr(config, field):
            raise ModelError(
                f"{lora.file} has {field} = {getattr(config, field)!r}, this run's adapter "
                f"{getattr(present, field)!r}; use the file's value in the config, or start from a fresh adapter"
            )
    own = {_name_in_file(name) for name, _ in unet.named_parameters() if ".lora_" in name}
    if own != lora.state.keys():
        raise ModelError(
            f"{lora.file} has LoRA weights for {len(lora.state) // 2} modules, this run's adapter for {len(own) // 2}; "
            f"e.g. {sorted(own ^ lora.state.keys())[0]} exists on one side only. Use the same "
            "target_modules"
        )


def _inject(unet: UNet, config: Any) -> None:
    """Add the adapter in float32, whatever the dtype of the base, and freeze everything else."""
    unet.requires_grad_(False)
    unet.add_adapter(config, adapter_name=ADAPTER)
    for parameter in lora_parameters(unet):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def check_targets(unet: UNet, targets: Sequence[str], rank: int) -> None:
    """Raise ModelError for targets that match no module, and for a rank above what one of them can have."""
    names = [name for name, _ in unet.named_modules()]
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if unknown or not targets:
        known = sorted({name.rsplit(".", 1)[-1] for name, m in unet.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"target_modules {unknown or list(targets)} match no module of this UNet; its linear layers end in "
            f"{', '.join(known)} (write to_out.0 for attention outputs)"
        )
    for name, module in unet.named_modules():
        if any(name == t or name.endswith(f".{t}") for t in targets):
            weight: Any = getattr(module, "weight", None)
            largest = min(weight.shape[0], weight[0].numel()) if isinstance(weight, nn.Parameter) else rank
            if rank > largest:
                raise ModelError(
                    f"rank = {rank} is above the largest rank of {name}, whose weight is {list(weight.shape)}: "
                    f"set tuning.rank to at most {largest}, remove that layer from "
                    "tuning.target_modules, or use tuning.method: full"
                )


def _adapter_metadata(config: Any) -> dict[str, Any]:
    """What a reader needs of a LoraConfig, as JSON: few fields, so that other peft versions can read it too."""
    values = {field: getattr(config, field) for field in _ADAPTER_FIELDS}
    dora = {"use_dora": True} if config.use_dora else {}
    return values | {"target_modules": sorted(values["target_modules"])} | dora
