"""Tuned weights on disk, back onto a network, and into a pipeline that makes pictures.

What a run leaves in its output_dir (or in a checkpoint-N/ of it) is one of

    unet/                                 full fine-tuning: a diffusers folder, safetensors
    pytorch_lora_weights.safetensors      LoRA: diffusers' layout with the adapter's metadata
    user_attention.safetensors            user attention: a layout of our own
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.io.files import file_faults
from diffalign.io.loaded_weights import is_finite
from diffalign.io.manifest import MANIFEST, read_manifest
from diffalign.io.weight_files import check_weights, refuse_pickle
from diffalign.models.adapters.lora import load_lora, lora_layers, lora_parameters, place_lora, save_lora
from diffalign.models.adapters.lora_file import LORA_FILE, PEFT_FILE, LoraFile, read_lora
from diffalign.models.adapters.user_attention import (
    USER_FILE,
    holds_user_attention,
    load_user_attention,
    save_user_attention,
    set_user,
    user_branch,
)
from diffalign.models.loading.base import Base, load_base
from diffalign.models.loading.family import Family, ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.loading.stored import UNET_STEM, stored_unet, weights_in
from diffalign.models.spec import ModelSpec

UNET_FOLDER = "unet"


@dataclass(frozen=True)
class TunedWeights:
    """Where tuned weights are, and of which kind."""

    kind: Literal["unet", "lora", "user"]
    path: Path  # the unet folder, or the file


def save_tuned(unet: UNet, output_dir: str | Path, family: Family) -> Path:
    """Write the unwrapped UNet's adapter, or without one its `unet/` folder, into `output_dir`; returns which."""
    if user_branch(unet) is not None:
        return save_user_attention(unet, output_dir)
    if lora_layers(unet):
        return save_lora(unet, output_dir, family)
    folder = Path(output_dir) / UNET_FOLDER
    unet.save_pretrained(folder, safe_serialization=True)
    return folder


def find_tuned(path: str | Path) -> TunedWeights:
    """The tuned weights at `path`: a unet folder, an adapter's file, an output_dir or a checkpoint folder.

    Raises ModelError when there are none, or several kinds.
    """
    path = Path(path)
    if path.is_file():
        refuse_pickle(path)
        if path.suffix != ".safetensors":
            raise ModelError(f"{path} is not a .safetensors file; give one, or a run's output folder")
        _refuse_damaged(path)
        return TunedWeights("user" if holds_user_attention(path) else "lora", path)
    configs = (path / "config.json", path / UNET_FOLDER / "config.json")
    found = [TunedWeights("unet", file.parent) for file in configs if file.is_file()]
    found += [TunedWeights("lora", path / name) for name in (LORA_FILE, PEFT_FILE) if (path / name).is_file()]
    if (path / USER_FILE).is_file():
        found.append(TunedWeights("user", path / USER_FILE))
    if len(found) == 1:
        _refuse_damaged(found[0].path)
        if found[0].kind == "unet":
            weights_in(found[0].path, UNET_STEM, None)
        else:
            check_weights(found[0].path)
        return found[0]
    if found:
        raise ModelError(f"{path} contains several tuned models: name one of {', '.join(str(t.path) for t in found)}")
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))  # by step
    hint = f"; use one of its checkpoints, e.g. {checkpoints[-1]}" if checkpoints else ""
    missing = "" if path.exists() else " (no such path)"
    raise ModelError(
        f"no tuned weights at {path}{missing}: expected a folder with {UNET_FOLDER}/, {LORA_FILE} or {USER_FILE}, "
        f"a unet folder, or a LoRA file{hint}"
    )


def _refuse_damaged(weights: Path) -> None:
    """Raises ModelError where the manifest of the run that wrote the weights says that their content was another."""
    folder = weights.parent
    content = read_manifest(folder) if (folder / MANIFEST).is_file() else "there is none"
    if isinstance(content, str):
        return  # of another program, or of a run that was killed: nothing is known of the weights
    files = {name: facts for name, facts in content.get("files", {}).items() if (folder / name).is_relative_to(weights)}
    listed = tuple((name, facts["bytes"], facts["sha256"], _state(folder / name)) for name, facts in files.items())
    faults = _faults(folder, listed)
    if faults:
        raise ModelError(
            f"the tuned weights in {folder} are not as the run wrote them: {faults}. Copy them again, or use a "
            f"checkpoint of the run; if you replaced them yourself, delete {folder / MANIFEST}"
        )


