"""Sums of tuned weights: soups, extrapolations, and the negative networks of Diffusion-NPO.

    θ = θ_base + Σ_i w_i (θ_i − θ_base)

    Σ w = 1                an average: model soup (arXiv 2203.05482), the soup reference of SALSA (arXiv 2411.01798)
    one part, w > 1        extrapolation past a tuned model: ExPO, w = 1 + α (arXiv 2404.16792)
    A = 1 + w, B = −w      momentum: on from an earlier checkpoint B through a later one A
    POSITIVE = a, NPO = 1  Diffusion-NPO's negative network for a tuned positive one, `contrib/negative_guidance.py`

LoRA files give a LoRA file, exactly: ranks are concatenated, [A_1; A_2] and [w_1 s_1 B_1, w_2 s_2 B_2] with s = alpha /
rank, since averaging the A and the B would not average their products. Its rank is the sum of the ranks. With a full
UNet or a DoRA among them the result is a full UNet, summed in float64.

Left out: merging by sign or size (TIES, DARE), text encoders, truncating the rank back by an SVD.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.io.files import remove, room_for, save_text, share, sync, take_place, temporary
from diffalign.io.weight_files import check_weights
from diffalign.models.adapters.dora import MAGNITUDE, dora_weight, refuse_factors
from diffalign.models.adapters.lora import write_lora
from diffalign.models.adapters.lora_file import LORA_FILE, LoraFile, is_dora, lora_config, read_lora
from diffalign.models.adapters.lycoris import is_lycoris, lycoris_changes
from diffalign.models.adapters.save_load import UNET_FOLDER, TunedWeights, find_tuned, load_full
from diffalign.models.loading.base import Base
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import UNet

MERGE_FILE = "merge.json"

Parts = Sequence[tuple[str, float]]  # tuned weights, as `find_tuned` takes them, and the weight of each


LARGEST_WEIGHT = 100.0  # of a part; published extrapolations stay below 10


def check_factors(parts: Parts) -> None:
    """Raises ModelError for weights that make no sum: not finite, far too large, or 0 together."""
    for path, weight in parts:
        if not abs(weight) <= LARGEST_WEIGHT:
            raise ModelError(
                f"{path}={weight:g}: a weight is a finite number, at most {LARGEST_WEIGHT:g} in absolute value"
            )
    total = sum(weight for _, weight in parts)
    if parts and abs(total) < 1e-6:
        words = " ".join(f"{path}={weight:g}" for path, weight in parts)
        raise ModelError(
            f"the weights of {words} sum to {total:g}, so that what the parts have in common is lost; "
            "give weights that sum to 1 (an average), or to another number than 0"
        )


def merge_tuned(base: Base, parts: Parts, output_dir: str | Path) -> Path:
    """Write base + Σ w (tuned − base) into `output_dir`, loadable wherever tuned weights are; returns file or folder.

    A `merge.json` beside it lists the parts. `base` is overwritten where the result is a full UNet.
    Raises ModelError for weights that are not finite or do not fit the base, and for a folder that has a model.
    """
    folder = Path(output_dir)
    check_factors(parts)
    found = _found(parts)
    for name in (LORA_FILE, f"{UNET_FOLDER}/config.json", "config.json", "model_index.json"):
        if (folder / name).exists():
            raise ModelError(f"{folder} already contains {name}, and nothing is overwritten; name another folder")
    record = {"base": base.source, "parts": [{"tuned": str(tuned.path), "weight": w} for tuned, w in found]}
    place = temporary(folder / "merged")
    try:
        with room_for(folder, 0, "the merged weights"):
            place.mkdir(parents=True)
            if all(tuned.kind == "lora" and _is_sum(tuned.path) for tuned, _ in found):
                written = write_lora(*_merge_loras(base.unet, found), place, base.family)
            else:
                _merge_into(base.unet, found)
                written = place / UNET_FOLDER
                base.unet.save_pretrained(written, safe_serialization=True)
            share(written)
            sync(written)
            save_text(folder / MERGE_FILE, json.dumps(record, indent=2) + "\n")  # first: weights mean a finished merge
        take_place(written, folder / written.name)
    finally:
        remove(place)
    return folder / written.name


def merge_into(unet: UNet, parts: Parts) -> None:
    """Put base + Σ w (tuned − base) onto a base's UNet without LoRA layers, in place. Raises ModelError."""
    _merge_into(unet, _found(parts))


