"""LoRA on peft, stored in the diffusers layout with the metadata that makes alpha travel.

`save_lora_weights` alone loses lora_alpha: a reader then assumes alpha = rank and scales the update wrongly. The
adapter's config is therefore written into the file, and read back.

Dropout acts in train mode only and on the policy only; the reference never has it. At B = 0 the two still agree
exactly; once B has moved, dropout adds its own noise to every margin. 0 is the default for that reason.
Left out: DoRA and other variants, adapters on the text encoders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.models.family import Family, ModelError

ADAPTER = "default"
LORA_FILE = "pytorch_lora_weights.safetensors"
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for the JSON in the file's header
_ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern")


def add_lora(
    unet: nn.Module,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] = DEFAULT_TARGETS,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Freeze `unet` and add trainable float32 LoRA layers to every module whose name ends in a target.

    The update is (alpha / rank) · B A; alpha None means alpha = rank. A ~ N(0, 1/rank²) from `seed` (diffusers'
    "gaussian" init, drawn on the CPU so that it is the same on every device), B = 0.
    Raises ModelError for a target that matches nothing, or when an adapter is there already.
    """
    from peft import LoraConfig

    if rank < 1:
        raise ModelError(f"rank = {rank}: a LoRA needs a rank of at least 1 (4 to 128 are usual)")
    if lora_layers(unet):
        raise ModelError("this UNet already has LoRA layers; load a fresh base to start another adapter")
    _check_targets(unet, target_modules)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=list(target_modules),
        lora_dropout=dropout,
        init_lora_weights="gaussian",
    )
    _inject(unet, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(unet):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a.copy_(torch.randn(a.shape, generator=generator) / rank)
            b.zero_()


def lora_layers(unet: nn.Module) -> list[Any]:
    """The peft layers of `unet` in module order; empty without LoRA. Walks the network: call it once."""
    from peft.tuners.lora import LoraLayer

    return [module for module in unet.modules() if isinstance(module, LoraLayer)]


def lora_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """The trainable LoRA weights, in module order."""
    return [part.weight for layer in lora_layers(unet) for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])]


def leave_casts_to_autocast(unet: nn.Module) -> None:
    """Stop peft from casting each LoRA input to float32, which autocast only casts back: same numbers, fewer copies.

    For networks that are called under autocast, or whose base computes in float32 as well.
    """
    for layer in lora_layers(unet):
        layer.cast_input_dtype_enabled = False


def fuse_lora(unet: nn.Module) -> None:
    """Gives the LoRA layers a forward of fewer operators, for training; other rounding than peft's, nothing else."""
    from diffalign.models.lora_linear import fuse

    fuse(unet)


def save_lora(unet: nn.Module, directory: str | Path, family: Family) -> Path:
    """Write `pytorch_lora_weights.safetensors`, loadable by the family's pipeline with `load_lora_weights`."""
    from peft.utils import get_peft_model_state_dict

    state = {key: value.detach().cpu() for key, value in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items()}
    return write_lora(unet.peft_config[ADAPTER], state, directory, family)


def write_lora(config: Any, state: dict[str, Tensor], directory: str | Path, family: Family) -> Path:
    """Write what `read_lora` gives, a peft LoraConfig and weights keyed "module.lora_A.weight", as such a file."""
    import diffusers

    cls = {"sdxl": diffusers.StableDiffusionXLPipeline, "sd": diffusers.StableDiffusionPipeline}[family.name]
    cls.save_lora_weights(
        str(directory),
        unet_lora_layers=state,
        unet_lora_adapter_metadata=_adapter_metadata(config),
        safe_serialization=True,
    )
    return Path(directory) / LORA_FILE


