"""The benchmark of the kernels on small shapes, and its count of saved bytes against the layers' own sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor, nn

import benchmarks.kernels as module
from benchmarks.kernels import NHWC, kept, main
from benchmarks.ladder import rungs
from benchmarks.memory import autocast_unet
from diffalign.experimental.fusing import fuse_kernels
from diffalign.experimental.kernels import kernels_by


@pytest.mark.skipif(kernels_by("cpu") is None, reason="the kernels need triton, on the CPU with its interpreter")
def test_the_command_on_small_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NORMS", ((64, 128),))
    monkeypatch.setattr(module, "GEGLUS", ((32, 64),))
    short = ["--resolution", "64", "--images", "1", "--steps", "2", "--rounds", "1"]
    main(["--device", "cpu", "--dtype", "fp32", *short, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["copy_gb_per_s"] > 0
    found = [(line["case"], line["way"], line["form"]) for line in result["lines"]]
    ways = [(way, form) for way in ("forward", "backward") for form in ("torch", "kernels")]
    assert found == [(case, *way) for case in ("GroupNorm, SiLU 64 x 8²", "GEGLU 16 x 32") for way in ways]
    for line in result["lines"]:
        moved = 4 * (64 * 64 * (2 if line["way"] == "forward" else 3))
        if line["case"].startswith("GEGLU"):
            moved = 4 * (16 * 32 * (3 if line["way"] == "forward" else 5))
        assert line["gb_per_s"] == pytest.approx(moved / line["ms"] / 1e6)
    assert "| GEGLU 16 x 32 | backward | kernels |" in (tmp_path / "kernels.md").read_text()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_not_kept_is_what_the_layers_say(tiny_sdxl: Path, method: str) -> None:
    """Under bfloat16 autocast, to the byte, from the sizes of the layers' answers.

    A norm with SiLU: torch keeps x and its own answer in float32, the kernels x in bfloat16: 6 bytes a value, or 8
    where a convolution (the shortcut) keeps that x anyway. A transformer's norm: x in float32 before, in bfloat16 now.
    gelu(g): 2 bytes. With LoRA only what comes after the first LoRA layer needs a slope at all.
    """
    from diffusers import UNet2DConditionModel

    config = dict(UNet2DConditionModel.load_config(tiny_sdxl / "unet"))
    unet = autocast_unet(config, 16 if method == "lora" else None).to(memory_format=NHWC)
    expected: list[int] = []

    def counts(layer: nn.Module, bytes_: int) -> None:
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            expected.append(bytes_ * out.numel() if given[0].requires_grad else 0)

        hooks.append(layer.register_forward_hook(hook))

    hooks: list = []
    for layer in list(unet.modules()):
        kind = type(layer).__name__
        if kind == "ResnetBlock2D":
            counts(layer.norm1, 6 if layer.conv_shortcut is None else 8)
            counts(layer.norm2, 6)
        elif kind == "Transformer2DModel":
            counts(layer.norm, 2)
        elif kind == "GEGLU":
            counts(layer, 2)
    counts(unet.conv_norm_out, 6)
    before = kept(unet, 16)
    for hook in hooks:
        hook.remove()
    fuse_kernels(unet, "meta")
    assert before - kept(unet, 16) == sum(expected)
    assert sum(expected) > 0.1 * before


def test_the_rung_is_there_for_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    climbed = {device: {lever.name: settings for lever, settings in rungs(device)} for device in ("cpu", "cuda")}
    assert "fused kernels" not in climbed["cpu"]
    fused, compiled = climbed["cuda"]["fused kernels"], climbed["cuda"]["compiled blocks"]
    assert fused["model.channels_last"]
    assert fused["model.fused_kernels"]
    assert compiled["model.compile"]
    assert not compiled["model.fused_kernels"]
