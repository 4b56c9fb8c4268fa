"""LoRA files in the layouts that are in use, read as one: A, B and alpha by the names of this UNet's modules.

    unet.MODULE.lora_A.weight               diffusers, with or without metadata; its older names (.lora.down) as well
    MODULE.lora_A.weight                    a UNet's own file (diffusers' save_lora_adapter)
    base_model.model.MODULE.lora_A.weight   peft; rank and alpha are in the adapter_config.json beside it
    lora_unet_MODULE.lora_down.weight       kohya's sd-scripts

A module without an alpha has alpha = rank, as in diffusers and sd-scripts. A file is used completely or refused:
libraries only warn of tensors that match no layer, and apply the rest. A DoRA (`dora.py`) is read in the first three
layouts. Kohya's DoRA, LoHa, LoKr and LoCon with a middle become part of a base alone (`lycoris.py`). Refused everywhere
alike: other LyCORIS kinds, biases, and adapters whose training changed the base (PiSSA, OLoRA).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.io.loaded_weights import NAMED, is_finite, named
from diffalign.io.weight_files import check_weights
from diffalign.models.adapters.dora import MAGNITUDE, check_use_dora, has_magnitudes, magnitude_faults
from diffalign.models.adapters.lora_names import PART, converted_names, is_alpha, module_of_alpha, text_peft_name
from diffalign.models.adapters.lycoris import is_lycoris
from diffalign.models.loading.family import ModelError
from diffalign.models.loading.modules import TextModel, UNet

log = logging.getLogger(__name__)

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
METADATA_KEY = "lora_adapter_metadata"  # diffusers' name for the JSON in the file's header
_PEFT_CONFIG = "adapter_config.json"
# kinds that are no plain LoRA: a part of a tensor's name -> the kind
_OTHER_KINDS = {
    "dora_scale": "kohya's DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a middle tensor",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".diff_b": "a full difference of weights",
}
_OTHER_SETTINGS = ("lora_bias", "modules_to_save", "layer_replication", "use_qalora")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraFile:
    """A file that fits a UNet."""

    file: Path
    state: Mapping[str, Tensor]  # "module.lora_A.weight" and .lora_B.weight of the UNet's modules; a DoRA's lengths
    alphas: Mapping[str, float]  # of each of those modules; the update is (alpha / rank) · B A
    text: Mapping[str, Tensor]  # what is for the text encoders, in diffusers' names
    text_alphas: Mapping[str, float]
    metadata: Mapping[str, Any]  # peft's fields, as the file has them

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        return {name: len(self.state[f"{name}.lora_A.weight"]) for name in self.alphas}

    @property
    def use_dora(self) -> bool:
        """Whether it is a DoRA."""
        return has_magnitudes(self.state)

    def unet_only(self) -> LoraFile:
        """This file. Raises ModelError where it has more than a UNet's LoRA, or none."""
        if self.text or not self.state:
            parts = sorted({name.split(".")[0] for name in self.text})
            raise ModelError(
                f"{self.file} contains LoRA weights for {', '.join(parts) or 'nothing'}: {len(self.text)} "
                f"of its {len(self.text) + len(self.state)} tensors. Only UNet adapters can be tuned, "
                "merged and exported, and ignoring the rest would change the image. Train without the "
                "text encoders, or make this LoRA part of the base first (diffusers' fuse_lora and "
                "save_pretrained)"
            )
        return self

    def for_text(self, component: str, encoder: TextModel) -> LoraFile:
        """The part for one text encoder, e.g. "text_encoder_2". Raises ModelError unless all of it fits.

        diffusers' own loader is not asked: where alphas differ it gives every layer the most frequent one.
        """
        flat = not hasattr(encoder, "text_model")  # newer transformers have a CLIPTextModel without this level

        def own(names: Mapping[str, Any]) -> dict[str, Any]:
            mine = {k.removeprefix(f"{component}."): v for k, v in names.items() if k.startswith(f"{component}.")}
            return {text_peft_name(k.removeprefix("text_model.") if flat else k): v for k, v in mine.items()}

        state, metadata = own(self.text), own(self.metadata)
        alphas = {module_of_alpha(name): value for name, value in own(self.text_alphas).items()}
        _check_fit(self.file, state, len(state), encoder)
        return LoraFile(self.file, state, _alphas(self.file, state, alphas, metadata), {}, {}, metadata)

    def config(self, unet: UNet) -> Any:
        """peft's LoraConfig for it."""
        written = self.metadata.get("target_modules")
        targets = written if isinstance(written, list) and _meant(written, unet) == self.alphas.keys() else None
        return lora_config(self.ranks, self.alphas, targets, use_dora=self.use_dora)


