"""Damaged checkpoints and cut-off weights are named and never loaded; a full disk leaves existing files intact."""

from __future__ import annotations

import logging
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffalign.config.schema import Config
from diffalign.errors import DiffalignError, ModelError
from diffalign.io import files
from diffalign.io.files import NoSpaceError
from diffalign.models.adapters.save_load import find_tuned
from diffalign.training.checkpoints import final_weights as final
from diffalign.training.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    damage,
    find_checkpoint,
    remove_partial,
    save_checkpoint,
)
from diffalign.training.checkpoints.final_weights import is_finished, save_final_weights
from diffalign.training.run import run_training
from tests.training.test_run import same, weights

MakeConfig = Callable[..., Config]
Usage = namedtuple("Usage", "total used free")


def write(folder: Path) -> None:
    """A UNet of a kind, and settings."""
    (folder / "unet").mkdir()
    save_file({"w": torch.randn(40_000)}, folder / "unet/model.safetensors")
    (folder / "unet/config.json").write_text('{"sample_size": 64}')
    (folder / "config.yaml").write_text("seed: 0\n")


def save(folder: Path, step: int, limit: int | None = None) -> Path:
    return save_checkpoint(folder, Checkpoint(step, write, {"x": torch.ones(30_000)}, {"round": 1}), limit)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def zeros(file: Path) -> None:
    """64 kB of zeros from the middle on, or as many as there are bytes."""
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes((content[:half] + bytes(1 << 16) + content[half + (1 << 16) :])[: len(content)])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: os.truncate(file, file.stat().st_size * 2 // 3),
    "bit": flip,
    "zeros": zeros,
    "nul": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file: file.unlink(),
}
FILES = (
    "unet/model.safetensors",
    "unet/config.json",
    "training_state.pt",
    "config.yaml",
    "source.json",
    "manifest.json",
)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_every_damage_is_named_and_the_one_before_is_taken(
    file: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = save(tmp_path, 2), save(tmp_path, 4)
    assert find_checkpoint(tmp_path, "latest") == newest
    DAMAGE[kind](newest / file)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path, "latest") == before
    assert f"{newest} is damaged and is not used: {file} " in caplog.text
    with pytest.raises(CheckpointError, match=rf"checkpoint-4 is damaged: {file} .*this run has: checkpoint-2.*latest"):
        find_checkpoint(tmp_path, "checkpoint-4")
    DAMAGE[kind](before / file)
    with pytest.raises(CheckpointError, match=rf"no checkpoint of .* is intact:\n  checkpoint-2: {file} (.|\n)*again"):
        find_checkpoint(tmp_path, "latest")


def test_a_run_goes_on_from_the_one_before_a_damaged_one(
    make_config: MakeConfig, tiny_sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = {"training.checkpointing_steps": 2}
    config = make_config(tiny_sd, shared)
    run_training(config)
    expected = weights(config.output_dir)
    flip(Path(config.output_dir) / "checkpoint-4/pytorch_lora_weights.safetensors")
    run_training(make_config(tiny_sd, shared | {"training.resume_from_checkpoint": "latest"}))
    assert "checkpoint-4 is damaged and is not used: pytorch_lora_weights.safetensors has another" in caplog.text
    assert same(weights(config.output_dir), expected)
    assert sorted(p.name for p in Path(config.output_dir).glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-4.abandoned",
    ]


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 2)
    monkeypatch.setattr("diffalign.io.manifest.FORMAT", 0)
    with pytest.raises(DiffalignError, match=r"manifest\.json has format 1, .* reads up to 0: use the version"):
        damage(path)


def test_the_limit_does_not_count_damaged_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3/config.yaml").unlink()
    save(tmp_path, 4, limit=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def no_room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: Usage(1 << 40, 0, free))


