"""A resumed run has the data and the base that it began with, or an error names the difference before encoding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.config.schema import Config
from diffalign.data.row import ImageRef
from diffalign.data.spec import DataSpec
from diffalign.data.table.identity import SAMPLES, data_identity
from diffalign.data.table.open import open_pairs
from diffalign.models.loading.fingerprint import outline, outline_files
from diffalign.training.checkpoints.checkpoint import CheckpointError
from diffalign.training.run import run_training
from tests.data.helpers import pick_rows, png, write_jsonl, write_parquet
from tests.tiny import make_tiny

MakeConfig = Callable[..., Config]


def swap(pairs: Path) -> None:
    (pairs / "chosen").rename(pairs / "other")
    (pairs / "rejected").rename(pairs / "chosen")
    (pairs / "other").rename(pairs / "rejected")


def add(pairs: Path) -> None:
    for side, seed in (("chosen", 1), ("rejected", 2)):
        (pairs / side / "999.png").write_bytes(png(seed, (70, 80)))
    (pairs / "999.txt").write_text("a red circle")


def replace_all(pairs: Path) -> None:
    """Other images of the same names."""
    for place, file in enumerate(sorted((pairs / "chosen").glob("*.png"))):
        file.write_bytes(png(1000 + place, (70, 80)))


def rewrite(pairs: Path) -> None:
    (pairs / "003.txt").write_text("a large square")


def retrain(base: Path) -> None:
    file = base / "unet/diffusion_pytorch_model.safetensors"
    state = {name: x + 1e-3 * torch.randn_like(x) for name, x in load_file(file).items()}
    save_file(state, file, {"format": "pt"})


CHANGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "swapped sides": ("pairs", swap, r"data\.path .*pairs: contents of the image files changed"),
    "another pair": ("pairs", add, r"data\.path .*pairs: number of rows: 12 then, 13 now"),
    "other pictures": ("pairs", replace_all, r"data\.path .*pairs: .*of the image files changed"),
    "another prompt": ("pairs", rewrite, r"data\.path .*pairs: prompts changed"),
    "another UNet": ("base", retrain, r"model\.pretrained_model_name_or_path .*base: another unet"),
}


@pytest.fixture
def resumable(make_config: MakeConfig, tmp_path: Path, pair_folder: Path) -> Callable[[], dict[str, float]]:
    """Runs two steps; what is returned goes on to the third."""
    shutil.copytree(pair_folder, tmp_path / "pairs")
    base = make_tiny(tmp_path / "base", "sd")
    shared = {"data.path": str(tmp_path / "pairs"), "training.checkpointing_steps": 2}
    run_training(make_config(base, {**shared, "training.max_train_steps": 2}))
    again = {**shared, "training.max_train_steps": 3, "training.resume_from_checkpoint": "latest"}
    return lambda: run_training(make_config(base, again))


def test_what_differs_is_named(
    resumable: Callable[[], dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, and each change of its data or base in turn; copies of both, with other times, are the same."""
    for what in ("pairs", "base"):
        shutil.copytree(tmp_path / what, tmp_path / f"{what}.kept")
    with monkeypatch.context() as patch:
        patch.setattr("diffalign.training.build.source_builder", lambda *_: pytest.fail("something was encoded"))
        for what, change, words in CHANGES.values():
            change(tmp_path / what)
            with pytest.raises(CheckpointError, match=rf"(?s)checkpoint-2 is of a run .*\n  {words}.*\nrestore what"):
                resumable()
            shutil.rmtree(tmp_path / what)
            shutil.copytree(tmp_path / f"{what}.kept", tmp_path / what, copy_function=shutil.copyfile)
    assert resumable()["loss"] > 0


def test_labels_scores_and_weights_are_part_of_it(tmp_path: Path) -> None:
    def parts(**changes: object) -> dict[str, str]:
        rows = pick_rows(5)
        rows = [{**row, "weight": 1.0, "score_0": 0.5, "score_1": 0.25} for row in rows]
        rows[2] |= changes
        return data_identity(open_pairs(write_parquet(tmp_path / "pairs.parquet", rows)))

    was = parts()
    for change, part in (
        ({"label_0": 1.0, "label_1": 0.0}, "sides"),
        ({"weight": 2.0}, "terms"),
        ({"score_0": 0.75}, "scores"),
        ({"image_0_uid": "z"}, "ids"),
        ({"caption": "another"}, "prompts"),
    ):
        now = parts(**change)
        assert [name for name in was if was[name] != now[name]] == [part]


def test_it_reads_a_few_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_pairs(write_jsonl(tmp_path / "pairs.jsonl", 3 * SAMPLES), DataSpec(verify="none"))
    reads, real = [], ImageRef.read
    monkeypatch.setattr(ImageRef, "read", lambda ref: reads.append(ref.path) or real(ref))
    data_identity(table)
    assert len(reads) == 2 * SAMPLES


def test_an_outline_knows_another_training(tmp_path: Path) -> None:
    one = torch.nn.Linear(300, 200)
    was = outline(one)
    save_file({name: x.contiguous() for name, x in one.state_dict().items()}, tmp_path / "one.safetensors")
    file = outline_files(tmp_path / "one.safetensors")
    assert outline(torch.nn.Linear(300, 200)) != was
    with torch.no_grad():
        one.weight[::2, ::3] += 1e-4
    assert outline(one) != was
    save_file({name: x.contiguous() for name, x in one.state_dict().items()}, tmp_path / "one.safetensors")
    assert outline_files(tmp_path / "one.safetensors") != file
