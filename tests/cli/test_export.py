"""`diffalign export` as a user types it, after a run on a tiny SDXL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from diffalign.cli.main import main
from diffalign.cli.next_steps import export_commands
from diffalign.config.schema import Config, save_config
from diffalign.models.adapters.save_load import load_pipeline
from tests.cli.test_main import BASE, fails
from tests.models.conftest import picture


@pytest.fixture
def run(make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path) -> Path:
    """Four steps of LoRA with alpha twice the rank, and a checkpoint of the second."""
    settings = {"training.checkpointing_steps": 2, "training.learning_rate": 1e-2, "training.lr_warmup_steps": 0}
    config = make_config(tiny_sdxl, settings)
    save_config(config, tmp_path / "config.yaml")
    main(["train", str(tmp_path / "config.yaml")])
    return Path(config.output_dir)


def test_a_run_is_exported_as_a_lora_and_as_a_model(
    run: Path, tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, model, half = (tmp_path / f"{name}.safetensors" for name in ("lora", "model", "half"))
    capsys.readouterr()
    main(["export", str(run), "--to", "kohya", "--out", str(lora)])
    main(["export", str(run), "--to", "single-file", "--out", str(model), "--dtype", "fp32"])
    main(["export", str(run / "checkpoint-2"), "--to", "single-file", "--out", str(half)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{lora}: a LoRA in kohya's layout, fp32, 0.")
    assert [line.partition("copy it to ")[2].split()[0] for line in said[1:3]] == ["models/loras", "models/Lora"]
    assert "the card has no evaluation" in said[3]
    assert said[8].startswith(f"{half}: UNet, VAE and text encoders in one file, fp16, ")
    expected = picture(load_pipeline(str(tiny_sdxl), tuned=str(run)))
    beside = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    beside.load_lora_weights(str(tmp_path), weight_name=lora.name)
    assert export_commands(str(run), "b")[0][1:3] == [str(run), "--to"]  # the run names its base
    (alone := tmp_path / "alone").mkdir()  # beside no config.yaml
    alone = lora.rename(alone / lora.name)
    assert export_commands(str(alone), "b")[0][1:4] == [str(alone), "--base", "b"]
    np.testing.assert_allclose(picture(beside), expected, rtol=0, atol=1e-5)
    merged = StableDiffusionXLPipeline.from_single_file(str(model), config=str(tiny_sdxl), add_watermarker=False)
    np.testing.assert_allclose(picture(merged), expected, rtol=0, atol=1e-4)
    assert {value.dtype.itemsize for value in load_file(half).values()} == {2}
    assert half.stat().st_size < 0.51 * model.stat().st_size

    before = half.read_bytes()
    again = ["export", str(run), "--to", "single-file", "--out", str(half)]
    assert "exists; give another name, or --overwrite" in fails(capsys, *again)
    assert half.read_bytes() == before
    main([*again, "--overwrite"])
    assert half.read_bytes() != before  # of the last step, not of the second


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["nowhere", "--to", "kohya", "--out", "OUT"], "no tuned weights at nowhere"),
        ([str(BASE / "unet"), "--to", "single-file", "--out", "OUT"], "give it with --base"),
        ([str(BASE / "unet"), "--to", "single-file", "--out", "OUT", "--base", str(BASE)], "is an AutoencoderDC"),
        ([str(BASE / "unet"), "--to", "kohya", "--out", "OUT", "--base", str(BASE)], "full UNet, which is no LoRA"),
        ([str(BASE / "unet"), "--to", "single-file", "--out", "tuned.ckpt", "--base", "b"], "ends in .safetensors"),
        ([str(BASE / "unet"), "--to", "single-file", "--out", "OUT", "--base", "no/where/here"], "does not exist"),
    ],
)
def test_errors_are_one_message(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    message = fails(capsys, "export", *(str(out) if word == "OUT" else word for word in command))
    assert words in message
    assert "Traceback" not in message
    assert not out.exists()
