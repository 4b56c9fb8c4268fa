"""Every command of docs/models.md and docs/data.md runs, in the order of the page, on stand-ins.

A tiny base stands for BASE and for SDXL of the Hub, two steps on noise images for a run, brightness for PickScore. What
the commands write is what the next ones read.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from diffalign.cli.main import main
from diffalign.config.schema import save_config
from diffalign.data.table.open import open_pairs
from diffalign.export.kohya import export_kohya
from diffalign.models import hub
from diffalign.models.adapters.lora import LORA_FILE
from diffalign.rewards.table import SCORERS
from tests.models.adapters.test_merge import write_full, write_lora
from tests.models.conftest import make_model
from tests.models.loading.test_base import single_file_state
from tests.models.test_hub import StandIn
from tests.test_docs_commands import ROOT, commands, filled

SMALLER = {
    "train": ["training.max_train_steps=1", "model.single_file_config=base"],
    "generate": ["--seeds", "0", "--steps", "1", "--device", "cpu"],
    "evaluate": ["--seeds", "0", "--steps", "1", "--device", "cpu"],
    "encode": ["data.cache_dir=cache"],
}


def lines(page: str) -> list[list[str]]:
    return [filled(line)[1:] for line in commands(ROOT / page) if line.startswith("diffalign")]


def run(words: list[str], number: int) -> None:
    """One command with the page's names replaced by those of the folder."""
    if words[0] in ("train", "encode"):
        words = [words[0], "my.yaml", f"output_dir=runs/trained-{number}", *words[2:]]
    names = {"BASE": "base", "OUT": f"merged-{number}", "PATH": "my/pairs", "PAIRS": "my/pairs"}
    remote = f"file://{Path.cwd()}/remote"
    words = [names.get(word, re.sub(r"(hf|s3)://.*", remote, word)) for word in words]
    if words[0] == "evaluate":
        words = [f"{word}-{number}" if words[i - 1] == "--out" else word for i, word in enumerate(words)]
    elif words[0] == "generate":
        words = [f"images-{number}" if words[i - 1] == "--out" else word for i, word in enumerate(words)]
    main([*words, *SMALLER.get(words[0], [])])


@pytest.fixture
def here(tiny_sd: Path, pair_folder: Path, make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base, pairs and prompts, in which the pages' names exist."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_sd, "base")
    shutil.copytree(pair_folder, "my/pairs")
    for file in list(
        Path("my/pairs").rglob("0*")
    ):  # twice as many, and a prompt for each, so that a tenth can be held out
        shutil.copyfile(file, file.with_stem(f"1{file.stem}"))
    for number, caption in enumerate(Path("my/pairs").glob("*.txt")):
        caption.write_text(f"a circle {number}")
    Path("prompts.txt").write_text("a red circle\n")
    save_config(make_config(Path("base"), {"data.path": "my/pairs", "output_dir": "runs/first"}), Path("my.yaml"))
    monkeypatch.setitem(SCORERS, "pickscore", replace(SCORERS["pickscore"], target="tests.sources.judges:Brightness"))
    return tmp_path


def test_every_command_of_the_page_of_models(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(here / "base")
    for number, name in enumerate(("runs/mine", "runs/a", "runs/b", "runs/a/checkpoint-100")):
        Path(name).parent.mkdir(exist_ok=True)
        write_lora(model, Path(name), seed=number, rank=2, alpha=2)
    for name in ("style", "detail"):
        export_kohya("runs/a", Path(f"{name}.safetensors"), base="base")
    torch.save({"state_dict": single_file_state(model.base)}, "model.ckpt")
    shutil.copytree("base", "old_pipeline")
    weights = Path("old_pipeline/unet/diffusion_pytorch_model.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    full = Path(write_full(model, Path("full"), 1)) / "unet"
    shutil.copytree("base", "hub/stabilityai/stable-diffusion-xl-base-1.0")
    shutil.copytree(full, "hub/mhdang/dpo-sdxl-text2image-v1/unet")
    shutil.copytree(full, "hub/mapo-t2i/mapo-beta")
    Path("hub/OWNER/NAME").mkdir(parents=True)
    shutil.copyfile(f"runs/a/{LORA_FILE}", f"hub/OWNER/NAME/{LORA_FILE}")
    torch.save(model.unet().state_dict(), "hub/OWNER/NAME/unet.pth")
    stand_in = StandIn(here / "hub", here / "cache-of-the-hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in.snapshot_download)
    hub._fetched.cache_clear()

    found = lines("docs/models.md")
    assert {words[0] for words in found} == {"convert", "train", "generate", "merge", "export", "evaluate"}
    for number, words in enumerate(found):
        run(words, number)
    assert len(list(here.glob("images-*/*.png"))) == sum(words[0] == "generate" for words in found)
    assert len(list(here.glob("runs/trained-*/run.html"))) == sum(words[0] == "train" for words in found)
    assert all(
        Path(name).exists() for name in ("model.safetensors", "runs/theirs/unet", "new_pipeline", "start.safetensors")
    )


def test_every_command_of_the_page_of_data(here: Path) -> None:
    main(["train", "my.yaml", "training.max_train_steps=1", "output_dir=runs/dpo"])
    table = open_pairs("my/pairs")
    Path("decisions.csv").write_text(f"id,decision\n{table.ids[0]},swap\n{table.ids[1]},drop\n")
    main(["data", "convert", "my/pairs", "--out", "remote/pairs.parquet"])
    found = lines("docs/data.md")
    assert len(found) >= 6
    for number, words in enumerate(found):
        run(words, number)
    assert len(open_pairs("corrected.parquet")) == len(table) - 1
    assert all(Path(name).is_file() for name in ("sheet.png", "scores.jsonl", "surest.parquet", "cache/manifest.json"))
