"""Released weights: the packaged list, how files are found, and our figures beside the published, on stand-ins."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from diffalign.cli.images.published import BASES
from diffalign.cli.main import main
from diffalign.data.prompt_sets.known import SETS
from diffalign.errors import DiffalignError
from diffalign.evaluation.published import beside
from diffalign.evaluation.published.catalogue import (
    MEASURED_BY,
    Catalogue,
    PublishedBase,
    PublishedTable,
    Release,
    catalogue,
)
from diffalign.evaluation.published.page import LAYOUTS, list_page
from diffalign.evaluation.published.weights import release_path
from tests.cli.test_main import fails

ROOT = Path(__file__).parent.parent.parent
KNOWN = catalogue()


def test_the_page_is_the_packaged_list() -> None:
    text = (ROOT / "docs/published.md").read_text(encoding="utf-8")
    assert list_page(KNOWN) in text, "write it anew: diffalign published --list"


def test_the_list_is_whole() -> None:
    assert tuple(KNOWN.bases) == BASES
    for table in KNOWN.tables:
        assert all(len(row) == len(table.metrics) for rows in table.figures.values() for row in rows.values())
    for each in KNOWN.weights:
        assert each.base in KNOWN.bases
        assert each.layout in LAYOUTS
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", each.repository)
    assert len({(each.name, each.base) for each in KNOWN.weights}) == len(KNOWN.weights)
    assert {metric for table in KNOWN.tables for metric in table.metrics} >= set(MEASURED_BY)


def test_the_bands_are_those_of_the_tables() -> None:
    """DPO over its base by PickScore, of the tables that measured both: the released weights' own spread."""
    for base, (low, high) in KNOWN.band.gain.items():
        gains = []
        for table in KNOWN.tables:
            rows = table.figures.get(base, {})
            if {"base", "DPO"} <= rows.keys():
                gains.append(rows["DPO"][0] - rows["base"][0])
        assert len(gains) >= 3
        assert low - 0.005 <= min(gains)
        assert max(gains) <= high + 0.005


