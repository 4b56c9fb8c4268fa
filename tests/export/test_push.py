"""Pushing with huggingface_hub's client to a stand-in of the Hub: what arrives, what stays here, what is printed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import save_file

from diffalign.cli.main import main
from diffalign.config.schema import Config, load_config, save_config
from diffalign.export.push import _cut, push_files
from tests.cli.test_main import fails
from tests.export.hub import TOKEN, Hub, hub
from tests.models.adapters.test_merge import write_full, write_lora

REPO = "alice/sdxl-dpo"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in as the client's endpoint, with a token in the environment."""
    constants = huggingface_hub.constants
    with hub() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by LFS, which is plain HTTP
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state


@pytest.fixture
def lora(models, make_config: Callable[..., Config], tmp_path: Path) -> Path:
    """A run as it leaves its folder: weights, settings with absolute paths, and much that is nobody else's."""
    run = Path(write_lora(models["sd"], tmp_path / "dpo", seed=1, rank=4, alpha=4))
    settings = {
        "data.cache_dir": f"{tmp_path}/my cache",
        "validation.prompts": ["a photo /of\\ a ~tilde and/or ../dots"],
    }
    save_config(make_config(models["sd"].folder, settings), run / "config.yaml")
    for name in (
        "run.json",
        "metrics.jsonl",
        ".diffalign.lock",
        "checkpoint-2/training_state.pt",
        "logs/events",
        "x.ckpt",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    return run


def test_a_push_is_a_dry_run_until_it_is_confirmed(
    server: Hub, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    main(["push", str(lora), REPO])
    shown = capsys.readouterr().out
    assert server.requests == []
    assert "Nothing was pushed. alice/sdxl-dpo would be a private repository" in shown
    assert f"diffalign push {lora} {REPO} --yes" in shown.replace(" \\\n        ", " ")
    assert "states no licence" in shown
    main(["push", str(lora), REPO, "--yes"])
    printed = capsys.readouterr()
    repo = server.repos[REPO]
    names = ["README.md", "config.yaml", "pytorch_lora_weights.safetensors"]
    assert repo["private"] is True
    assert sorted(repo["files"]) == sorted(names)
    assert all(name in shown for name in names)
    assert repo["files"][names[2]] == (lora / names[2]).read_bytes()
    assert any(request.startswith("PUT /lfs/") for request in server.requests)
    card = repo["files"]["README.md"].decode()
    assert f'here = "{REPO}"' in card
    assert 'here = "dpo"' in (lora / "README.md").read_text()
    assert f"{server.url}/{REPO}: pushed" in printed.out
    assert TOKEN not in printed.out + printed.err + shown + caplog.text
    before = len(server.requests)
    main(["push", str(lora), REPO, "--yes"])  # once more: into the repository that is there
    assert not [request for request in server.requests[before:] if "repos/create" in request]


def test_settings_are_pushed_without_the_folders_of_this_machine(lora: Path, tmp_path: Path) -> None:
    content = {file.name: file for file in push_files(lora, REPO)}["config.yaml"]
    assert set(content.changed) == {"output_dir", "model.pretrained_model_name_or_path", "data.path", "data.cache_dir"}
    tree, own = yaml.safe_load(content.content), yaml.safe_load((lora / "config.yaml").read_text())
    assert (tree["output_dir"], tree["data"]["cache_dir"]) == ("out", "my cache")
    assert tree["validation"] == own["validation"]
    assert tree["training"] == own["training"]
    assert str(tmp_path) not in content.content.decode()
    (lora / "pushed.yaml").write_bytes(content.content)
    assert load_config(lora / "pushed.yaml").objective == load_config(lora / "config.yaml").objective


@pytest.mark.parametrize(
    ("text", "pushed"),
    [
        ("C:\\Users\\alice\\my pairs.parquet", "my pairs.parquet"),
        ("\\\\server\\alice\\pairs", "pairs"),
        ("clip=D:/alice/clip", "clip=clip"),
        ("file:///home/alice/pairs", "pairs"),
        ("~5 cats in a room", "~5 cats in a room"),  # no user is called so
        ("/r/art, a cat", "/r/art, a cat"),
    ],
)
def test_places_of_other_machines_are_cut_and_prompts_are_not(text: str, pushed: str) -> None:
    changed: list[str] = []
    assert _cut({"key": text}, "", changed) == {"key": pushed}
    assert changed == ["key"] * (text != pushed)


def test_a_full_unet_is_pushed_as_a_folder_without_the_bases_place(models, server: Hub, tmp_path: Path) -> None:
    run = Path(write_full(models["sd"], tmp_path / "full", 1))
    config = run / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "/data/bob/models/sd/unet"}))
    (run / "unet/leftover.bin").write_text("")
    main(["push", str(run), REPO, "--yes", "--public", "--base", str(models["sd"].folder)])
    repo = server.repos[REPO]
    assert repo["private"] is False
    assert sorted(repo["files"]) == ["README.md", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    pushed = json.loads(repo["files"]["unet/config.json"])
    assert pushed == json.loads(config.read_text()) | {"_name_or_path": "unet"}


def test_what_must_not_be_pushed_is_refused(
    server: Hub, lora: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    push = ["push", str(lora), REPO, "--yes"]
    assert "is not a repository of the Hub" in fails(capsys, "push", str(lora), "sdxl-dpo")
    server.repos[REPO] = {"private": False, "files": {}}
    assert "exists and is public: give --public" in fails(capsys, *push)
    server.repos[REPO]["private"] = True
    server.refusal = 403, f"the token {TOKEN} may not write"  # a server that repeats it
    message = fails(capsys, *push)
    assert "the Hub did not take alice/sdxl-dpo" in message
    assert TOKEN not in message
    assert server.repos[REPO]["files"] == {}
    card = lora / "README.md"
    written = card.read_text()
    card.write_text(f"{written}\nMade in {lora.absolute()} on a Sunday.\n")
    assert "names a folder of this machine: Made in" in fails(capsys, *push)
    card.write_text(written)
    weights = lora / "pytorch_lora_weights.safetensors"
    whole = weights.read_bytes()
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, weights, {"trained_in": "/data/alice/runs/dpo"})
    assert "metadata 'trained_in' name a place of this machine" in fails(capsys, *push)
    weights.write_bytes(whole)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fails(capsys, *push)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(lora / "none"))
    assert "no token of the Hugging Face Hub" in fails(capsys, *push)
