"""LyCORIS files as parts of a base, against sums written here by index, convolutions in a row, and our own DoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d

from diffalign.models.adapters.dora import MAGNITUDE
from diffalign.models.adapters.lora import LORA_FILE, add_lora, load_lora, save_lora
from diffalign.models.adapters.merge import merge_into, merge_loras_into, merge_tuned
from diffalign.models.adapters.save_load import find_tuned
from diffalign.models.ldm_names import unet_place
from diffalign.models.loading.base import load_base
from diffalign.models.loading.family import ModelError
from diffalign.models.spec import ModelSpec
from tests.models.conftest import Model, make_model, move_lora

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # 64 to 64
CONV = "down_blocks.0.resnets.0.conv1"  # 32 to 32, 3 x 3
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> Model:
    return make_model(tiny_sdxl)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 7 * len(shape)))


def merged(model: Model, state: Tensors, folder: Path, weight: float = 1.0) -> dict[str, Tensor]:
    """The change of every weight that a file changes."""
    save_file(state, folder / "theirs.safetensors")
    unet = model.unet()
    merge_loras_into(unet, {str(folder / "theirs.safetensors"): weight})
    own = dict(model.base.unet.named_parameters())
    return {k: (p - own[k]).detach() for k, p in unet.named_parameters() if not torch.equal(p, own[k])}


def named(module: str, parts: Tensors, prefix: str = "lora_unet_") -> Tensors:
    return {f"{prefix}{module.replace('.', '_')}.{name}": value for name, value in parts.items()}


def assert_change(found: dict[str, Tensor], module: str, expected: Tensor) -> None:
    assert list(found) == [f"{module}.weight"]
    torch.testing.assert_close(found[f"{module}.weight"], expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", ["diffusers", "original"])
def test_loha_is_the_product_of_two_loras(model: Model, tmp_path: Path, names: str) -> None:
    parts = {f"hada_w{i}_{side}": draw(*shape) / 4 for i in (1, 2) for side, shape in (("a", (64, 3)), ("b", (3, 64)))}
    module = LINEAR if names == "diffusers" else unet_place(LINEAR, model.base.unet.config)
    assert module == LINEAR or module.startswith("input_blocks.")
    found = merged(model, named(module, parts | {"alpha": torch.tensor(6.0)}), tmp_path, weight=0.5)
    by_hand = torch.zeros(64, 64, dtype=torch.float64)
    for o in range(64):
        for i in range(64):
            one = sum(float(parts["hada_w1_a"][o, r]) * float(parts["hada_w1_b"][r, i]) for r in range(3))
            two = sum(float(parts["hada_w2_a"][o, r]) * float(parts["hada_w2_b"][r, i]) for r in range(3))
            by_hand[o, i] = 0.5 * (6 / 3) * one * two
    assert_change(found, LINEAR, by_hand)


def test_lokr_is_a_kronecker_product(model: Model, tmp_path: Path) -> None:
    w1, a, b = draw(4, 8), draw(16, 2) / 4, draw(2, 8) / 4
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    found = merged(model, named(LINEAR, parts, "lycoris_"), tmp_path)
    blocks = [[0.5 * w1[i, j] * (a @ b) for j in range(8)] for i in range(4)]
    assert_change(found, LINEAR, torch.cat([torch.cat(row, dim=1) for row in blocks]))
    # of a convolution, both factors whole: no scale
    w1, w2 = draw(4, 4), draw(8, 8, 3, 3)
    found = merged(model, named(CONV, {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9.0)}), tmp_path)
    x = draw(1, 32, 6, 6)
    groups = [conv2d(x[:, 8 * j : 8 * j + 8], w2, padding=1) for j in range(4)]  # each part of the input through w2
    expected = torch.cat([sum(w1[i, j] * groups[j] for j in range(4)) for i in range(4)], dim=1)
    torch.testing.assert_close(conv2d(x, found[f"{CONV}.weight"], padding=1), expected, rtol=1e-3, atol=1e-3)


def test_cores_are_convolutions_in_a_row(model: Model, tmp_path: Path) -> None:
    down, mid, up, x = draw(4, 32, 1, 1), draw(4, 4, 3, 3) / 4, draw(32, 4, 1, 1), draw(2, 32, 6, 6)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    found = merged(model, named(CONV, parts | {"alpha": torch.tensor(2.0)}), tmp_path)
    expected = 0.5 * conv2d(conv2d(conv2d(x, down), mid, padding=1), up)
    torch.testing.assert_close(conv2d(x, found[f"{CONV}.weight"], padding=1), expected, rtol=1e-3, atol=1e-3)
    # LoHa's factors with a core are the same three convolutions: here the second factor is 1 everywhere
    ones = {"hada_w2_a": torch.ones(1, 32), "hada_w2_b": torch.ones(1, 32), "hada_t2": torch.ones(1, 1, 3, 3)}
    parts = {"hada_w1_a": up.flatten(1).t(), "hada_w1_b": down.flatten(1), "hada_t1": mid} | ones
    state = {name: value.contiguous() for name, value in named(CONV, parts).items()}
    found = merged(model, state, tmp_path)
    torch.testing.assert_close(conv2d(x, found[f"{CONV}.weight"], padding=1), 2 * expected, rtol=1e-3, atol=1e-3)


def test_kohyas_dora_is_ours(model: Model, tmp_path: Path) -> None:
    unet = model.unet()
    add_lora(unet, rank=2, alpha=4, use_dora=True)
    move_lora(unet)
    (tmp_path / "ours").mkdir()
    save_lora(unet, tmp_path / "ours", model.base.family)
    ours, theirs = load_file(tmp_path / "ours" / LORA_FILE), {}
    for name, value in ours.items():
        module, _, part = name.removeprefix("unet.").rpartition(".lora_")
        if name.endswith(MAGNITUDE):
            theirs |= named(module, {"dora_scale": value[:, None].contiguous()})
        else:
            kohya = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
            theirs |= named(module, {kohya: value, "alpha": torch.tensor(4.0)})
    found, expected = merged(model, theirs, tmp_path), model.unet()
    merge_into(expected, [(str(tmp_path / "ours"), 1.0)])
    own = dict(model.base.unet.named_parameters())
    for name, change in found.items():
        torch.testing.assert_close(change, (expected.get_parameter(name) - own[name]).detach(), rtol=1e-4, atol=1e-6)
    assert len(found) == sum(MAGNITUDE in name for name in ours)
    # lengths of columns, as LyCORIS had them first: with them as they are, and no update, nothing changes
    weight = own[f"{CONV}.weight"].detach()
    columns = {"dora_scale": weight.flatten(2).norm(dim=(0, 2))[None, :, None, None].contiguous()}
    nothing = {"lora_down.weight": torch.zeros(2, 32, 3, 3), "lora_up.weight": draw(32, 2, 1, 1)}
    unchanged = merged(model, named(CONV, nothing | columns), tmp_path)
    assert all(float(change.abs().max()) < 1e-6 for change in unchanged.values())
    doubled = merged(model, named(CONV, nothing | {"dora_scale": 2 * columns["dora_scale"]}), tmp_path)
    assert_change(doubled, CONV, weight)


def test_where_such_files_work_and_where_they_are_refused(model: Model, tmp_path: Path) -> None:
    file, parts = tmp_path / "loha.safetensors", {"hada_w1_a": draw(64, 2), "hada_w1_b": draw(2, 64)}
    parts |= {name.replace("1", "2"): value.clone() for name, value in parts.items()}
    save_file(named(LINEAR, parts), file)
    with pytest.raises(ModelError, match=r"is LoHa, and not a plain LoRA.*model.merge_lora, --merge-lora .*=1"):
        load_lora(model.unet(), file)
    merged_base = load_base(ModelSpec(str(model.folder), merge_lora={str(file): 0.3}), vae_and_text=False)
    merge_tuned(load_base(str(model.folder), vae_and_text=False), [(str(file), 0.3)], tmp_path / "whole")
    whole = find_tuned(tmp_path / "whole")
    assert whole.kind == "unet"
    state = load_file(whole.path / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(state[f"{LINEAR}.weight"], merged_base.unet.get_submodule(LINEAR).weight.detach())
    for wrong, message in (
        (named("x", parts), "4 of its 4 tensors have no module, e.g. lora_unet_x.hada_w1_a"),
        (named(LINEAR, parts, "lora_te1_"), "without parts of text encoders"),
        (named(CONV, parts), r"the update of down_blocks.0.resnets.0.conv1 is \[64, 64\]"),
        (named(LINEAR, parts | {"hada_t1": draw(2, 2, 3, 3)}), "make no update: they are of no kind"),
        (named(LINEAR, parts | {"diff_b": draw(64)}), "make no update: they are of no kind"),
        (named(LINEAR, parts | {"alpha": torch.tensor(0.0)}), "alpha is tensor.*not one number above 0"),
        (named(LINEAR, parts | {"hada_w1_a": draw(64, 3)}), "make no update"),
        (named(LINEAR, parts | {"dora_scale": draw(3, 1)}), r"dora_scale of .* is \[3, 1\]"),
        (
            named(LINEAR, {"lokr_w1": draw(8, 8), "lokr_w2": draw(8, 8), "lokr_t2": draw(1, 1)}),
            "lokr_t2 does not belong",
        ),
        (named(LINEAR, parts | {"hada_w1_a": draw(64, 2) * torch.nan}), "NaN or infinite values"),
    ):
        with pytest.raises(ModelError, match=message):
            merged(model, wrong, tmp_path)