def load_lora(unet: nn.Module, path: str | Path) -> None:
    """Load a LoRA file (or a folder with one) to look at or to train on, exactly: float32, alpha from the file.

    A UNet without an adapter gets the file's; one that has an adapter must have the same shape of it.
    Files in kohya's layout are converted by diffusers. Raises ModelError when the file holds no UNet LoRA, holds more
    than that, or does not fit.
    """
    file = lora_file(path)
    if not lora_layers(unet):
        check_lora_fits(file, unet)
        _inject(unet, read_lora(file, unet)[0])
    weights = adapter_weights(unet, file)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def adapter_weights(unet: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The weights in a LoRA file by the names of the parameters that they are for, of a UNet with an adapter.

    Raises ModelError unless the file's adapter has the shape of this one: rank, alpha, modules.
    """
    file = lora_file(path)
    check_lora_fits(file, unet)
    config, state = read_lora(file, unet)
    present = unet.peft_config[ADAPTER]
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        if getattr(present, field) != getattr(config, field):
            raise ModelError(
                f"{file} has {field} = {getattr(config, field)!r}, this run's adapter {getattr(present, field)!r}; "
                "use the file's value in the config, or start from a fresh adapter"
            )
    own = {name for name, _ in unet.named_parameters() if ".lora_" in name}
    theirs = {key.replace(".weight", f".{ADAPTER}.weight"): value for key, value in state.items()}
    if own != theirs.keys():
        raise ModelError(
            f"{file} has LoRA weights for {len(theirs) // 2} modules, this run's adapter for {len(own) // 2}; "
            f"e.g. {sorted(own ^ theirs.keys())[0]} is on one side only. Use the same target_modules"
        )
    return theirs


def lora_file(path: str | Path) -> Path:
    """The LoRA file at `path`, which may be the folder that holds it."""
    path = Path(path)
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"no LoRA file at {path}: expected a .safetensors file or a folder with {LORA_FILE}")
    return file


def check_lora_fits(file: Path, unet: nn.Module) -> None:
    """Raise ModelError unless every UNet weight in the file has a module of its shape here.

    diffusers' own loader only warns, and makes pictures with the part that fits.
    """
    for key, value in _unet_weights(_read(file, unet)[0]).items():
        name, _, side = key.removesuffix(".weight").rpartition(".")
        try:
            module = unet.get_submodule(name)
        except AttributeError as error:
            raise ModelError(f"{file} does not fit this base: it has a LoRA for {name}, the UNet does not") from error
        weight = getattr(module, "base_layer", module).weight
        own, axis = (weight.shape[1], 1) if side == "lora_A" else (weight.shape[0], 0)
        if value.shape[axis] != own:
            raise ModelError(
                f"{file} does not fit this base: its {key} has {value.shape[axis]} where the UNet's module has {own}"
            )


def read_lora(file: Path, unet: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """(peft LoraConfig, weights keyed "module.lora_A.weight") of a LoRA file for this UNet."""
    from diffusers.utils import convert_unet_state_dict_to_peft, get_peft_kwargs
    from peft import LoraConfig

    everything, alphas = _read(file, unet)
    foreign = sorted({key.split(".")[0] for key in everything} - {"unet"})
    if foreign or not everything:
        raise ModelError(
            f"{file} holds LoRA weights for {', '.join(foreign) or 'nothing'}; only UNet adapters are tuned here, and "
            "dropping the rest would change the picture. Merge it into the base first if you want to train on it"
        )
    state = _unet_weights(everything)
    with safe_open(file, framework="pt") as opened:
        written = json.loads((opened.metadata() or {}).get(_METADATA_KEY, "{}"))
    if written:
        fields = {key.removeprefix("unet."): value for key, value in written.items()}
        return LoraConfig(**{key: fields[key] for key in _ADAPTER_FIELDS if key in fields}), state
    ranks = {f"^{key}": value.shape[1] for key, value in state.items() if "lora_B" in key}
    # kohya's alphas are keyed by a weight of their module: the same renaming leads them to it
    alphas = {key.removeprefix("unet.").removesuffix(".alpha"): value for key, value in alphas.items()}
    alphas = {f"{key}.alpha": value for key, value in convert_unet_state_dict_to_peft(alphas).items()}
    return LoraConfig(**get_peft_kwargs(ranks, alphas, state)), state


def _read(file: Path, unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and alphas in one of diffusers' layouts, whatever layout the file is in."""
    from diffusers import StableDiffusionXLPipeline

    weights = load_file(file)
    if not any("lora" in key for key in weights):
        raise ModelError(
            f"{file} is no LoRA: none of its {len(weights)} tensors is named so (e.g. {next(iter(weights))})"
        )
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(weights, unet_config=unet.config)
    return state, alphas or {}


def _unet_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.utils import convert_unet_state_dict_to_peft

    return convert_unet_state_dict_to_peft(
        {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
    )


def _inject(unet: nn.Module, config: Any) -> None:
    """Add the adapter, freeze everything else, and hold its weights in float32 whatever the base is in."""
    unet.requires_grad_(False)
    unet.add_adapter(config, adapter_name=ADAPTER)
    for parameter in lora_parameters(unet):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _check_targets(unet: nn.Module, targets: Sequence[str]) -> None:
    names = [name for name, _ in unet.named_modules()]
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if unknown or not targets:
        known = sorted({name.rsplit(".", 1)[-1] for name, m in unet.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"target_modules {unknown or list(targets)} match no module of this UNet; its linear layers end in "
            f"{', '.join(known)} (write to_out.0 for attention outputs)"
        )


def _adapter_metadata(config: Any) -> dict[str, Any]:
    """What a reader needs of a LoraConfig, as JSON: few fields, so that other peft versions can read it too."""
    values = {field: getattr(config, field) for field in _ADAPTER_FIELDS}
    return values | {"target_modules": sorted(values["target_modules"])}