def _state(file: Path) -> tuple[int, int] | None:
    return (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None


@lru_cache
def _faults(folder: Path, listed: tuple[tuple[str, int, str, tuple[int, int] | None], ...]) -> str:
    """What differs from the manifest; a file is hashed once as long as its size and time stay as they are."""
    return "; ".join(file_faults(folder, {name: {"bytes": size, "sha256": sha} for name, size, sha, _ in listed}))


def check_tuned(unet: UNet, path: str | Path) -> None:
    """Raises ModelError unless the tuned weights at `path` are whole and fit this UNet, which stays as it is."""
    tuned = find_tuned(path)
    if tuned.kind == "lora":
        read_lora(tuned.path, unet).unet_only()
    elif tuned.kind == "unet":
        stored_unet(tuned.path, unet)


def load_tuned(unet: UNet, path: str | Path) -> TunedWeights:
    """Put tuned weights onto a base's UNet, in place; LoRA layers stay separate.

    Raises ModelError if they do not fit.
    """
    tuned = find_tuned(path)
    if tuned.kind == "lora":
        load_lora(unet, tuned.path)
    elif tuned.kind == "user":
        load_user_attention(unet, tuned.path)
    else:
        load_full(unet, tuned.path)
    return tuned


def apply_tuned(pipeline: Any, path: str | Path, user: Tensor | Sequence[float] | None = None) -> TunedWeights:
    """Put tuned weights onto a diffusers pipeline, in place. LoRA files may have text encoder parts here.

    `user` is the embedding of whom pictures are for: needed with user attention, and with that only. Raises ModelError.
    """
    tuned = find_tuned(path)
    if (tuned.kind == "user") != (user is not None):
        raise ModelError(
            (f"{tuned.path} is user attention, and no user was given: give a user's embedding (--users FILE --user ID)")
            if user is None
            else f"a user was given, and {tuned.path} has no user attention; remove the user"
        )
    if tuned.kind == "user":
        load_user_attention(pipeline.unet, tuned.path, pipeline.unet.dtype)
        set_user(pipeline.unet, user)
    elif tuned.kind == "lora":
        _apply_lora(pipeline, read_lora(tuned.path, pipeline.unet))
    else:
        load_full(pipeline.unet, tuned.path)
    return tuned


def _apply_lora(pipeline: Any, lora: LoraFile) -> None:
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
        for parameter in lora_parameters(module):
            parameter.data = parameter.data.to(module.dtype)


def load_pipeline(
    model: str | Path | ModelSpec,
    *,
    tuned: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    user: Tensor | Sequence[float] | None = None,
) -> Any:
    """The family's diffusers pipeline, with tuned weights if given, ready to generate; no safety checker.

    Loads like `load_base`, so whatever trains also generates. `user` as in `apply_tuned`. Raises ModelError.
    """
    base = load_base(model, torch_dtype=torch_dtype)
    pipeline = make_pipeline(base)
    if tuned is not None:
        apply_tuned(pipeline, tuned, user)
    elif user is not None:
        raise ModelError(
            "a user was given without tuned weights: a base does not support users; name the tuned weights"
        )
    return pipeline.to(device)


def make_pipeline(base: Base) -> Any:
    """A diffusers pipeline around the modules of a base (shared, not copied), with its own scheduler."""
    import diffusers

    if base.vae is None or base.text is None:
        raise ModelError(f"{base.source!r} was loaded without VAE and text encoders; load it with vae_and_text=True")
    scheduler_class = getattr(diffusers, base.scheduler_config["_class_name"])
    shared = {
        "vae": base.vae,
        "unet": base.unet,
        "scheduler": scheduler_class.from_config(base.scheduler_config),
        "text_encoder": base.text.models[0],
        "tokenizer": base.text.tokenizers[0],
    }
    if base.family.name == "sd":
        return diffusers.StableDiffusionPipeline(
            **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return diffusers.StableDiffusionXLPipeline(
        **shared,
        text_encoder_2=base.text.models[1],
        tokenizer_2=base.text.tokenizers[1],
        force_zeros_for_empty_prompt=base.text.zero_empty_prompt,
        add_watermarker=False,
    )


def load_full(unet: UNet, folder: Path) -> None:
    """Put the UNet in a diffusers folder onto a base's, in place and in its dtype. Raises ModelError if unlike it."""
    read = stored_unet(folder, unet)
    with torch.no_grad():
        for name, own in unet.state_dict().items():
            value = read(name)
            if not is_finite(value):
                raise ModelError(
                    f"the tuned UNet in {folder} has NaN or infinite values in {name}: the training that "
                    "wrote it had diverged; use an earlier checkpoint"
                )
            own.copy_(value)
