from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from diffalign.engine.random import noise_seed
from diffalign.evaluation.generate import generate
from diffalign.evaluation.manifest import MANIFEST, read_image_manifest
from diffalign.evaluation.sampling import Sampling

PROMPTS, SEEDS = ["a red circle", "a blue square"], [3, 5]
TWO = Sampling(num_inference_steps=2)


@pytest.fixture
def made(tiny, tmp_path):
    out = tmp_path / "out"
    return out, generate(tiny["sdxl"], PROMPTS, SEEDS, out_dir=out, sampling=TWO)


def no_loading(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("diffalign.models.adapters.save_load.load_pipeline", refuse)


def test_files_and_manifest(made):
    out, pictures = made
    assert [(p.prompt, p.seed, p.file.name) for p in pictures] == [
        ("a red circle", 3, "00000_3.png"),
        ("a red circle", 5, "00000_5.png"),
        ("a blue square", 3, "00001_3.png"),
        ("a blue square", 5, "00001_5.png"),
    ]
    rows = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    assert [row["noise_seed"] for row in rows] == [noise_seed(p, s) for p in PROMPTS for s in SEEDS]
    made_with = [
        "steps",
        "guidance",
        "scheduler",
        "resolution",
        "negative_prompt",
        "dtype",
        "vae",
        "prediction_type",
        "user",
    ]
    assert {key: rows[0]["settings"][key] for key in made_with} == {
        **dict.fromkeys(made_with),
        **{"steps": 2, "guidance": 5.0, "scheduler": "ddim", "negative_prompt": "", "dtype": "float32"},
    }  # these keys do not change: they tell whether the images of a folder can be used again
    assert pictures[0].open().size == (64, 64)
    assert read_image_manifest(out) == pictures


def test_prompts_may_be_named(made, tiny, tmp_path, monkeypatch):
    """A text is a file or a set, never a sequence of letters; these images exist already."""
    no_loading(monkeypatch)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    assert generate(tiny["sdxl"], str(tmp_path / "prompts.txt"), SEEDS, out_dir=made[0], sampling=TWO) == made[1]


def test_finished_images_are_not_made_again(made, tiny, monkeypatch):
    out, pictures = made
    no_loading(monkeypatch)
    assert generate(tiny["sdxl"], PROMPTS[1:], SEEDS, out_dir=out, sampling=TWO) == pictures[2:]


def test_a_stopped_run_is_completed(made, tiny):
    out, pictures = made
    before = [np.asarray(p.open(), int) for p in pictures]
    lines = (out / MANIFEST).read_text().splitlines(keepends=True)
    (out / MANIFEST).write_text("".join(lines[:2]) + lines[2][:40])  # torn in the third line
    pictures[0].file.unlink()  # and an image was lost
    again = generate(tiny["sdxl"], PROMPTS, SEEDS, out_dir=out, sampling=TWO)
    assert again == pictures
    for picture, pixels in zip(again, before, strict=True):
        assert np.abs(np.asarray(picture.open(), int) - pixels).max() <= 1
    assert sorted(map(str, read_image_manifest(out))) == sorted(map(str, pictures))


def test_new_prompts_get_new_files(made, tiny):
    out, _ = made
    more = generate(tiny["sdxl"], ["the small photo", *PROMPTS], SEEDS[:1], out_dir=out, sampling=TWO)
    assert [p.file.name for p in more] == ["00002_3.png", "00000_3.png", "00001_3.png"]
    assert len(read_image_manifest(out)) == 5


def test_other_settings_need_another_folder(made, tiny, tuned):
    out, _ = made
    with pytest.raises(ValueError, match="steps 2 there, 3 now"):
        generate(tiny["sdxl"], PROMPTS, SEEDS, out_dir=out, sampling=Sampling(num_inference_steps=3))
    with pytest.raises(ValueError, match="fingerprint"):
        generate(tiny["sdxl"], PROMPTS, SEEDS, tuned=tuned, out_dir=out, sampling=TWO)


def test_a_moved_model_is_the_same_model(made, tiny, tmp_path, monkeypatch):
    out, pictures = made
    moved = shutil.copytree(tiny["sdxl"], tmp_path / "moved")
    no_loading(monkeypatch)
    assert generate(str(moved), PROMPTS, SEEDS, out_dir=out, sampling=TWO) == pictures
    weights = moved / "unet" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1  # one bit of one weight
    weights.write_bytes(raw)
    with pytest.raises(ValueError, match="fingerprint"):
        generate(str(moved), PROMPTS, SEEDS, out_dir=out, sampling=TWO)


def test_tuned_weights_change_the_image(made, tiny, tuned, tmp_path):
    _, pictures = made
    for path in (tuned, f"{tuned}/unet"):
        folder = tmp_path / path.replace("/", "_")
        changed = generate(tiny["sdxl"], PROMPTS[:1], SEEDS, tuned=path, out_dir=folder, sampling=TWO)
        assert np.abs(np.asarray(changed[0].open(), int) - np.asarray(pictures[0].open(), int)).max() > 1


def test_a_lora_file_is_tuned_weights_too(made, tiny, tmp_path):
    import torch

    from diffalign.models.adapters.lora import add_lora, lora_parameters, save_lora
    from diffalign.models.loading.base import load_base

    _, pictures = made
    base = load_base(tiny["sdxl"], vae_and_text=False)
    add_lora(base.unet, 2, 4, ["to_q", "to_v"], seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(base.unet):
            parameter.fill_(0.3)
    file = save_lora(base.unet, tmp_path / "lora", base.family)
    for path in (file, tmp_path / "lora"):
        folder = tmp_path / f"from-{path.name}"
        changed = generate(tiny["sdxl"], PROMPTS[:1], SEEDS, tuned=str(path), out_dir=folder, sampling=TWO)
        assert np.abs(np.asarray(changed[0].open(), int) - np.asarray(pictures[0].open(), int)).max() > 1


def test_half_precision_makes_nearly_the_same_image(made, tiny, tmp_path):
    _, pictures = made
    half = generate(
        tiny["sdxl"],
        PROMPTS[:1],
        SEEDS[:1],
        out_dir=tmp_path / "half",
        sampling=Sampling(num_inference_steps=2, dtype="bfloat16"),
    )
    difference = np.asarray(half[0].open(), int) - np.asarray(pictures[0].open(), int)
    assert 0 < np.abs(difference).mean() < 8


def test_faults_are_found_before_the_model_is_loaded(tiny, tmp_path, monkeypatch):
    no_loading(monkeypatch)
    arguments = {"out_dir": tmp_path}
    with pytest.raises(ValueError, match="scheduler 'ddpm' is unknown"):
        generate(tiny["sd"], PROMPTS, SEEDS, sampling=Sampling(scheduler="ddpm"), **arguments)
    with pytest.raises(ValueError, match="dtype 'fp16' is unknown; allowed: float32"):
        generate(tiny["sd"], PROMPTS, SEEDS, sampling=Sampling(dtype="fp16"), **arguments)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        generate(tiny["sd"], PROMPTS, SEEDS, sampling=Sampling(num_inference_steps=0), **arguments)
    with pytest.raises(FileNotFoundError, match="diffalign generate"):
        read_image_manifest(tmp_path)
