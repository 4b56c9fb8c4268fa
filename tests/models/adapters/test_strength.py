"""Tuned weights at a strength: base + s · (tuned − base), for a full UNet and for LoRA files of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from diffalign.errors import DiffalignError
from diffalign.evaluation.generate import generate
from diffalign.evaluation.recipe import ImageRecipe, Tuned
from diffalign.evaluation.sampling import Sampling
from diffalign.models.adapters.methods import WeightLayout
from diffalign.models.adapters.save_load import load_pipeline
from diffalign.models.loading.family import ModelError
from tests.models.adapters.test_lora_file import kohya_text
from tests.models.conftest import Model, picture

HALF = 0.5


@pytest.fixture(scope="module")
def sdxl(models: dict[str, Model]) -> Model:
    return models["sdxl"]


@pytest.fixture(scope="module")
def full(sdxl: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    unet, folder = sdxl.unet(), tmp_path_factory.mktemp("full")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    unet.save_pretrained(folder / "unet")
    return folder


def test_a_full_unet_is_a_point_on_the_line_through_base_and_tuned(sdxl: Model, full: Path) -> None:
    base = sdxl.base.unet.state_dict()
    tuned = load_pipeline(str(sdxl.folder), tuned=str(full)).unet.state_dict()
    for s in (0.0, HALF, 1.5):
        found = load_pipeline(str(sdxl.folder), tuned=str(full), strength=s).unet.state_dict()
        for name, own in base.items():
            on_line = own.double() + s * (tuned[name].double() - own.double())
            assert torch.equal(found[name], on_line.float()), name
            assert s or torch.equal(found[name], own), name


def test_a_lora_acts_as_with_the_adapter_weight_of_diffusers(sdxl: Model, tmp_path: Path) -> None:
    """Text encoders included; their alpha is that of one file, since diffusers gives all layers the same."""
    file = tmp_path / "style.safetensors"
    state = kohya_text(torch.Generator().manual_seed(0))
    name = next(n for n, m in sdxl.base.unet.named_modules() if n.endswith("attn1.to_q"))
    module = "lora_unet_" + name.replace(".", "_")
    width = sdxl.base.unet.get_submodule(name).weight.shape[0]
    up = torch.randn(width, 4, generator=torch.Generator().manual_seed(2))
    state |= {f"{module}.lora_down.weight": up.T.contiguous(), f"{module}.lora_up.weight": up}
    state |= {f"{module}.alpha": torch.tensor(2.0)}
    save_file(state, file)
    ours = picture(load_pipeline(str(sdxl.folder), tuned=str(file), strength=HALF))
    theirs = StableDiffusionXLPipeline.from_pretrained(str(sdxl.folder), add_watermarker=False)
    theirs.load_lora_weights(str(file), adapter_name="style")
    whole = picture(theirs)
    theirs.set_adapters(["style"], [HALF])
    half = picture(theirs)
    assert np.abs(half - whole).max() > 1e-3
    np.testing.assert_allclose(ours, half, atol=1e-5)
    base = picture(load_pipeline(str(sdxl.folder)))
    np.testing.assert_array_equal(picture(load_pipeline(str(sdxl.folder), tuned=str(file), strength=0.0)), base)


def test_other_layouts_and_senseless_strengths_are_refused(tmp_path: Path) -> None:
    layout = WeightLayout()
    layout.label = "user attention"  # type: ignore[misc]
    with pytest.raises(ModelError, match="is user attention, and its strength cannot be changed"):
        layout.apply_at(None, tmp_path, HALF)
    with pytest.raises(DiffalignError, match="strength is nan"):
        Tuned("x", strength=float("nan"))
    with pytest.raises(DiffalignError, match=r"0\.5 was given without tuned weights"):
        Tuned(strength=HALF)


def test_images_of_another_strength_are_not_taken_for_these(sdxl: Model, full: Path, tmp_path: Path) -> None:
    base, sampling = str(sdxl.folder), Sampling(num_inference_steps=1, guidance_scale=1.0, resolution=32)
    recipes = [ImageRecipe(base, Tuned(full, strength=s), sampling) for s in (1.0, HALF)]
    assert len({recipe.tag for recipe in recipes}) == 2
    half = generate(base, ["a cat"], [0], out_dir=tmp_path, tuned=Tuned(full, strength=HALF), sampling=sampling)
    assert half == generate(base, ["a cat"], [0], out_dir=tmp_path, tuned=Tuned(full, strength=HALF), sampling=sampling)
    with pytest.raises(DiffalignError, match=r"strength 0\.5 there, None now"):
        generate(base, ["a cat"], [0], out_dir=tmp_path, tuned=full, sampling=sampling)
