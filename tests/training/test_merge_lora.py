"""`model.merge_lora`: LoRAs that are part of the base, in training, images, export and card alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.cli.images.options import given_sampling
from diffalign.cli.main import parse
from diffalign.cli.training.train import sampled_as
from diffalign.config.schema import Config
from diffalign.config.strict_yaml import ConfigError
from diffalign.errors import DiffalignError
from diffalign.evaluation.generate import generate
from diffalign.evaluation.manifest import manifest_rows
from diffalign.evaluation.recipe import Tuned
from diffalign.evaluation.sampling import Sampling
from diffalign.export.kohya import export_kohya
from diffalign.export.single_file import export_single_file
from diffalign.models.adapters.merge import merge_into
from diffalign.models.adapters.save_load import load_pipeline, make_pipeline
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec
from diffalign.training.build import build
from diffalign.training.processes import make_accelerator
from diffalign.training.run import run_training
from tests.models.adapters.test_merge import write_full, write_lora
from tests.models.conftest import Model, make_model, picture
from tests.tolerance import assert_same_picture


@pytest.fixture(scope="module")
def model(tiny_sd: Path) -> Model:
    return make_model(tiny_sd)


@pytest.fixture
def loras(model: Model, tmp_path: Path) -> dict[str, float]:
    """Two LoRAs of other trainers, one in kohya's layout with an alpha of its own."""
    one = write_lora(model, tmp_path / "one", seed=1, rank=4, alpha=10)
    kohya = export_kohya(one, tmp_path / "style.safetensors", base=str(model.folder))
    return {str(kohya): 0.8, write_lora(model, tmp_path / "detail", seed=2, rank=2, alpha=2): -0.5}


def test_a_run_starts_on_the_merged_base_and_is_used_on_it(
    model: Model, loras: dict[str, float], make_config: Callable[..., Config], tmp_path: Path, monkeypatch
) -> None:
    config = make_config(model.folder, {"model.merge_lora": loras, "training.max_train_steps": 2})
    run = build(config, make_accelerator(config))
    expected = model.unet()
    merge_into(expected, list(loras.items()))
    found = load_base(ModelSpec(str(model.folder), merge_lora=loras), vae_and_text=False).unet
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    batch = next(run.source.batches(0))
    point = (batch.latents[0], torch.tensor([17, 801]), batch.cond.map(lambda x: x[0]))
    policy = run.networks.policy(*point).detach()
    assert torch.equal(policy, run.networks.reference(*point))
    theirs = expected(point[0], point[1], **model.base.family.unet_inputs(point[2])).sample.detach()
    torch.testing.assert_close(policy, theirs, rtol=1e-4, atol=1e-5)

    run_training(config)
    out = Path(config.output_dir)
    args = parse(
        ["generate", str(model.folder), "--prompts", "p", "--out", "o", "--device", "cpu", *sampled_as(config)]
    )
    assert given_sampling(args).merge_lora == loras
    spec = ModelSpec(str(model.folder), merge_lora=loras)
    tuned = picture(load_pipeline(spec, tuned=str(out)))
    assert np.abs(tuned - picture(load_pipeline(str(model.folder), tuned=str(out)))).max() > 1e-2
    file = export_single_file(out, tmp_path / "whole.safetensors", dtype="fp32")
    whole = load_base(ModelSpec(str(file), single_file_config=str(model.folder)))
    assert_same_picture(picture(make_pipeline(whole)), tuned)

    # the card's lines, in plain diffusers
    (tmp_path / model.folder.name).symlink_to(model.folder)
    (code,) = re.findall(r"```python\n(.*?)\n```", (out / "README.md").read_text(), re.DOTALL)
    assert code.count("part of the base") == 2
    monkeypatch.chdir(tmp_path)
    loading, image, call = code.partition("image = ")
    exec(loading, names := {})
    torch.manual_seed(0)
    exec(image + call, names)
    pipeline = load_pipeline(spec, tuned=str(out))
    torch.manual_seed(0)
    prompt = re.search(r'pipeline\("(.*?)"', code)[1]
    ours = np.asarray(pipeline(prompt, num_inference_steps=25, guidance_scale=5.0).images[0], float)
    assert np.abs(ours - np.asarray(Image.open("image.png"), float)).max() <= 1


def test_images_name_what_was_merged(model: Model, loras: dict[str, float], tmp_path: Path) -> None:
    sampling = Sampling(1, 1.0, merge_lora=loras, device="cpu")
    generate(str(model.folder), ["a red circle"], [0], out_dir=tmp_path / "images", sampling=sampling)
    (row,) = manifest_rows(tmp_path / "images")
    assert sorted(row["settings"]["merge_lora"].values()) == [-0.5, 0.8]
    other = Sampling(1, 1.0, device="cpu")
    with pytest.raises(DiffalignError, match=r"images made with other settings .*merge_lora"):
        generate(str(model.folder), ["a red circle"], [0], out_dir=tmp_path / "images", sampling=other)


def test_what_cannot_be_merged_is_refused(
    model: Model, loras: dict[str, float], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    full = write_full(model, tmp_path / "full", 1)
    with pytest.raises(ModelError, match=r"merge_lora: .*full.* is a full UNet; use it as tuned weights"):
        load_base(ModelSpec(str(model.folder), merge_lora={full: 0.5}))
    with pytest.raises(ModelError, match=r"no tuned weights at .*absent"):
        load_base(ModelSpec(str(model.folder), merge_lora={str(tmp_path / "absent"): 0.5}))
    with pytest.raises(ConfigError, match=r"model.merge_lora"):
        make_config(model.folder, {"model.merge_lora": {"a.safetensors": 1000}})
    config = make_config(model.folder, {"model.merge_lora": loras})
    with pytest.raises(DiffalignError, match="open pipeline; merge there"):
        build(config, make_accelerator(config), base=model.base)
    negative = Tuned(negative=next(iter(loras)))
    with pytest.raises(DiffalignError, match="not supported beside negative weights"):
        generate("base", ["a"], [0], out_dir=tmp_path / "x", tuned=negative, sampling=Sampling(merge_lora=loras))
    words = [
        "generate",
        "b",
        "--prompts",
        "p",
        "--out",
        "o",
        "--device",
        "cpu",
        "--merge-lora",
        "a=1",
        "--merge-lora",
        "a=2",
    ]
    with pytest.raises(DiffalignError, match="--merge-lora a is given twice"):
        given_sampling(parse(words))
