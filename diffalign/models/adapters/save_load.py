"""Tuned weights on disk, back onto a network, and into a pipeline that generates images.

What a run leaves in its output_dir (or in a checkpoint-N/ of it) is one of

    unet/                                 full fine-tuning: a diffusers folder, safetensors
    pytorch_lora_weights.safetensors      LoRA: diffusers' layout with the adapter's metadata

or has the layout of another tuning method (`methods.known_layouts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.io.files import file_faults
from diffalign.io.manifest import MANIFEST, read_manifest
from diffalign.io.weight_files import refuse_pickle
from diffalign.models.adapters.layouts import LORA, UNET
from diffalign.models.adapters.layouts import UNET_FOLDER as UNET_FOLDER
from diffalign.models.adapters.layouts import load_full as load_full
from diffalign.models.adapters.methods import WeightLayout, known_layouts
from diffalign.models.hub import local_weights
from diffalign.models.loading.base import Base, load_base
from diffalign.models.loading.family import Family, ModelError
from diffalign.models.loading.modules import UNet
from diffalign.models.spec import ModelSpec


@dataclass(frozen=True)
class TunedWeights:
    """Where tuned weights are, and in which layout."""

    layout: WeightLayout
    path: Path  # the unet folder, or the file

    @property
    def kind(self) -> str:
        """The layout's name: "unet", "lora", or another method's."""
        return self.layout.kind


def layout_on(unet: UNet) -> WeightLayout:
    """The layout of what was added to a UNet; without any, that of the UNet itself."""
    return next((each for each in known_layouts() if each is not UNET and each.is_on(unet)), UNET)


def save_tuned(unet: UNet, output_dir: str | Path, family: Family) -> Path:
    """Writes what was added to the unwrapped UNet, else its `unet/` folder, into `output_dir`; returns which."""
    return layout_on(unet).save(unet, Path(output_dir), family)


def find_tuned(path: str | Path) -> TunedWeights:
    """The tuned weights at `path`: a unet folder, an adapter's file, an output_dir or a checkpoint folder.

    `path` may also be an id of the Hub, in the forms of `models/hub.py`. Raises ModelError when there are none, or
    several kinds.
    """
    layouts = sorted(known_layouts(), key=lambda layout: layout is not UNET)
    path = local_weights(path, [name for layout in layouts if layout is not UNET for name in layout.names])
    if path.is_file():
        refuse_pickle(path)
        if path.suffix != ".safetensors":
            raise ModelError(f"{path} is not a .safetensors file; give one, or a run's output folder")
        _refuse_damaged(path)
        return TunedWeights(next((each for each in layouts if each.owns(path)), LORA), path)
    found = [TunedWeights(layout, place) for layout in layouts for place in layout.find(path)]
    if len(found) == 1:
        _refuse_damaged(found[0].path)
        found[0].layout.check_whole(found[0].path)
        return found[0]
    if found:
        raise ModelError(f"{path} contains several tuned models: name one of {', '.join(str(t.path) for t in found)}")
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))  # by step
    hint = f"; use one of its checkpoints, e.g. {checkpoints[-1]}" if checkpoints else ""
    missing = "" if path.exists() else " (no such path)"
    names = [f"{name}/" if layout is UNET else name for layout in layouts for name in layout.names]
    raise ModelError(
        f"no tuned weights at {path}{missing}: expected a folder with {', '.join(names[:-1])} or {names[-1]}, "
        f"a unet folder, or a LoRA file{hint}"
    )


def _refuse_damaged(weights: Path) -> None:
    """Raises ModelError where the weights differ from the manifest of the run that wrote them."""
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
    tuned.layout.check_fit(unet, tuned.path)


def load_tuned(unet: UNet, path: str | Path) -> TunedWeights:
    """Put tuned weights onto a base's UNet, in place; LoRA layers stay separate.

    Raises ModelError if they do not fit.
    """
    tuned = find_tuned(path)
    tuned.layout.load(unet, tuned.path)
    return tuned


def apply_tuned(
    pipeline: Any, path: str | Path, user: Tensor | Sequence[float] | None = None, *, strength: float = 1.0
) -> TunedWeights:
    """Put tuned weights onto a diffusers pipeline, in place. LoRA files may have text encoder parts here.

    `user` is the embedding of whom images are for: required by weights that need a user, and refused by others.
    `strength`: the weights are base + strength · (tuned − base). Raises ModelError.
    """
    tuned = find_tuned(path)
    if tuned.layout.needs_user and user is None:
        raise ModelError(
            f"{tuned.path} is {tuned.layout.label}, and no user was given: give a user's embedding "
            "(--users FILE --user ID)"
        )
    if user is not None and not tuned.layout.needs_user:
        raise ModelError(f"a user was given, and {tuned.path} is {tuned.layout.label}, without users; remove the user")
    if strength == 1:
        tuned.layout.apply(pipeline, tuned.path, user)
    else:
        tuned.layout.apply_at(pipeline, tuned.path, strength)
    return tuned


def load_pipeline(
    model: str | Path | ModelSpec,
    *,
    tuned: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    user: Tensor | Sequence[float] | None = None,
    strength: float = 1.0,
) -> Any:
    """The family's diffusers pipeline, with tuned weights if given, ready to generate; no safety checker.

    Loads like `load_base`, so whatever trains also generates. `user` and `strength` as in `apply_tuned`. Raises
    ModelError.
    """
    base = load_base(model, torch_dtype=torch_dtype)
    pipeline = make_pipeline(base)
    if tuned is not None:
        apply_tuned(pipeline, tuned, user, strength=strength)
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
