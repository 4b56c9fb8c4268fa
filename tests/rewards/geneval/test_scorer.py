"""GenEval with a detector: a real one's code path on random weights, and its reports with one that reads brightness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from diffalign.cli.main import main
from diffalign.rewards import ScorerError, load_scorer
from diffalign.rewards.geneval.prompts import COLOURS
from diffalign.rewards.geneval.rules import Detection
from diffalign.rewards.geneval.scorer import GenEval

LABELS = {0: "N/A", 1: "mouse", 2: "sofa", 3: "dog"}  # as COCO and RT-DETR write them


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLOS of random weights, as it lies on the Hub."""
    from transformers import YolosConfig, YolosForObjectDetection

    folder = tmp_path_factory.mktemp("detector")
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=6,
        id2label=LABELS,
        label2id={name: label for label, name in LABELS.items()},
    )
    torch.manual_seed(0)
    YolosForObjectDetection(config).save_pretrained(folder)
    processor = {"image_processor_type": "YolosImageProcessor", "size": {"shortest_edge": 32, "longest_edge": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_boxes_are_those_of_transformers(detector: Path) -> None:
    """The most confident class of each query, in pixels of the image; the class N/A is left out."""
    scorer = GenEval(str(detector))
    scorer.model.class_labels_classifier.layers[-1].bias.data = torch.tensor([-9.0, 2.0, 1.5, -9.0, -9.0])
    image = Image.effect_noise((48, 64), 80).convert("RGB")
    found = scorer.detect([image, image])
    assert found[0] == pytest.approx(found[1])
    inputs = scorer.processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        out = scorer.model(**inputs)
    chances, labels = out.logits[0].softmax(-1)[:, :-1].max(-1)
    wanted = [
        (scorer.labels[int(label)], float(chance), box)
        for label, chance, box in zip(labels, chances, out.pred_boxes[0], strict=True)
        if chance > 0.3 and int(label) in scorer.labels
    ]
    assert wanted
    assert len(found[0]) == len(wanted)
    for one, (name, chance, (x, y, w, h)) in zip(found[0], wanted, strict=True):
        assert one.name == name
        assert one.confidence == pytest.approx(chance, abs=1e-5)
        edges = [48 * (x - w / 2), 64 * (y - h / 2), 48 * (x + w / 2), 64 * (y + h / 2)]
        assert one.box == pytest.approx([float(edge) for edge in edges], abs=1e-3)


def test_labels_of_detectors_are_matched(detector: Path) -> None:
    scorer = load_scorer(f"geneval={detector}")
    assert scorer.labels == {1: "computer mouse", 2: "couch", 3: "dog"}
    scorer.check_prompts(["a photo of a computer mouse", "a photo of two couchs"])
    with pytest.raises(ScorerError, match="has no class 'cat', which 'a photo of a cat and a dog' needs"):
        scorer.check_prompts(["a photo of a cat and a dog"])
    with pytest.raises(ScorerError, match="not of GenEval's form"):
        scorer.check_prompts(["a lighthouse"])


def test_what_is_no_detector_is_refused(detector: Path, clip_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match="geneval=facebook/detr-resnet-50"):
        load_scorer("geneval")
    with pytest.raises(ScorerError, match="hf download no/such"):
        load_scorer("geneval=no/such")
    with pytest.raises(ScorerError):
        load_scorer(f"geneval={clip_dir}")
    for file in detector.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {key: f"LABEL_{key}" for key in config["id2label"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"label2id": {}}))
    with pytest.raises(ScorerError, match="none of COCO's classes"):
        load_scorer(f"geneval={tmp_path}")


def test_the_colour_is_clips_nearest(detector: Path, clip_dir: Path) -> None:
    """By CLIPModel's own embeddings: three ways to say each colour, averaged; the image is the box alone."""
    scorer = GenEval(f"{detector},{clip_dir}")
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    ImageDraw.Draw(image).rectangle((5, 5, 20, 20), fill="red")
    seen = scorer.clip.embed_images([image.crop((5, 5, 21, 21))])[0]
    near = []
    for colour in COLOURS:
        ways = [f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog", f"a photo of a {colour} object"]
        mean = torch.stack([scorer.clip.embed_prompts([way])[0] for way in ways]).mean(0)
        near.append(float(torch.cosine_similarity(mean, seen, dim=0)))
    assert scorer.colour(image, (5.2, 4.8, 20.9, 21.4), "dog") == COLOURS[near.index(max(near))]
    assert scorer.colour(image, (39.9, 39.9, 60, 60), "dog") in COLOURS  # a box at the edge is one pixel, not none
    missing = GenEval(f"{detector},{detector}/no")
    missing.check_prompts(["a photo of a dog"])
    with pytest.raises(ScorerError, match="hf download"):  # before any image is made
        missing.check_prompts(["a photo of a red dog"])


class Painted(GenEval):
    """Finds one dog where an image is bright, and two where it is brighter."""

    def __init__(self) -> None:
        self.labels, self.detector_path = {0: "dog"}, "painted"

    def detect(self, images):
        return [
            [Detection("dog", 0.95, (i, 0, i + 4, 4)) for i in range(image.getpixel((0, 0))[0] // 100)]
            for image in images
        ]


def test_skills_are_counted_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One image of two is right, and both; none and one of the counting ones."""
    from tests.cli.test_images import paint

    one, two = "a photo of a dog", "a photo of two dogs"
    base, better = (
        paint(tmp_path / name, dict(zip((one, two), levels, strict=True)))
        for name, levels in (("base", ([0, 150], [150, 0])), ("better", ([150, 150], [250, 150])))
    )
    judge = f"{__name__}:Painted"
    main(["compare", str(base), f"dpo={better}", "--scorer", judge, "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()
        for line in table.splitlines()
        if line and line.split()[0] in ("single_object", "counting", "mean")
    }
    assert rows["single_object"][1:5] == ["1", "0.500", "1.000", "(+0.500"]
    assert rows["counting"][1:5] == ["1", "0.000", "0.500", "(+0.500"]
    assert "0.250  0.750 (+0.500)" in next(x for x in table.splitlines() if x.startswith("mean of groups"))
    found = json.loads((tmp_path / "out/result.json").read_text())["models"][0]["groups"]["geneval"]
    assert (found["counting"]["base"], found["counting"]["tuned"], found["counting"]["pictures"]) == (0.0, 0.5, 2)
    main(["score", str(better), "--scorer", judge])
    said = capsys.readouterr().out
    assert "single_object  1.0000 of 2 images" in said
    assert "counting       0.5000 of 2 images" in said
    assert "mean of groups 0.7500" in said
