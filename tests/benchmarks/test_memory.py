"""The counted memory of a preset: every byte of a small model's run, and the figures in the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.memory import GIB, activations, autocast_unet, card_of, count, held, presets
from benchmarks.memory_run import main, preset_config
from benchmarks.models import pairs_file
from benchmarks.ours import Ours
from benchmarks.peak import Peak
from diffalign.config.schema import Config, ConfigError, load_config
from diffalign.models.kernels.checkpointing import set_checkpointing
from diffalign.models.policy.reference import FrozenCopy
from diffalign.training.inspect.activation_memory import SavedForBackward
from diffalign.training.inspect.meta_forward import FusedAttention
from tests.test_training_configs import header

ROOT = Path(__file__).parents[2]
PRESETS = presets()
COUNTED = {row["preset"]: row for row in json.loads((ROOT / "benchmarks/results/memory.json").read_text())["presets"]}


def layers_of(name: str) -> tuple[object, ...]:
    """What decides the operations of a preset's UNet: others differ in batch, optimiser and reference alone."""
    config = load_config(PRESETS[name])
    codes = getattr(config.tuning, "quantize_base", None)
    return config.tuning.method, codes, config.model.gradient_checkpointing, config.model.fused_kernels


ONE_OF_A_KIND = list({layers_of(name): name for name in PRESETS}.values())


def size(tensors: object) -> int:
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_by_hand(device: str) -> None:
    x = torch.ones(1000, device=device)  # there before
    with Peak() as peak:
        a = x + 1
        a.mul_(2).view(10, 100)  # no storage of their own
        b = a * 2
        del a
        c = b * 2
        del b, c
        x.neg()
    assert peak.bytes == 2 * 4000


