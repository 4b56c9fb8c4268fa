"""`diffalign convert` as it is typed: files, UNets and whole folders, from this machine and from the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.cli.main import main
from diffalign.models.adapters.save_load import find_tuned, load_tuned
from diffalign.models.loading.base import load_base
from diffalign.models.spec import ModelSpec
from tests.cli.test_main import fails
from tests.models.adapters.test_merge import write_full
from tests.models.conftest import Model
from tests.models.loading.test_base import same_weights, single_file_state
from tests.models.test_hub import StandIn, repositories, stand_in

__all__ = ["repositories", "stand_in"]
UNET = "unet/diffusion_pytorch_model.safetensors"


def convert(*words: object) -> None:
    main(["convert", *map(str, words)])


@pytest.fixture(scope="module")
def full(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_full(models["sd"], tmp_path_factory.mktemp("full") / "run", 1))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_unet_becomes_tuned_weights(
    models, full: Path, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state, base = load_file(full / UNET), models["sd"].folder
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "unet.pth")
    convert(tmp_path / "unet.pth", "--base", base, "--out", tmp_path / "theirs")
    assert f"{len(state)} tensors" in capsys.readouterr().out
    unet = models["sd"].unet()
    assert load_tuned(unet, tmp_path / "theirs").kind == "unet"
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    again = ["convert", str(tmp_path / "unet.pth"), "--base", str(base), "--out", str(tmp_path / "theirs")]
    assert "exists; name another place, or give --overwrite" in fails(capsys, *again)
    other = ["convert", str(tmp_path / "unet.pth"), "--base", str(models["sdxl"].folder), "--out", str(tmp_path / "x")]
    assert "is not the UNet of" in fails(capsys, *other)
    assert not (tmp_path / "x").exists()


def test_a_whole_checkpoint_becomes_a_base(models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = single_file_state(models["sd"].base)
    torch.save({"state_dict": state, "global_step": 7, "callbacks": {"a": 1}}, tmp_path / "model.ckpt")
    file = tmp_path / "model.safetensors"
    assert "is a pickled checkpoint, which" in fails(capsys, "generate", str(tmp_path / "model.ckpt"), *IMAGES)
    convert(tmp_path / "model.ckpt", "--out", file)
    assert "left out: global_step (int)\nleft out: callbacks (dict)\n" in capsys.readouterr().out
    base = load_base(ModelSpec(str(file), single_file_config=str(models["sd"].folder)))
    assert same_weights(base.unet, models["sd"].base.unet)
    assert "does not end in .safetensors" in fails(capsys, "convert", str(file), "--out", str(tmp_path / "x.bin"))


IMAGES = ["--prompts", "a red circle", "--out", "/nowhere"]


def test_a_folder_is_copied_with_its_weights_as_safetensors(
    models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """UNet in two shards, VAE as a variant, a text encoder under transformers' own name, and what is no weight."""
    source, out = Path(shutil.copytree(models["sdxl"].folder, tmp_path / "old")), tmp_path / "new"
    unet = load_file(source / UNET)
    (source / UNET).unlink()
    names, index = list(unet), {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: unet[name] for name in part}, source / "unet" / shard)
        index |= dict.fromkeys(part, shard)
    (source / "unet/diffusion_pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    for folder, old, new in (
        ("vae", "diffusion_pytorch_model", "diffusion_pytorch_model.fp16"),
        ("text_encoder", "model", "pytorch_model"),
    ):
        file = source / folder / f"{old}.safetensors"
        torch.save(load_file(file), source / folder / f"{new}.bin")
        file.unlink()
    torch.save(load_file(source / "text_encoder_2/model.safetensors"), source / "text_encoder_2/pytorch_model.bin")
    torch.save([1], source / "training_args.bin")
    with pytest.raises(ValueError, match=r"only pickled weights.*diffalign convert FOLDER --out NEW_FOLDER"):
        load_base(str(source))
    convert(source, "--out", out)
    said = capsys.readouterr().out
    assert "left out: text_encoder_2/pytorch_model.bin (as safetensors already)" in said
    assert "left out: training_args.bin (not weights by its name)" in said
    assert not list(out.rglob("*.bin"))
    base = load_base(str(out))
    assert same_weights(base.unet, models["sdxl"].base.unet)
    for ours, theirs in zip(
        (base.vae, *base.text.models), (models["sdxl"].base.vae, *models["sdxl"].base.text.models), strict=True
    ):
        assert same_weights(ours, theirs)
    assert "no weights to convert" in fails(capsys, "convert", str(out), "--out", str(tmp_path / "again"))
    assert "--base and --key are for one file" in fails(capsys, "convert", str(source), "--out", "x", "--key", "a")


def test_a_pickle_on_the_hub_is_fetched_by_this_command_alone(
    stand_in: StandIn, models, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stand_in.folder / "org/theirs").mkdir()
    torch.save(load_file(full / UNET), stand_in.folder / "org/theirs/unet.pth")
    save_file({"a": torch.ones(1)}, stand_in.folder / "org/theirs/other.safetensors")
    with pytest.raises(ValueError, match="diffalign convert"):
        find_tuned("org/theirs::unet.pth")
    assert stand_in.fetched("org/theirs") == []
    convert("org/theirs::unet.pth", "--base", models["sd"].folder, "--out", tmp_path / "run")
    assert stand_in.fetched("org/theirs") == ["unet.pth"]
    assert find_tuned(tmp_path / "run").kind == "unet"
    missing = ["convert", "org/theirs::vae.pth", "--out", str(tmp_path / "x.safetensors")]
    assert "has no vae.pth; its files of weights are other.safetensors, unet.pth" in fails(capsys, *missing)
