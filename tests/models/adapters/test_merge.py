"""Merged weights are the sums that they should be, against sums written here and through diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.models.adapters.lora import LORA_FILE, add_lora, load_lora, lora_layers, save_lora
from diffalign.models.adapters.merge import merge_into, merge_tuned
from diffalign.models.adapters.save_load import find_tuned, load_pipeline, load_tuned
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError
from tests.models.conftest import Model, move_lora, picture
from tests.tolerance import assert_same_picture

PIPELINES = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


def write_lora(model: Model, folder: Path, seed: int, rank: int, alpha: float, targets=("to_q", "to_out.0")) -> str:
    unet = model.unet()
    add_lora(unet, rank=rank, alpha=alpha, target_modules=targets)
    move_lora(unet, seed=seed)
    folder.mkdir()
    save_lora(unet, folder, model.base.family)
    return str(folder)


def write_full(model: Model, folder: Path, seed: int) -> str:
    unet = model.unet()
    generator = torch.Generator().manual_seed(seed)
    for p in unet.parameters():
        p.data += torch.randn(p.shape, generator=generator) * 0.02
    unet.save_pretrained(folder / "unet")
    return str(folder)


def weights(unet) -> dict[str, torch.Tensor]:
    return {name: p.detach().double() for name, p in unet.named_parameters()}


def by_hand(model: Model, parts) -> dict[str, torch.Tensor]:
    """θ_base + Σ w (θ_i − θ_base) in float64, each θ_i written out as a full set of weights."""
    base = weights(model.base.unet)
    total = {name: p.clone() for name, p in base.items()}
    for path, weight in parts:
        unet = model.unet()
        if find_tuned(path).kind == "unet":
            load_tuned(unet, path)
            for name, p in weights(unet).items():
                total[name] += weight * (p - base[name])
            continue
        load_lora(unet, path)
        for name, module in unet.named_modules():
            if module in lora_layers(unet):
                a, b = (side["default"].weight.detach().double() for side in (module.lora_A, module.lora_B))
                total[f"{name}.weight"] += weight * module.scaling["default"] * (b @ a)
    return total


def fused(unet) -> dict[str, torch.Tensor]:
    """The weights of a UNet with its LoRA layers added in."""
    found = {}
    for name, p in weights(unet).items():
        if ".lora_" not in name:
            found[name.replace(".base_layer", "")] = p.clone()
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (side["default"].weight.detach().double() for side in (module.lora_A, module.lora_B))
            found[f"{name}.weight"] += module.scaling["default"] * (b @ a)
    return found


def assert_same(found, expected, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(found[name].double(), p, rtol=0, atol=atol)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (1.5, -0.5), (1.0, 0.7)])
def test_loras_of_any_rank_and_alpha_sum_as_updates(model: Model, tmp_path: Path, shares) -> None:
    one = write_lora(model, tmp_path / "a", seed=1, rank=4, alpha=10)
    two = write_lora(model, tmp_path / "b", seed=2, rank=2, alpha=2, targets=("to_q", "to_v"))
    parts = list(zip((one, two), shares, strict=True))
    file = merge_tuned(model.base, parts, tmp_path / "sum")
    assert file == tmp_path / "sum" / LORA_FILE
    unet = model.unet()
    load_lora(unet, file)
    assert_same(fused(unet), by_hand(model, parts), atol=1e-6)
    ranks = {name: m.lora_A["default"].weight.shape[0] for name, m in unet.named_modules() if hasattr(m, "lora_A")}
    assert {name.rsplit("to_", 1)[-1]: r for name, r in ranks.items()} == {"q": 6, "out.0": 4, "v": 2}
    said = json.loads((tmp_path / "sum" / "merge.json").read_text())
    assert said == {
        "base": model.base.source,
        "parts": [{"tuned": f"{p}/{LORA_FILE}", "weight": w} for p, w in parts],
    }


def test_averaging_factors_would_have_been_wrong(model: Model, tmp_path: Path) -> None:
    """The test above can tell: the mean of A times the mean of B is far from the mean of BA."""
    paths = [write_lora(model, tmp_path / name, seed, rank=4, alpha=4) for name, seed in (("a", 1), ("b", 2))]
    unets = [model.unet() for _ in paths]
    for unet, path in zip(unets, paths, strict=True):
        load_lora(unet, path)
    naive = model.unet()
    load_lora(naive, paths[0])
    for p, q in zip(naive.parameters(), unets[1].parameters(), strict=True):
        p.data = (p.data + q.data) / 2
    expected = by_hand(model, [(path, 0.5) for path in paths])
    assert max(float((p - expected[name]).abs().max()) for name, p in fused(naive).items()) > 1e-2


def test_diffusers_makes_the_merged_image(model: Model, tmp_path: Path) -> None:
    one = write_lora(model, tmp_path / "a", seed=1, rank=4, alpha=10)
    two = write_lora(model, tmp_path / "b", seed=2, rank=2, alpha=2, targets=("to_q", "to_v"))
    merge_tuned(model.base, [(one, 0.6), (two, 0.4)], tmp_path / "sum")
    theirs = PIPELINES[model.base.family.name].from_pretrained(model.folder)
    plain = picture(theirs)
    theirs.load_lora_weights(tmp_path / "sum", weight_name=LORA_FILE)
    merged = picture(theirs)
    assert_same_picture(picture(load_pipeline(str(model.folder), tuned=str(tmp_path / "sum"))), merged)
    adapters = PIPELINES[model.base.family.name].from_pretrained(model.folder)
    adapters.load_lora_weights(one, weight_name=LORA_FILE, adapter_name="a")
    adapters.load_lora_weights(two, weight_name=LORA_FILE, adapter_name="b")
    adapters.set_adapters(["a", "b"], adapter_weights=[0.6, 0.4])  # diffusers' own weighted sum of two adapters
    assert np.abs(picture(adapters) - merged).max() < 1e-4
    assert np.abs(merged - plain).max() > 0.01


@pytest.mark.parametrize("shares", [(0.5, 0.5), (2.0, -0.5)])
def test_full_unets_and_mixtures(model: Model, tmp_path: Path, shares) -> None:
    full, lora = write_full(model, tmp_path / "full", 1), write_lora(model, tmp_path / "lora", 2, rank=4, alpha=10)
    for other in (write_full(model, tmp_path / "other", 3), lora):
        parts = list(zip((full, other), shares, strict=True))
        out = tmp_path / f"sum-{Path(other).name}"
        assert merge_tuned(load_base(str(model.folder), vae_and_text=False), parts, out) == out / "unet"
        unet = model.unet()
        assert load_tuned(unet, out).kind == "unet"
        assert_same(weights(unet), by_hand(model, parts), atol=1e-6)


def test_one_part_of_weight_one_is_itself_to_the_bit(model: Model, tmp_path: Path) -> None:
    full, lora = write_full(model, tmp_path / "full", 1), write_lora(model, tmp_path / "lora", 2, rank=4, alpha=4)
    unet, expected = model.unet(), model.unet()
    merge_into(unet, [(full, 1.0)])
    load_tuned(expected, full)
    assert all(torch.equal(p, q) for p, q in zip(unet.parameters(), expected.parameters(), strict=True))
    written = load_file(merge_tuned(model.base, [(lora, 1.0)], tmp_path / "copy"))
    assert all(torch.equal(written[name], x) for name, x in load_file(Path(lora) / LORA_FILE).items())
    merge_into(unet := model.unet(), [(lora, 0.0)])
    assert all(torch.equal(p, q) for p, q in zip(unet.parameters(), model.base.unet.parameters(), strict=True))


def test_what_cannot_be_merged_is_refused(model: Model, models, tmp_path: Path) -> None:
    lora = write_lora(model, tmp_path / "lora", 2, rank=4, alpha=4)
    with pytest.raises(ModelError, match="nothing to merge"):
        merge_tuned(model.base, [], tmp_path / "out")
    with pytest.raises(ModelError, match=r"lora=nan: a weight is a finite number"):
        merge_tuned(model.base, [(lora, float("nan"))], tmp_path / "out")
    with pytest.raises(ModelError, match="nothing is overwritten"):
        merge_tuned(model.base, [(lora, 1.0)], lora)
    with pytest.raises(ModelError, match="no tuned weights at"):
        merge_tuned(model.base, [(str(tmp_path / "none"), 1.0)], tmp_path / "out")
    other = models["sd" if model.folder.name == "sdxl" else "sdxl"]
    with pytest.raises(ModelError, match="does not fit this base"):
        merge_tuned(other.base, [(lora, 1.0)], tmp_path / "out")
    state = load_file(Path(lora) / LORA_FILE)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    extra = {f"{text}.lora_A.weight": torch.zeros(4, 32), f"{text}.lora_B.weight": torch.zeros(32, 4)}
    save_file(state | extra, tmp_path / "with_text.safetensors")
    with pytest.raises(ModelError, match="text_encoder"):
        merge_tuned(model.base, [(str(tmp_path / "with_text.safetensors"), 1.0)], tmp_path / "out")


def test_a_merge_that_was_killed_is_made_again(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = write_lora(model, tmp_path / "lora", seed=0, rank=2, alpha=2)
    moves: list[Path] = []

    def stopped(partial: Path, path: Path) -> None:
        moves.append(path)
        raise KeyboardInterrupt

    out, parts = tmp_path / "out", [(lora, 0.5)]
    monkeypatch.setattr("diffalign.models.adapters.merge.take_place", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge_tuned(model.base, parts, out)
    assert moves == [out / LORA_FILE]
    assert [path.name for path in out.iterdir()] == ["merge.json"]
    monkeypatch.undo()
    assert merge_tuned(model.base, parts, out) == out / LORA_FILE
    with pytest.raises(ModelError, match="already contains"):
        merge_tuned(model.base, parts, out)
