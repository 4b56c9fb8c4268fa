"""Model cards: what they say, that their lines run, and that nothing in data or on the machine gets through."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from diffalign.cli.main import main
from diffalign.config.schema import Config, load_config, save_config
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.sampling import Sampling
from diffalign.export.card.facts import INPUTS, inputs_record
from diffalign.export.card.text import bibtex, code, fenced, md, table
from diffalign.export.card.write import CARD, STRIP, is_ours, write_run_card
from diffalign.export.kohya import export_kohya
from diffalign.export.names import ExportError
from diffalign.models.adapters.save_load import load_pipeline
from diffalign.objectives import OBJECTIVES
from diffalign.sources import SOURCES
from diffalign.training.run import write_card
from tests.cli.test_main import fails
from tests.models.adapters.test_merge import write_full, write_lora

PROMPTS = ["a red circle", 'a "blue" square | *or* <b>none</b>']


GITHUB = MarkdownIt("commonmark").enable(["table", "strikethrough"])


class Brightness:
    name = "brightness"

    def score(self, images, prompts):
        return torch.tensor([np.asarray(image.convert("L"), float).mean() / 255 for image in images])


def python_of(card: Path) -> str:
    return re.search(r"```python\n(.*?)\n```", card.read_text(), re.DOTALL)[1]


def executed(card: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> np.ndarray:
    """The image that the card's own lines write, in the folder that they are for."""
    monkeypatch.chdir(folder)
    loading, image, call = python_of(card).partition("image = ")
    exec(loading, names := {})
    torch.manual_seed(0)  # loading draws random numbers too
    exec(image + call, names)
    return np.asarray(Image.open("image.png"), dtype=float)


def expected(base: Path, tuned: str, prompt: str) -> np.ndarray:
    pipeline = load_pipeline(str(base), tuned=tuned)
    torch.manual_seed(0)
    return np.asarray(pipeline(prompt, num_inference_steps=25, guidance_scale=5.0).images[0], dtype=float)


@pytest.fixture
def lora(models, make_config: Callable[..., Config], tmp_path: Path) -> Path:
    """A run of LoRA with its settings, as it leaves them."""
    run = Path(write_lora(models["sd"], tmp_path / "run", seed=1, rank=4, alpha=4))
    save_config(make_config(models["sd"].folder), run / "config.yaml")
    return run