def merge_loras_into(unet: UNet, loras: Mapping[str, float]) -> None:
    """Put LoRAs at their weights onto a base's UNet, in place. Raises ModelError for weights that are no LoRA."""
    found = _found(list(loras.items()))
    if whole := [str(tuned.path) for tuned, _ in found if tuned.kind != "lora"]:
        raise ModelError(
            f"merge_lora: {whole[0]} is a full UNet; use it as tuned weights, or make it part of a base with "
            "`diffalign merge` and `diffalign export --to single-file`"
        )
    changes = [(lora_changes(unet, tuned.path), weight) for tuned, weight in found]
    with torch.no_grad():
        for name, own in unet.named_parameters():
            if used := [(change[name], weight) for change, weight in changes if name in change]:
                own.copy_(own.double() + torch.stack([weight * change(own) for change, weight in used]).sum(0))


def lora_updates(unet: UNet, file: Path) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """(module, A, B, alpha / rank) of every module in a LoRA file. Raises ModelError for a DoRA, or one not fitting."""
    lora = read_lora(file, unet).unet_only()
    if lora.use_dora:
        raise refuse_factors(lora.file)
    for name, alpha in lora.alphas.items():
        down = lora.state[f"{name}.lora_A.weight"]
        yield name, down, lora.state[f"{name}.lora_B.weight"], alpha / len(down)


def lora_changes(unet: UNet, file: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """By a weight's name: its change by a LoRA or DoRA file, in float64, as a function of the base's own weight.

    Raises ModelError where the file does not fit.
    """
    if is_lycoris(check_weights(file).shapes):
        return lycoris_changes(unet, file)
    lora = read_lora(file, unet).unet_only()
    return {f"{name}.weight": partial(_change, lora, name) for name in lora.alphas}


@torch.no_grad()
def _change(lora: LoraFile, name: str, weight: Tensor) -> Tensor:
    down, up = (lora.state[f"{name}.lora_{side}.weight"].double().flatten(1) for side in "AB")
    update = lora.alphas[name] / len(down) * (up @ down).view_as(weight)
    if (magnitude := lora.state.get(name + MAGNITUDE)) is None:
        return update
    own = weight.double()
    return dora_weight(own, update, magnitude.double()) - own


def _is_sum(file: Path) -> bool:
    """Whether a LoRA file is a plain one, whose update is B A."""
    return not is_dora(file) and not is_lycoris(check_weights(file).shapes)


def _found(parts: Parts) -> list[tuple[TunedWeights, float]]:
    if not parts:
        raise ModelError("nothing to merge: give at least one PATH=WEIGHT")
    if bad := [f"{path}={weight}" for path, weight in parts if not math.isfinite(weight)]:
        raise ModelError(f"{', '.join(bad)}: a weight is a finite number")
    found = [(find_tuned(path), float(weight)) for path, weight in parts]
    if added := [f"{tuned.path} is {tuned.layout.label}" for tuned, _ in found if tuned.layout.adds_layers]:
        raise ModelError(
            f"{', '.join(added)}: it adds layers to the base and changes none of its weights, so it cannot be merged; "
            "merge LoRA files and full UNets"
        )
    return found


def _merge_loras(unet: UNet, found: Sequence[tuple[TunedWeights, float]]) -> tuple[Any, dict[str, Tensor]]:
    """peft config and weights of the LoRA whose update is the weighted sum of the files' updates."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for tuned, weight in found:
        for name, down, up, scale in lora_updates(unet, tuned.path):
            parts.setdefault(name, []).append((down, (weight * scale * up.double()).float()))
    state = {}
    for name, sides in parts.items():
        state[f"{name}.lora_A.weight"] = torch.cat([down for down, _ in sides]).contiguous()
        state[f"{name}.lora_B.weight"] = torch.cat([up for _, up in sides], dim=1).contiguous()
    ranks = {name: state[f"{name}.lora_A.weight"].shape[0] for name in parts}
    config = lora_config(ranks, ranks)  # alpha = rank everywhere: the scales are in B
    return config, state


@torch.no_grad()
def _merge_into(unet: UNet, found: Sequence[tuple[TunedWeights, float]]) -> None:
    full = sum(weight for tuned, weight in found if tuned.kind == "unet")
    total = {name: (1.0 - full) * p.double() for name, p in unet.named_parameters()}
    own = dict(unet.named_parameters())
    for tuned, weight in sorted(found, key=lambda part: part[0].kind == "unet"):  # while the weights are the base's
        if tuned.kind == "lora":
            for name, change in lora_changes(unet, tuned.path).items():
                total[name] += weight * change(own[name])
        else:
            load_full(unet, tuned.path)  # the base is in `total` by now
            for name, p in unet.named_parameters():
                total[name] += weight * p.double()
    for name, p in unet.named_parameters():
        p.copy_(total[name])