def lora_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    targets: Sequence[str] | None = None,
    *,
    use_dora: bool = False,
) -> Any:
    """A LoraConfig that gives each module its rank and alpha; `targets` for a shorter spelling of the same modules."""
    from peft import LoraConfig

    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha: Any = Counter(alphas.values()).most_common(1)[0][0]  # peft's annotation says int
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(ranks) if targets is None else list(targets),
        rank_pattern={f"^{name}": own for name, own in ranks.items() if own != rank},
        alpha_pattern={f"^{name}": own for name, own in alphas.items() if own != alpha},
        use_dora=use_dora,
    )


def lora_file(path: str | Path) -> Path:
    """The LoRA file at `path`, which may be the folder that contains it."""
    path = Path(path)
    found = [path / name for name in (LORA_FILE, PEFT_FILE) if (path / name).is_file()] if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise ModelError(f"no LoRA file at {path}: expected a .safetensors file or a folder with {LORA_FILE}")
    return found[0]


def is_dora(file: Path) -> bool:
    """Whether a LoRA file is a DoRA, by the names in its header."""
    return has_magnitudes(check_weights(file).shapes)


def read_lora(path: str | Path, unet: UNet) -> LoraFile:
    """The LoRA at `path`, all of which fits this UNet. Raises ModelError naming file, tensors and remedy."""
    file = lora_file(path)
    metadata = _metadata(file, check_weights(file).metadata)
    weights = load_file(file)
    _check_kind(file, weights, metadata)
    state, text, alphas, text_alphas = converted_names(file, weights, unet)
    _check_finite(file, {**state, **text})
    _check_fit(file, state, len(state) + len(text), unet)
    found = LoraFile(file, state, _alphas(file, state, alphas, metadata), text, text_alphas, metadata)
    log.info("%s: all %d tensors for the UNet have a layer; %d are for text encoders", file, len(state), len(text))
    return found


