"""Weights: LoRA files, full UNets, and a base's folder."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.models.adapters.lora import add_lora, load_lora, lora_parameters, save_lora
from diffalign.models.adapters.save_load import find_tuned, load_full
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import Family
from diffalign.world import base_path
from tests.fuzz.harness import Run
from tests.fuzz.odd import as_bytes, damaged, json_text, mutated, scalar

LORA = "pytorch_lora_weights.safetensors"


@cache
def _unet() -> tuple[Any, Family]:
    base = load_base(str(base_path()), vae_and_text=False)
    return base.unet, base.family


def _fresh() -> Any:
    """The world's UNet without adapters; its own modules, not its weights, are made anew."""
    import copy

    return copy.deepcopy(_unet()[0])


@cache
def _lora() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    unet, folder = _fresh(), Path(mkdtemp())
    add_lora(unet, rank=2, alpha=2)
    with torch.no_grad():
        for p in lora_parameters(unet):
            p.fill_(0.01)
    file = save_lora(unet, folder, _unet()[1])
    with safe_open(file, "pt") as opened:
        found = {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    shutil.rmtree(folder)
    return found


def lora(rng: Random, folder: Path) -> Run:
    """A LoRA whose keys, shapes, values, metadata or bytes are odd."""
    state, metadata = _lora()
    state = dict(state)
    file = folder / LORA
    _change(rng, state)
    if rng.random() < 0.3 and metadata:
        key = rng.choice(list(metadata))
        node = json.loads(metadata[key]) if metadata[key].startswith("{") else metadata[key]
        metadata = {**metadata, key: json_text(mutated(rng, node, 1)) if isinstance(node, dict) else str(scalar(rng))}
        metadata = {k: v.encode("utf-8", "replace").decode() for k, v in metadata.items()}
    save_file(state, file, metadata)
    if rng.random() < 0.2:
        file.write_bytes(damaged(rng, file.read_bytes()))
    unet = _fresh()

    def run() -> Any:
        load_lora(unet, find_tuned(rng.choice((file, folder))).path)
        moved = [p for p in lora_parameters(unet) if p.abs().max() > 0]
        assert moved, "a LoRA that changes nothing, without a word"
        return list(unet.parameters())

    return run


def _change(rng: Random, state: dict[str, torch.Tensor]) -> None:
    """One or more of: keys renamed or gone, other shapes, types and values."""
    for _ in range(rng.randrange(3)):
        key = rng.choice(list(state))
        how = rng.randrange(8)
        if how == 0:
            del state[key]
        elif how == 1:
            prefix = rng.choice(("base_model.model.", "transformer.", "text_encoder.", "lora_", ""))
            for name in list(state):
                state[prefix + name.removeprefix("unet.")] = state.pop(name)
        elif how == 2:
            state[key + rng.choice(("x", ".dora_scale", ".alpha", ".hada_w1_a", ".lokr_w1"))] = state[key].clone()
        elif how == 3:
            state[key] = state[key][:1].clone() if state[key].ndim else state[key].reshape(1)
        elif how == 4:
            state[key] = state[key] * float("nan")
        elif how == 5:
            state[key] = state[key].to(rng.choice((torch.float16, torch.bfloat16, torch.int64, torch.float64)))
        elif how == 6:
            state[key] = torch.zeros(0)
        else:
            state[key] = state[key].T.contiguous()
        if not state:
            state["x"] = torch.zeros(1)


def full(rng: Random, folder: Path) -> Run:
    """A full UNet's folder whose config or weights are odd."""
    place = folder / "unet"
    shutil.copytree(base_path() / "unet", place)
    weights = next(place.glob("*.safetensors"))
    if rng.random() < 0.5:
        state = load_file(weights)
        _change(rng, state)
        save_file(state, weights)
    else:
        weights.write_bytes(damaged(rng, weights.read_bytes()))
    unet = _fresh()

    def run() -> Any:
        load_full(unet, find_tuned(rng.choice((place, folder))).path)
        return list(unet.parameters())

    return run


def base(rng: Random, folder: Path) -> Run:
    """A base's folder with a component that is odd, cut or gone."""
    place = folder / "base"
    shutil.copytree(base_path(), place)
    files = [file for file in sorted(place.rglob("*")) if file.is_file()]
    for file in rng.sample(files, rng.randrange(1, 3)):
        if rng.random() < 0.2:
            file.unlink()
        elif file.suffix == ".json" and rng.random() < 0.7:
            tree = json.loads(file.read_text(encoding="utf-8"))
            file.write_bytes(as_bytes(json_text(mutated(rng, tree, 1))))
        else:
            file.write_bytes(damaged(rng, file.read_bytes()))

    def run() -> Any:
        loaded = load_base(str(place))
        return [list(part.parameters()) for part in (loaded.unet, loaded.vae, *loaded.text.models)]

    return run
