"""DoRA (arXiv 2402.09353): a LoRA with a trained length for every row of a layer's weight.

    W' = m · V / ‖V‖,   V = W + (α/r) · B A,   ‖V‖ the length of each row, m [out] at the start ‖W‖

peft has the layers. Here is what training, merging and files need besides: the lengths at the start, computed from
the frozen weights in the dtype and on the device that they have in training, so that policy and reference agree to
the bit, and the change of a weight, which depends on that weight and is no product of two small matrices.
Left out: DoRA of convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import ModelError

MAGNITUDE = ".lora_magnitude_vector"  # the end of a tensor's name, in files of peft and diffusers


def has_magnitudes(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a DoRA's."""
    return any(name.endswith(MAGNITUDE) for name in names)


def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ of each row of W "out in", for A "rank in" and B "out rank": float32 [out], without a gradient.

    The paper treats it as a constant (section 4.3).
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return torch.linalg.vector_norm(weight.float() + scale * (b.float() @ a.float()), dim=1)


def reset_magnitudes(layers: Sequence[Any], adapter: str) -> None:
    """Set the m of peft's layers to ‖V‖ as it is now: with B = 0 the layers then compute what their base computes."""
    for layer in layers:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        lengths = row_lengths(layer.base_layer.weight, a, b, layer.scaling[adapter])
        layer.lora_magnitude_vector[adapter].weight.data = lengths


def dora_weight(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """W' "out in" for W, s B A and m, in their dtype."""
    moved = weight + update
    return (magnitude / torch.linalg.vector_norm(moved, dim=1))[:, None] * moved


def check_linear(network: nn.Module, targets: Sequence[str]) -> None:
    """Raise ModelError for targets that are no linear layers."""
    for name, module in network.named_modules():
        if any(name == t or name.endswith(f".{t}") for t in targets) and not isinstance(module, nn.Linear):
            raise ModelError(
                f"tuning.use_dora: {name} is a {type(module).__name__}, and DoRA is supported for linear layers "
                "alone; remove it from tuning.target_modules, or set tuning.use_dora: false"
            )


def check_use_dora(file: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Raise ModelError where peft's config of a file, if it has one, and the file's tensors disagree on DoRA."""
    found, written = has_magnitudes(weights), metadata.get("use_dora", False)
    if bool(written) != found and metadata:
        raise ModelError(
            f"{file}: peft's config has use_dora = {written!r}, and the file {'has' if found else 'has no'} tensors "
            f"*{MAGNITUDE}: weights and config are not from the same adapter; save it again"
        )


def magnitude_faults(state: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> list[str]:
    """What is wrong with a DoRA's lengths beside A and B, for a network's modules; nothing for a plain LoRA."""
    found = {name.removesuffix(MAGNITUDE): value for name, value in state.items() if name.endswith(MAGNITUDE)}
    faults = []
    for name, value in found.items():
        layer = modules.get(name)
        weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
        fits = isinstance(weight, Tensor) and weight.ndim == 2 and value.shape == weight.shape[:1]
        if not fits or f"{name}.lora_A.weight" not in state:
            faults.append(
                f"{name}{MAGNITUDE} is {list(value.shape)}; required: one length for each output of a linear layer, "
                f"and lora_A beside it; the base's weight there is {None if weight is None else list(weight.shape)}"
            )
    modules_of = (name.removesuffix(".lora_A.weight") for name in state if found and name.endswith(".lora_A.weight"))
    return faults + [
        f"{name} has no {MAGNITUDE[1:]}, as every layer of a DoRA has" for name in modules_of if name not in found
    ]


def refuse_factors(file: Path) -> ModelError:
    """The error for a DoRA where only a product of two matrices has a place."""
    return ModelError(
        f"{file} is a DoRA, whose change of a weight depends on the lengths of that weight's rows and is no product of "
        "two small matrices; what is asked for needs a plain LoRA. `diffalign export --to single-file` and `diffalign "
        "merge` write a full model with it, and `diffalign export --extract-rank 64` a plain LoRA that approximates it"
    )