def test_a_runs_card_loads_it_and_the_card_of_its_export_too(
    models, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = models["sd"].folder
    (tmp_path / base.name).symlink_to(base)
    card = write_run_card(lora)
    prompt = json.loads(re.search(r"pipeline\((\".*?\"),", python_of(card))[1])
    wanted = expected(base, str(lora), prompt)
    found = executed(card, monkeypatch, tmp_path)
    assert np.abs(found - wanted).max() <= 1  # of 255
    assert np.abs(wanted - expected(base, None, prompt)).max() > 5
    export_kohya(lora, tmp_path / "mine.safetensors")
    assert np.abs(executed(tmp_path / "mine.md", monkeypatch, tmp_path) - wanted).max() <= 1
    assert "copy `mine.safetensors` to `models/loras`" in (tmp_path / "mine.md").read_text()


def test_a_full_tunes_card_loads_it(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = models["sdxl"].folder
    run = write_full(models["sdxl"], tmp_path / "full", 1)
    (tmp_path / base.name).symlink_to(base)
    card = write_run_card(run, base=str(base))
    wanted = expected(base, run, "a photo of a red fox in the snow")
    assert np.abs(executed(card, monkeypatch, tmp_path) - wanted).max() <= 1


def test_the_hubs_fields(models, lora: Path, make_config: Callable[..., Config]) -> None:
    settings = {"model.revision": "fp", "model.prediction_type": "v_prediction", "data.split": "validation_unique"}
    save_config(
        make_config(Path("org/base"), settings | {"data.path": "yuvalkirstain/pickapic_v2"}), lora / "config.yaml"
    )
    rows = {"pairs": "51413", "ids": "abc"}
    inputs = inputs_record("org/base", "sd", "yuvalkirstain/pickapic_v2", rows)
    (lora / "run.json").write_text(json.dumps({INPUTS: inputs, "processes": 3, "versions": {"torch": "2"}}))
    write_run_card(lora, license="openrail++")
    card = ModelCard.load(lora / CARD)
    data = card.data.to_dict()
    assert {key: data[key] for key in ("base_model", "base_model_relation", "datasets", "library_name", "license")} == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "datasets": "yuvalkirstain/pickapic_v2",
        "library_name": "diffusers",
        "license": "openrail++",
    }
    assert {"text-to-image", "diffusers", "lora", "dpo"} <= set(data["tags"])
    assert "validation\\_unique" in card.text or "`validation_unique`, 51,413 pairs" in card.text
    assert "| steps | 4 of 6 pairs |" in card.text
    assert 'DiffusionPipeline.from_pretrained("org/base", revision="fp")' in card.text
    assert 'prediction_type="v_prediction"' in card.text
    assert "eprint = {2311.12908}" in card.text
    with pytest.raises(ExportError, match="licence 'my own': give an identifier"):
        write_run_card(lora, license="my own")
    (lora / "run.json").unlink()
    write_run_card(lora)  # the licence stays as it was stated
    assert ModelCard.load(lora / CARD).data.license == "openrail++"
    ends = "finetune", None
    found = ModelCard.load(write_run_card(write_full(models["sd"], lora.parent / "full", 1), base="org/base")).data
    assert (found.to_dict()["base_model_relation"], found.license) == ends


def test_an_evaluation_of_these_weights_is_on_the_card(
    models, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(models["sd"].folder)
    other = write_lora(models["sd"], tmp_path / "other", seed=2, rank=4, alpha=4)
    sampling = Sampling(num_inference_steps=2, batch_size=4)
    folder = lora / "evaluation"
    result = evaluate(
        base,
        {"ours": lora},
        PROMPTS,
        [0],
        scorers=[Brightness()],
        out_dir=folder,
        sampling=sampling,
    )
    card = write_run_card(lora)  # found by itself
    text, gain = card.read_text(), result.models[0].scores["brightness"].gain
    assert f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" in text
    assert "2 prompts with 1 seeds" in text
    strip = Image.open(lora / STRIP)
    assert strip.size == (56 + 2 * (128 + 8), 2 * 128 + 8)  # two prompts, 64 pixels enlarged twice
    before = Image.open(next((folder / "images").glob("base-*/*.png"))).convert("RGB").resize((128, 128), 0)
    shown = np.asarray(strip.convert("RGB").crop((56, 0, 56 + 128, 128)), dtype=float)
    assert np.abs(shown - np.asarray(before, dtype=float)).mean() < 12  # JPEG of noise
    page = GITHUB.render(text.split("\n---\n", 1)[1])
    listed = re.findall(r"<li>(.*?)</li>", page)
    assert [html.unescape(one) for one in listed] == PROMPTS
    assert "<b>" not in page
    # it is found in the working folder too, the newest where there are several, and never left out in silence
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(folder, "judged")  # result.json keeps its time
    os.utime("judged/result.json", (2e9, 2e9))
    main(["card", str(lora)])
    said = capsys.readouterr().out
    assert f"with the evaluation in {tmp_path}/here/judged; --evaluation DIR takes another: {folder}" in said
    main(["export", str(lora), "--to", "kohya", "--out", "mine lora.safetensors"])
    assert "no evaluation" not in capsys.readouterr().out
    assert "](mine%20lora_before_after.jpg)" in Path("mine lora.md").read_text()
    assert Image.open("mine lora_before_after.jpg").size == strip.size
    main(["card", other, "--base", base])
    said = capsys.readouterr().out
    assert (
        f"without an evaluation: no folder of one that measured these weights is in\n    {other}\n    {tmp_path}"
        in said
    )
    command = f"evaluate {base} --tuned tuned={other} --prompts prompts.txt --seeds 0-3 --scorer pickscore"
    assert command in " ".join(said.replace("\\\n", "").split())
    main(["export", other, "--base", base, "--to", "kohya", "--out", "other.safetensors"])
    assert f"the card has no evaluation: `diffalign card {other}`" in capsys.readouterr().out
    with pytest.raises(ExportError, match=r"measured other weights \(ours\)"):
        write_run_card(other, base=base, evaluation=folder)
    with pytest.raises(ExportError, match=r"has no result\.json"):
        write_run_card(lora, evaluation=tmp_path)
    (folder / "result.json").write_text('{"models": 3}')
    with pytest.raises(ExportError, match="is not the result of"):
        write_run_card(lora, evaluation=folder)


def test_no_card_says_whose_machine_it_was(lora: Path, tmp_path: Path) -> None:
    main(["card", str(lora)])
    text = (lora / CARD).read_text()
    assert not [part for part in tmp_path.parts[1:] if part in text.replace("diffalign", "")]
    assert "/tmp" not in text
    assert "TODO: not stated" in text


def test_an_edited_card_is_never_replaced(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = write_run_card(lora)
    assert is_ours(card)
    write_run_card(lora)
    card.write_text(card.read_text().replace("tuned on preferences", "tuned by me"))
    assert "was edited since" in fails(capsys, "card", str(lora))
    assert "tuned by me" in card.read_text()
    main(["card", str(lora), "--overwrite"])
    assert "tuned by me" not in card.read_text()
    out = lora / "mine.safetensors"
    out.with_suffix(".md").write_text("# my notes")
    assert "was edited since" in fails(capsys, "export", str(lora), "--to", "kohya", "--out", str(out))
    assert not out.exists()


HOSTILE = [
    "*a* _b_ **c**",
    "<script>alert(1)</script>",
    "`x` ``y``",
    "a | b",
    "[l](javascript:x) ![i](y)",
    "# h",
    "- item",
    "1. one",
    "+ plus",
    "\\back",
    "a\n\nb",
    "$x$ &amp; ~~s~~",
    "~",
    "=",
    "```",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    line = " ".join(text.split())

    def shown(source: str) -> str:
        page = GITHUB.render(source)
        assert not re.search(r"<(?!/?(p|code|li|ol|pre|table|tr|td|th|thead|tbody)\b)", page), page
        return html.unescape(re.sub(r"<[^>]+>", "", page)).strip()

    assert shown(md(text)) == shown(f"1. {md(text)}") == shown(code(text)) == line
    assert shown(table([["h", "h"], [md(text), code(text)]])).split("\n")[-2:] == [line, line]
    assert shown(fenced([text, "end"], "python")) == f"{text}\nend"


def test_every_method_is_cited() -> None:
    elsewhere = {OBJECTIVES[name].paper for name in ("cdpo", "dspo")}  # a note on a web page, and OpenReview
    papers = {str(cls.paper) for cls in [*OBJECTIVES.values(), *SOURCES.values()]}
    assert {paper for paper in papers if bibtex(paper) is None} == elsewhere
    for paper in papers - elsewhere:
        entry = bibtex(paper)
        assert re.search(r"arXiv (\d{4}\.\d{5})", paper)[1] in entry
        assert entry.count("{") == entry.count("}")
    entry = bibtex("Wallace et al., Diffusion Model Alignment Using DPO, arXiv 2311.12908").splitlines()
    assert entry[0] == "@article{wallace2023diffusion,"
    assert entry[1:3] == ["  title = {{Diffusion Model Alignment Using DPO}},", "  author = {Wallace and others},"]


def test_what_stops_a_card_does_not_stop_the_run(
    lora: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffalign.export.card.write.write_run_card", full)
    write_card(load_config(lora / "config.yaml"))
    assert "no model card was written: OSError: [Errno 28]" in caplog.text
