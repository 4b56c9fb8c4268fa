"""LoRA files extracted from full tunes: ranks and errors against numpy's SVD and by hand, and read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.cli.main import main
from diffalign.export.extract import Extraction, cut_to_rank, extract_lora
from diffalign.export.names import ExportError
from diffalign.models.adapters.lora import LORA_FILE, load_lora, lora_layers
from diffalign.models.adapters.merge import lora_updates, merge_tuned
from diffalign.models.loading.base import load_base
from tests.cli.test_main import fails
from tests.models.adapters.test_merge import by_hand, weights, write_full, write_lora
from tests.models.conftest import Model


def with_lora(model: Model, file: Path | str) -> dict[str, torch.Tensor]:
    """The weights of the base with a LoRA file added in by peft."""
    unet = model.unet()
    load_lora(unet, file)
    found = weights(unet)
    for name, module in unet.named_modules():
        if module in lora_layers(unet):
            place = f"{name}.base_layer.weight"
            found[place] = found[place] + module.double().get_delta_weight("default")
    return {name.replace(".base_layer", ""): value for name, value in found.items() if ".lora_" not in name}


def product(module) -> torch.Tensor:
    return module.up.double().flatten(1) @ module.down.double().flatten(1)


@pytest.mark.parametrize(
    ("how", "rank"),
    [
        (Extraction(rank=3), 3),
        (Extraction(energy=0.5), 1),  # 16 of 30
        (Extraction(energy=0.8), 2),  # 25 of 30
        (Extraction(energy=25 / 30), 2),
        (Extraction(energy=0.84), 3),
        (Extraction(energy=1.0), 4),
        (Extraction(rank=1, energy=0.8), 1),
        (Extraction(rank=99), 4),  # a change of rank 4 has no more
    ],
)
def test_ranks_by_hand(how: Extraction, rank: int) -> None:
    """Singular values 4, 3, 2, 1: squares 16, 9, 4, 1 of 30."""
    change = torch.zeros(4, 6, dtype=torch.float64)
    change[[2, 0, 3, 1], [1, 4, 0, 5]] = torch.tensor([3.0, -4.0, 1.0, 2.0], dtype=torch.float64)
    for matrix in (change, change.T):
        module = cut_to_rank("x", matrix, how)
        assert module.rank == module.alpha == rank
        missed = math.sqrt(sum(s * s for s in (4, 3, 2, 1)[rank:]))
        assert (matrix - product(module)).norm().item() == pytest.approx(missed, abs=1e-6)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (6, 4, 3, 3), (24, 2, 1, 1)])
def test_the_cut_is_that_of_numpys_svd(shape: tuple[int, ...]) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3
    module = cut_to_rank("x", change, Extraction(rank=2))
    u, s, v = np.linalg.svd(change.flatten(1).numpy(), full_matrices=False)
    torch.testing.assert_close(product(module), torch.from_numpy(u[:, :2] * s[:2] @ v[:2]), rtol=0, atol=1e-9)
    assert module.down.shape == (2, *shape[1:])
    assert module.up.shape == (shape[0], 2, *(1,) * (len(shape) - 2))
    torch.testing.assert_close(module.down.norm(), module.up.norm())  # balanced, so that half precision has both
    assert cut_to_rank("x", change * 0, Extraction(rank=2)) is None


@pytest.mark.parametrize(("family", "layout"), [("sdxl", "kohya"), ("sd", "diffusers")])
def test_a_lora_that_was_merged_into_the_weights_comes_out_again(
    models, tmp_path: Path, family: str, layout: str
) -> None:
    """Rank 4 is all that it has: nothing is missed, and every other layer is left out of the file."""
    model = models[family]
    targets = ("to_q", "to_out.0", "conv1", "conv_in")
    lora = write_lora(model, tmp_path / "lora", seed=1, rank=4, alpha=10, targets=targets)
    base = load_base(str(model.folder))
    unet = tmp_path / "lora_as_full"
    merge_tuned(base, [(lora, 0.5), (write_full(model, tmp_path / "none", 1), 0.0), (lora, 0.5)], unet)
    out = tmp_path / "out.safetensors"
    report = extract_lora(unet, out, Extraction(rank=8, layout=layout), base=str(model.folder))
    assert report.relative_error < 1e-5  # the full weights are float32
    assert report.left_out == {}
    expected = with_lora(model, lora)
    for name, value in with_lora(model, out).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    assert {layer.name for layer in report.layers if layer.rank} == {
        n for n, _, _, _ in lora_updates(base.unet, Path(lora) / LORA_FILE)
    }
    assert {layer.rank for layer in report.layers if layer.change > 1e-3} == {4}


def test_the_report_is_what_the_file_misses(models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors of a half-precision file against weights read back, written out here; norms and biases are named."""
    model = models["sd"]
    full = write_full(model, tmp_path / "run", 1)
    out = tmp_path / "out.safetensors"
    command = ["--to", "kohya", "--out", str(out), "--extract-energy", "0.9", "--dtype", "bf16"]
    main(["export", full, "--base", str(model.folder), *command])
    printed = capsys.readouterr().out
    report = extract_lora(full, out, Extraction(energy=0.9, dtype="bf16"), base=str(model.folder), overwrite=True)
    assert load_file(out)[next(k for k in load_file(out) if k.endswith("down.weight"))].dtype == torch.bfloat16
    base, tuned, found = weights(model.base.unet), by_hand(model, [(full, 1.0)]), with_lora(model, out)
    missed = {name: (tuned[name] - found[name]).norm().item() for name in base}
    change = {name: (tuned[name] - base[name]).norm().item() for name in base}
    for layer in report.layers:
        assert layer.missed == pytest.approx(missed[f"{layer.name}.weight"], rel=1e-5)
        assert layer.relative**2 < 0.1 + 0.001  # 90 % of the squared change is there, but for bfloat16
    assert report.total_error == pytest.approx(math.hypot(*missed.values()) / math.hypot(*change.values()), rel=1e-5)
    assert report.left_out.keys() == {name for name, value in base.items() if value.ndim == 1}
    assert report.left_out == pytest.approx({name: change[name] for name in report.left_out}, rel=1e-5)
    stored = json.loads((tmp_path / "out.extraction.json").read_text())
    assert stored["total_error"] == report.total_error
    assert len(stored["layers"]) == len(report.layers)
    summary = report.summary()
    assert summary in printed
    assert f"missed of their change: {report.relative_error:.1%}" in summary
    assert f"{report.total_error:.1%} of the whole change is missed" in summary


def test_what_cannot_be_extracted_is_refused(models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = models["sd"], tmp_path / "out.safetensors"
    with pytest.raises(ExportError, match="has the weights of its base: there is no change"):
        extract_lora(model.folder / "unet", out, Extraction(rank=4), base=str(model.folder))
    assert not out.exists()
    with pytest.raises(ExportError, match="down has weights that are not finite"):
        cut_to_rank("down", torch.full((4, 3), math.nan, dtype=torch.float64), Extraction(rank=1))
    out.with_suffix(".extraction.json").write_text("{}")
    with pytest.raises(ExportError, match=r"out.extraction.json exists"):
        extract_lora(model.folder / "unet", out, Extraction(rank=4), base=str(model.folder))
    for wrong in ({}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(ExportError, match=r"rank|energy"):
            Extraction(**wrong)
    for to, word in (("single-file", "holds a full tune whole"), ("diffusers", "has diffusers' layout already")):
        extract = ["--extract-rank", "4"] if to == "single-file" else []
        assert word in fails(capsys, "export", str(model.folder), "--to", to, "--out", str(out), *extract)