def test_the_peak_reaches_into_a_checkpoints_second_forward() -> None:
    """Of ten layers with three inner tensors each, kept is one input a layer, and the peak has one layer's more."""
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(1000, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return x.exp().sin().exp()

    def whole(x: Tensor) -> Tensor:
        for _ in range(10):
            x = checkpoint(layer, x, use_reentrant=False)
        return x.sum()

    with SavedForBackward() as kept:
        out = whole(x)
    assert kept.bytes == 9 * 4000 + 4  # nine layers' inputs made here, and the sum
    with Peak() as peak:
        out = whole(x)
        out.backward()
    assert 13 * 4000 <= peak.bytes <= 17 * 4000


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_run_holds_is_what_is_counted(name: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "pairs.parquet", 8, 64)
    config = preset_config(PRESETS[name], tiny_sdxl, data, tmp_path, 64)
    ours = Ours(config)
    ours.step()
    run = ours.run
    _, parts = held(config, dict(run.unet.config))
    assert parts["weights"] == size(run.unet.parameters()) + size(run.unet.buffers())  # codes of a quantised base
    assert parts["gradients"] == size(run.parameters)
    reference = run.networks._reference
    assert parts["reference"] == (size(reference.module.parameters()) if isinstance(reference, FrozenCopy) else 0)
    states = size(x for state in run.optimizer.state.values() for x in state.values())
    if config.training.optimizer == "adamw_8bit_bf16":  # small parameters have float32 moments: many here
        small = sum(p.numel() for p in run.parameters if p.numel() < 4096)
        scales = sum(-p.numel() % 256 > 0 for p in run.parameters if p.numel() >= 4096)
        assert states == pytest.approx(parts["states"] + small * (8 - 2.03125), abs=8 * scales + 1)
    else:
        steps = sum(state["step"].nbytes for state in run.optimizer.state.values())
        assert states - steps == parts["states"]
    assert all(value >= 0 for value in parts.values())


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_a_backward_needs_more_than_its_forward_kept(name: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    config = preset_config(PRESETS[name], tiny_sdxl, tmp_path / "pairs.parquet", tmp_path, 64)
    parts = count(config, json.loads((tiny_sdxl / "unet/config.json").read_text()))
    assert parts["activations"] > 0
    assert parts["backward"] >= 0
    assert parts["sum"] == sum(value for part, value in parts.items() if part != "sum")


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_the_activations_are_those_of_autocast(checkpointing: str, tiny_sdxl: Path) -> None:
    """`meta` casts by hooks; CUDA's own autocast keeps the same bytes."""
    from diffusers import UNet2DConditionModel

    from diffalign.training.inspect.meta_forward import unet_inputs

    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet").train().to("cuda")
    counted, _ = activations(autocast_unet(dict(unet.config), None), checkpointing, 2, 32)
    unet.set_attn_processor(FusedAttention())
    set_checkpointing(unet, checkpointing)
    inputs = unet_inputs(unet, 2, 32, device="cuda")
    with SavedForBackward(unet.parameters()) as kept, torch.autocast("cuda", torch.bfloat16):
        out = unet(**inputs)[0]
    del out
    assert kept.bytes == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_card_with_room_and_says_so(name: str) -> None:
    config, row, card = load_config(PRESETS[name]), COUNTED[name], card_of(name)
    assert isinstance(config, Config)
    assert (config.training.optimizer, config.model.gradient_checkpointing, config.training.train_batch_size) == (
        row["optimizer"],
        row["checkpointing"],
        row["pairs"],
    )
    parts = ("weights", "casts", "reference", "gradients", "states", "activations", "backward")
    assert row["sum"] == sum(row[part] for part in parts)
    assert row["room"] == pytest.approx(1 - row["sum"] / (card * GIB))
    assert row["room"] > 0.15
    said = header(PRESETS[name])["Hardware"]
    assert f"one GPU with {card} GB. Counted {row['sum'] / 1e9:.1f} GB" in said
    assert f"{row['room']:.0%}".replace("%", " %") in said
    assert "Not measured on a card" in said
    shown = next(line for line in (ROOT / "docs/training.md").read_text().splitlines() if f"`{name}`" in line)
    assert f"| {row['sum'] / 1e9:.1f} |" in shown
    assert "not yet measured" in shown


def test_all_cards_have_one() -> None:
    assert COUNTED.keys() == PRESETS.keys()
    assert [card_of(name) for name in PRESETS] == [6, 8, 12, 16, 24, 40, 80]


def test_what_is_not_counted_is_refused(tmp_path: Path) -> None:
    from tests.gpu_models import SDXL_UNET

    for override in ("data.cache_dir=null", "training.mixed_precision=no", "training.ema_decay=0.9"):
        config = load_config(PRESETS["dpo_lora_8gb"], [override])
        assert isinstance(config, Config)
        with pytest.raises(ConfigError, match="counted are"):
            count(config, SDXL_UNET)
    points = ["objective={name: inversion_dpo, points_per_forward: 2}", "data.proportion_empty_prompts=0"]
    config = load_config(PRESETS["dpo_lora_8gb"], points)
    assert isinstance(config, Config)
    with pytest.raises(ConfigError, match="one point of a pair"):
        count(config, SDXL_UNET)


def test_fused_kernels_count(tiny_sdxl: Path) -> None:
    """They keep less, and nothing else changes."""
    from diffusers import UNet2DConditionModel

    unet = dict(UNet2DConditionModel.load_config(tiny_sdxl / "unet"))
    lever = ["model.channels_last=true", "model.fused_kernels=true"]
    base = ["data.resolution=64", "model.gradient_checkpointing=none"]
    plain, fused = (load_config(PRESETS["dpo_full_24gb"], [*base, *more]) for more in ([], lever))
    assert isinstance(plain, Config)
    assert isinstance(fused, Config)
    without, found = count(plain, unet), count(fused, unet)
    assert found["activations"] < 0.95 * without["activations"]
    for part in ("weights", "gradients", "states", "reference"):
        assert found[part] == without[part]


def test_the_command_on_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [str(PRESETS["dpo_full_24gb"]), "--model", "tiny", "--device", "cpu", "--steps", "1"]
    main([*short, "--out", str(tmp_path / "out")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["preset"], row["allocated"], row["fits"]) == ("dpo_full_24gb", None, None)
    assert row["counted"]["sum"] > 0
    assert row["seconds"] > 0
    assert "| dpo_full_24gb | 0.0" in capsys.readouterr().out