def unwritable(folder: Path) -> None:
    write(folder)
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk_is_named_and_nothing_is_left_behind(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = save(tmp_path, 1)
    there = sorted(tmp_path.iterdir())
    writer, free = (write, 5 << 20) if when == "before" else (unwritable, 1 << 30)
    no_room(monkeypatch, free)
    words = r"no space for {} at {}.*: about 3\d\.\d MiB needed, .* free on its disk; the checkpoints there are intact"
    with pytest.raises(NoSpaceError, match=words.format("checkpoint-2", tmp_path)):
        save_checkpoint(tmp_path, Checkpoint(2, writer, {"x": torch.ones(2 << 20)}, weights_bytes=23 << 20), 1)
    with pytest.raises(NoSpaceError, match=words.format("the final weights", tmp_path)):
        save_final_weights(tmp_path, 2, writer, 31 << 20)
    assert sorted(tmp_path.iterdir()) == there
    assert damage(earlier) is None


def test_other_errors_of_a_writer_stay_what_they_are(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        save_checkpoint(tmp_path, Checkpoint(1, broken, {}))
    assert list(tmp_path.iterdir()) == []


def test_half_written_files_of_another_run_are_its_own(tmp_path: Path) -> None:
    theirs = tmp_path / ".checkpoint-2.node7.12.ab.partial"
    theirs.mkdir()
    (theirs / "half").write_text("")

    def writes(folder: Path) -> None:
        write(folder)
        assert sorted(p.name for p in theirs.iterdir()) == ["half"]
        assert folder != theirs

    save_checkpoint(tmp_path, Checkpoint(2, writes, {}), 1)
    save_final_weights(tmp_path, 2, writes)
    assert sorted(p.name for p in theirs.iterdir()) == ["half"]


def test_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    (tmp_path / ".checkpoint-4.host.1.ab.partial").mkdir()
    (tmp_path / ".checkpoint-1.removed").mkdir()
    path.rename(tmp_path / ".checkpoint-2.replaced")  # between two renames
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_run_is_finished_when_its_manifest_is_there_and_true(kind: str, tmp_path: Path) -> None:
    save_final_weights(tmp_path, 4, write)
    assert is_finished(tmp_path)
    DAMAGE[kind](tmp_path / "manifest.json")
    assert not is_finished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "manifest.json") == ["config.yaml", "unet"]


def interrupted(folder: Path) -> None:
    write(folder)
    raise KeyboardInterrupt


def test_a_stop_while_final_weights_are_written_leaves_those_of_before(tmp_path: Path) -> None:
    save_final_weights(tmp_path, 4, write)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(KeyboardInterrupt):
        save_final_weights(tmp_path, 8, interrupted)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert is_finished(tmp_path)


def killed_while_saving(folder: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Final weights written by a process that ends after `at` renames; -1: before it has written all."""

    def newer(partial: Path) -> None:
        parts(partial, "new")
        if at == -1:
            os._exit(9)

    moves, real = [], final.take_place

    def take_place(partial: Path, path: Path) -> None:
        if len(moves) == at:
            os._exit(9)
        moves.append(path)
        real(partial, path)

    monkeypatch.setattr(final, "take_place", take_place)
    child = os.fork()
    if child == 0:
        save_final_weights(folder, 8, newer)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def parts(folder: Path, text: str) -> None:
    """Weights of a folder and of a file."""
    (folder / "a").mkdir()
    (folder / "a/w").write_text(text)
    (folder / "b").write_text(text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("at", [-1, 1])
def test_a_kill_is_no_finished_run(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while writing: the run of before is whole. Killed between two renames: each file is whole, no run is."""
    save_final_weights(tmp_path, 4, lambda folder: parts(folder, "old"))
    killed_while_saving(tmp_path, at, monkeypatch)
    assert is_finished(tmp_path) == (at == -1)
    found = [(tmp_path / name).read_text() for name in ("a/w", "b")]
    assert found == (["old", "old"] if at == -1 else ["new", "old"])
    remove_partial(tmp_path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_torn_final_weights_are_not_taken_for_a_finished_run(
    method: str, make_config: MakeConfig, tiny_sd: Path
) -> None:
    config = make_config(tiny_sd, {"tuning.method": method, "training.max_train_steps": 1})
    run_training(config)
    out = Path(config.output_dir)
    assert is_finished(out)
    assert find_tuned(out).kind == ("lora" if method == "lora" else "unet")
    name = "pytorch_lora_weights.safetensors" if method == "lora" else "unet/diffusion_pytorch_model.safetensors"
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit of one weight
    for path in (out, out / name if method == "lora" else out / "unet"):
        with pytest.raises(ModelError, match=rf"not as the run wrote them: {name} has another.*Copy them"):
            find_tuned(path)
    os.truncate(out / name, 1000)
    assert not is_finished(out)
    again = {"tuning.method": method, "training.resume_from_checkpoint": "latest"}
    with pytest.raises(CheckpointError, match=rf"may be incomplete \({name} has 1000 bytes of .*overwrite_output"):
        run_training(make_config(tiny_sd, again))
    shutil.rmtree(out)