def _metadata(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """What peft wrote of the adapter: in the file's header, or beside the file."""
    text, where = header.get(METADATA_KEY), f"the header of {file}"
    config = file.parent / _PEFT_CONFIG
    if text is None and file.name == PEFT_FILE and config.is_file():
        text, where = config.read_text(encoding="utf-8", errors="replace"), str(config)
    try:
        written = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not JSON ({error}): download or save the LoRA again") from error
    if not isinstance(written, dict):
        raise ModelError(f"{where} is not a JSON object: download or save the LoRA again")
    found = {key.removeprefix("unet."): value for key, value in written.items()}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = found.get(name) or {}
        if not isinstance(patterns, dict) or not all(_is_pattern(pattern) for pattern in patterns):
            raise ModelError(
                f"{where}: {name} is {patterns!r:.80}, and peft writes a mapping of patterns of module names there: "
                "save the LoRA again"
            )
    return found


def _check_kind(file: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Raise ModelError for adapters that are no plain LoRA."""
    for piece, kind in _OTHER_KINDS.items():
        found = [name for name in weights if piece in name]
        if found:
            why = f"{len(found)} of its {len(weights)} tensors have such names, e.g. {found[0]}"
            raise _other_kind(file, kind, why, mergeable=is_lycoris(weights))
    if not any("lora" in name for name in weights):
        example = f" (e.g. {next(iter(weights))})" if weights else ""
        raise ModelError(f"{file} is not a LoRA: none of its {len(weights)} tensors has a LoRA name{example}")
    for field in _OTHER_SETTINGS:
        if metadata.get(field):
            raise _other_kind(file, "an adapter of another kind", f"{field} = {metadata[field]!r}")
    if metadata.get("peft_type", "LORA") != "LORA" or metadata.get("bias", "none") not in (None, "none"):
        raise _other_kind(file, "an adapter of another kind", f"{metadata.get('peft_type')}, {metadata.get('bias')}")
    check_use_dora(file, weights, metadata)
    init = str(metadata.get("init_lora_weights", "")).lower()
    if init.startswith(_CHANGES_BASE):
        raise _other_kind(file, "an adapter whose training changed the base", f"init_lora_weights = {init!r}")


def _other_kind(file: Path, kind: str, why: str, *, mergeable: bool = False) -> ModelError:
    if mergeable:
        return ModelError(
            f"{file} is {kind}, and not a plain LoRA ({why}); it can become part of a base: model.merge_lora, "
            f"--merge-lora {file}=1, or `diffalign merge`"
        )
    return ModelError(
        f"{file} is {kind}, and not a plain LoRA ({why}); it is not supported, because a part of it "
        "would be lost. Use a plain LoRA, or make this adapter part of the base with the program that "
        "trained it"
    )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _check_finite(file: Path, weights: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in weights.items() if not is_finite(value)]
    if bad:
        raise ModelError(
            f"{file} has NaN or infinite values in {named(bad)}, {len(bad)} of {len(weights)} tensors: "
            "the training that wrote it had diverged; use an earlier checkpoint"
        )


def _check_fit(file: Path, state: Mapping[str, Tensor], total: int, network: nn.Module) -> None:
    """Raise ModelError unless every tensor has a layer of its shape, and every layer A and B."""
    modules = dict(network.named_modules())
    homeless, misshapen = [], magnitude_faults(state, modules)
    for name, value in state.items():
        if name.endswith(MAGNITUDE):
            continue
        part = PART.fullmatch(name)
        layer = modules.get(part[1]) if part else None
        weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
        if part is None or not isinstance(weight, Tensor) or weight.ndim not in (2, 4):
            homeless.append(name)
            continue
        other = state.get(f"{part[1]}.lora_{'B' if part[2] == 'A' else 'A'}.weight")
        rank = None if other is None or other.ndim < 2 else other.shape[1 if part[2] == "A" else 0]
        own = (rank, *weight.shape[1:]) if part[2] == "A" else (weight.shape[0], rank, *(1,) * (weight.ndim - 2))
        if tuple(value.shape) != own or not rank:
            wanted = "its other half" if other is None else f"{list(own)}"
            misshapen.append(f"{name} is {list(value.shape)}; required: {wanted}")
    if not homeless and not misshapen:
        return
    kind = ""
    if any(name.startswith("transformer.") for name in homeless):
        kind = " (transformer.…: it was made for a transformer such as SD3 or Flux, not for a UNet)"
    parts = ([f"no layer for {named(homeless)}{kind}"] if homeless else []) + misshapen[:NAMED]
    raise ModelError(
        f"{file} does not fit this base: {total - len(homeless) - len(misshapen)} of its {total} tensors "
        f"have a layer of their shape. {'; '.join(parts)}. Nothing was applied; use the base that it "
        "was made for"
    )


def _alphas(
    file: Path, state: Mapping[str, Tensor], given: Mapping[str, float], metadata: Mapping[str, Any]
) -> dict[str, float]:
    """The alpha of every module: peft's fields, else what the file gives a module, else its rank."""
    from peft.utils.other import get_pattern_key

    ranks = {name.removesuffix(".lora_A.weight"): len(value) for name, value in state.items() if ".lora_A." in name}
    if strange := sorted(given.keys() - ranks.keys()):
        raise ModelError(f"{file} does not fit this base: it has an alpha without a LoRA for {named(strange)}")
    if "r" not in metadata and "lora_alpha" not in metadata:
        if state and file.name == PEFT_FILE:
            raise ModelError(
                f"{file} is in peft's format, and the {_PEFT_CONFIG} beside it, which contains alpha, is "
                "missing: copy it there"
            )
        return {name: given.get(name, float(rank)) for name, rank in ranks.items()}
    alphas = {}
    for name, rank in ranks.items():
        recorded: Any
        alpha: Any
        recorded, alpha = (
            (metadata.get(pattern) or {}).get(get_pattern_key(list(metadata.get(pattern) or {}), name), value)
            for pattern, value in (("rank_pattern", metadata.get("r")), ("alpha_pattern", metadata.get("lora_alpha")))
        )
        if recorded != rank or not is_alpha(alpha):
            raise ModelError(
                f"{file}: peft's config has rank {recorded!r} and alpha {alpha!r} for {name}, whose tensors "
                f"have rank {rank}: weights and config are not from the same adapter; save it again"
            )
        alphas[name] = float(alpha) * (math.sqrt(rank) if metadata.get("use_rslora") else 1.0)
    return alphas


def _meant(targets: Sequence[Any], unet: UNet) -> set[str]:
    """The modules whose names end in a target, as peft takes them."""
    names = {str(target) for target in targets}
    endings = tuple(f".{target}" for target in names)
    return {name for name, _ in unet.named_modules() if name in names or name.endswith(endings)}