@pytest.fixture(scope="module")
def hub(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories of released weights in their layouts: tiny UNets that fit the tiny base, moved a little, and not."""
    import torch
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("hub")
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias.add_(0.2)
    unet.save_pretrained(folder / "org/dpo/unet")
    (folder / "org/dpo/unet/other.safetensors").write_bytes(b"\0")  # not the UNet's, so not fetched
    shutil.copytree(folder / "org/dpo/unet", folder / "org/root")
    for name in ("a", "b"):
        shutil.copytree(folder / "org/dpo/unet", folder / f"org/several/lpo_{name}_merge/unet")
    config = folder / "org/several/lpo_b_merge/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 999}))
    (folder / "org/lora").mkdir()
    (folder / "org/lora/x.safetensors").write_bytes(b"\0")
    return folder


@pytest.fixture
def known(hub: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    """A list of three releases for the tiny base, and one table; the command line uses it too."""
    dimension = json.loads((tiny_sd / "unet/config.json").read_text())["cross_attention_dim"]
    table = PublishedTable(
        "t", "Paper", "a page", "theirs", "500 prompts", "DDIM", ["PickScore", "CLIP"],
        {"sd15": {"base": [20.0, 1.0], "DPO": [20.5, 2.0], "Absent": [30.0, 3.0]}},
    )  # fmt: skip
    small = Catalogue(
        bases={"sd15": PublishedBase("SD1.5", str(tiny_sd), dimension), "sdxl": KNOWN.bases["sdxl"]},
        weights=[
            Release("DPO", "sd15", "org/dpo", "unet", "unet", "DPO"),
            Release("LPO", "sd15", "org/several", "unet", "lpo_*_merge/unet", "LPO"),
            Release("SDPO", "sd15", "org/pickled", "pickle", "unet.pth", "SDPO"),
        ],
        tables=[table],
        band=replace(KNOWN.band, gain={"sd15": [0.38, 0.45]}, base={"sd15": [20.0, 21.0]}),
        remarks=[],
    )
    fetched = hub.parent / "fetched"

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        """Only what the patterns name is there, as from the Hub."""
        for file in (hub / repository).rglob("*"):
            inside = file.relative_to(hub).as_posix()
            if file.is_file() and any(fnmatch(inside.removeprefix(f"{repository}/"), p) for p in allow_patterns):
                (fetched / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, fetched / inside)
        return str(fetched / repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("diffalign.evaluation.published.catalogue.catalogue", lambda: small)
    return small


@pytest.mark.parametrize(
    ("repository", "layout", "path", "found"),
    [
        ("org/dpo", "unet", "unet", "org/dpo/unet"),
        ("org/dpo", "unet", "*", "org/dpo/unet"),
        ("org/root", "unet", ".", "org/root"),
        ("org/several", "unet", "lpo_*_merge/unet", "org/several/lpo_a_merge/unet"),
        ("org/lora", "lora", "*.safetensors", "org/lora/x.safetensors"),
    ],
)
def test_a_release_is_found_in_its_layout(
    known: Catalogue, repository: str, layout: str, path: str, found: str
) -> None:
    place = release_path(Release("x", "sd15", repository, layout, path, ""), known.bases["sd15"])
    assert place.as_posix().endswith(f"fetched/{found}")
    assert place.is_file() or (place / "diffusion_pytorch_model.safetensors").is_file()
    assert not (place / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("release", "said"),
    [
        (Release("DPO", "sd15", "org/dpo", "unet", "nowhere", ""), "UNet for SD1.5 in nowhere and has none"),
        (Release("L", "sd15", "org/dpo", "lora", "*.safetensors", ""), "a file *.safetensors and has none"),
        (Release("S", "sd15", "org/p", "pickle", "unet.pth", ""), "give --tuned S=PATH"),
    ],
)
def test_a_release_that_is_not_as_listed_is_refused(known: Catalogue, release: Release, said: str) -> None:
    with pytest.raises(DiffalignError, match=re.escape(said)):
        release_path(release, known.bases["sd15"])


def test_a_release_that_cannot_be_fetched_names_the_command(capsys, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    words = ("--prompts", "world-heldout", "--scorer", "world")
    said = fails(capsys, "published", "sdxl", "--only", "SPO", *words)
    assert "hf download SPO-Diffusion-Models/SPO-SDXL_4k-p_10ep" in said
    assert "--tuned SPO=PATH; --only leaves" in said


def test_figures_stand_beside_the_published_ones(
    known: Catalogue, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours are those of `evaluate`, times the unit's factor; a gain is over the base of the same source."""
    monkeypatch.setitem(beside.MEASURED_BY, "PickScore", ("brightness", 2))
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    out = tmp_path / "out"
    own = tmp_path / "own"
    shutil.copytree(Path(known.bases["sd15"].model) / "unet", own / "unet")
    words = ["--scorer", "tests.sources.judges:Brightness", "--steps", "2", "--prompts", str(tmp_path / "prompts.txt")]
    main(["published", "sd15", "--tuned", f"mine={own}", *words, "--out", str(out)])
    said = capsys.readouterr().out
    assert "left out: SDPO (org/pickled), a pickle" in said
    result = json.loads((out / "result.json").read_text())
    scores = {model["name"]: model["scores"]["brightness"] for model in result["models"]}
    assert list(scores) == ["DPO", "LPO", "mine"]
    assert scores["mine"]["gain"]["value"] == 0  # the base's own weights
    lines = {(line["model"], line["source"]): line for line in json.loads((out / "published.json").read_text())}
    assert list(lines) == [
        ("base", "ours"), ("base", "Paper"), ("DPO", "ours"), ("DPO", "Paper"), ("LPO", "ours"), ("mine", "ours"),
    ]  # fmt: skip
    assert lines["base", "ours"]["mean"] == 2 * scores["DPO"]["base"]
    assert lines["DPO", "ours"]["gain"] == 2 * scores["DPO"]["gain"]["value"]
    assert lines["DPO", "ours"]["interval"] == [2 * scores["DPO"]["gain"][end] for end in ("low", "high")]
    assert lines["DPO", "Paper"]["gain"] == pytest.approx(0.5)
    assert lines["base", "Paper"]["gain"] is None
    assert lines["DPO", "Paper"]["protocol"] == "500 prompts; sampling DDIM; weights theirs"
    ours = "2 prompts of no named set, 1 seed; sampling ddim, 2 steps, guidance 5, float32"
    assert lines["DPO", "ours"]["protocol"] == ours
    for text in (said, (out / "published.md").read_text()):
        assert ours in text
        assert "gain of DPO" in text
        assert "outside the published 0.38 to 0.45" in text
        assert re.search(r"Paper +\|? *20.500 +\|? *\+0.500", text)


def test_the_verdict_depends_on_the_band() -> None:
    def line(model: str, gain: float | None, mean: float) -> beside.FigureLine:
        return beside.FigureLine("PickScore", model, beside.OURS, mean, gain, None, "")

    found = beside.verdicts([line("base", None, 20.55), line("DPO", 0.5, 21.05), line("SPO", 9, 9)], "sd15", KNOWN)
    assert [" is within " in text for text in found] == [True, False]


def test_the_plan_fetches_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    main(["published", "sdxl", "--dry-run", "--only", "DPO", "SPO", "--seeds", "0-3"])
    said = capsys.readouterr().out
    assert "mhdang/dpo-sdxl-text2image-v1" in said
    rows = SETS["pickapic-v1-validation"].rows
    assert f"3 models x {rows} prompts (pickapic-v1-validation) x 4 seed(s) = {3 * rows * 4} images" in said
    assert f"{3 * rows * 4 * 20 * 2} images through a UNet" in said
    main(["published", "sdxl", "--dry-run", "--only", "DPO", "--tuned", "mine=runs/mine"])
    assert "mine: runs/mine" in capsys.readouterr().out
    main(["published", "sd15", "--dry-run", "--prompts", "hpdv2:photo", "--limit", "10", "--guidance", "1"])
    assert "x 10 prompts (hpdv2:photo)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["published", "sd15", "--tuned", "mine=nowhere", "--scorer", "world", "--prompts", "a dog"], "nowhere"),
        (["published"], "name a base, sd15 or sdxl, or give --list"),
        (["published", "sd15", "--tuned", "a=x", "--tuned", "a=y"], "--tuned a=… is given twice"),
        (["published", "sd15", "--only", "MaPO"], "--only MaPO: no such release of SD1.5; known: DPO, KTO"),
    ],
)
def test_a_slip_is_named_before_anything_is_fetched(words: list[str], said: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert said in fails(capsys, *words)
