from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.evaluation.compare import compare
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.manifest import MANIFEST, GeneratedImage
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scoring import Scoring, score_folder
from diffalign.models.loading.family import ModelError
from diffalign.rewards import ScorerError

PROMPTS, SEEDS = ["a red circle", "a blue square", "a small photo"], [0, 1]


class Brightness:
    name = "brightness"

    def score(self, images, prompts):
        return torch.tensor([np.asarray(image.convert("L"), float).mean() / 255 for image in images])


class Redness:
    name = "redness"
    tie = 0.3

    def score(self, images, prompts):
        return torch.tensor([np.asarray(image, float)[..., 0].mean() / 255 for image in images])


def paint(folder, levels):
    """Images of given grey levels, [prompt][seed]."""
    folder.mkdir()
    pictures = []
    for p, prompt in enumerate(PROMPTS):
        for seed in SEEDS:
            file = folder / f"{p}_{seed}.png"
            Image.new("RGB", (16, 16), (levels[p][seed],) * 3).save(file)
            pictures.append(GeneratedImage(prompt, seed, file))
    return pictures


@pytest.fixture
def painted(tmp_path):
    base = paint(tmp_path / "base", [[51, 102], [0, 51], [102, 153]])
    better = paint(tmp_path / "better", [[102, 153], [51, 51], [153, 102]])
    return base, better


def test_compare_by_hand(painted):
    """Grey levels are fifths: gains +.2 +.2 | +.2 0 | +.2 -.2; distances between seeds .2 .2 .2 and .2 0 .2."""
    base, better = painted
    result, rows = compare(base, {"better": [better]}, Scoring([Brightness(), Redness()], Brightness()))
    model = result.models[0]
    score = model.scores["brightness"]
    assert score.gain.value == pytest.approx(0.1)
    assert (score.wins, score.ties, score.losses) == (4, 1, 1)
    assert model.scores["redness"].ties == 6  # by its own threshold, .3
    assert model.diversity.value == pytest.approx(2 / 3)
    assert model.faithfulness.gain.value == pytest.approx(0.1)
    assert result.base_look.brightness == pytest.approx(0.3, abs=1e-6)
    assert len(rows) == 12
    assert rows[0] == {
        "model": "base",
        "run": 0,
        "prompt": "a red circle",
        "seed": 0,
        "brightness": pytest.approx(0.2),
        "redness": pytest.approx(0.2),
    }


def test_diversity_is_measured_in_a_scorers_features_where_it_has_some(painted):
    """Feature = squared level: distances .12 .04 .20 of the base, .20 0 .20 of the other."""

    class Squared(Brightness):
        def embed_images(self, images):
            return self.score(images, [])[:, None] ** 2

    base, better = painted
    result, _ = compare(base, {"better": [better]}, [Squared()])
    assert result.models[0].diversity.value == pytest.approx(0.40 / 0.36)


def test_several_training_runs_are_one_line(painted):
    base, better = painted
    result, _ = compare(base, {"pooled": [better, list(reversed(base))]}, [Brightness()])
    model = result.models[0]
    assert model.run_gains["brightness"] == [pytest.approx(0.1), 0]
    assert model.scores["brightness"].gain.value == pytest.approx(0.05)
    assert model.scores["brightness"].runs == 2
    assert model.diversity.value == pytest.approx((2 / 3 + 1) / 2)


def test_images_without_a_partner_are_an_error(painted):
    base, better = painted
    with pytest.raises(ValueError, match="'base' has prompt 'a small photo', seed 1, 'better' has not"):
        compare(base, {"better": [better[:-1]]}, [Brightness()])


def test_one_seed_has_no_diversity(painted):
    base, better = painted
    result, _ = compare(base[::2], {"better": [better[::2]]}, [Brightness()])
    assert result.models[0].diversity is None
    json.loads(result.to_json())


def test_evaluate_writes_everything_and_reuses_images(tiny, tuned, tmp_path, monkeypatch, capsys):
    def run():
        return evaluate(
            tiny["sdxl"],
            {"tuned": tuned, "copy": f"{tiny['sdxl']}/unet"},
            PROMPTS,
            SEEDS,
            scorers=Scoring([Brightness(), Redness()], faithfulness=Brightness()),
            out_dir=tmp_path,
            sampling=Sampling(num_inference_steps=2),
        )

    result = run()
    progress = {line.partition(":")[0].removeprefix("score ") for line in capsys.readouterr().err.splitlines()}
    assert progress == {"base", "tuned", "copy"}  # the names that were given, and no folder's
    moved, copy = result.models
    assert moved.scores["brightness"].gain.value != 0
    assert copy.scores["brightness"].gain.value == 0  # the base's own weights: the very same images
    assert copy.scores["brightness"].ties == 6
    assert copy.diversity.value == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "grid.png",
        "images",
        "result.json",
        "scores.jsonl",
        "table.txt",
    ]
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["models"][0]["scores"]["brightness"]["gain"]["value"] == moved.scores["brightness"].gain.value
    assert saved["settings"]["tuned"][0]["steps"] == 2
    assert saved["versions"]["torch"] == torch.__version__
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 3 * 6
    table = (tmp_path / "table.txt").read_text()
    for word in ("dR", "win/tie/loss", "brightness", "redness", "tuned", "copy", "0/6/0", "3 prompts x 2 seeds"):
        assert word in table
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size[0] > 3 * 160

    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr("diffalign.models.adapters.save_load.load_pipeline", refuse)
    assert run().to_json() == result.to_json()


def test_evaluate_refuses_what_it_cannot_name(tiny, tuned, tmp_path):
    arguments = {"out_dir": tmp_path}
    with pytest.raises(ValueError, match="none of them 'base'"):
        evaluate(tiny["sd"], {"base": tuned}, PROMPTS, SEEDS, scorers=[Brightness()], **arguments)
    with pytest.raises(ValueError, match="no scorer"):
        evaluate(tiny["sd"], {"a": tuned}, PROMPTS, SEEDS, scorers=[], **arguments)
    with pytest.raises(ScorerError, match="did you mean 'clip'"):
        evaluate(tiny["sd"], {"a": tuned}, PROMPTS, SEEDS, scorers=["clipp"], **arguments)
    with pytest.raises(ModelError, match="no tuned weights"):
        evaluate(tiny["sd"], {"a": str(tmp_path)}, PROMPTS, SEEDS, scorers=[Brightness()], **arguments)
    with pytest.raises(ValueError, match="two runs of 'a' have the same weights"):
        evaluate(tiny["sdxl"], {"a": [tuned, f"{tuned}/unet"]}, PROMPTS, SEEDS, scorers=[Brightness()], **arguments)
    for scorers in (["world"], Scoring([Brightness()], faithfulness="world-accuracy")):
        with pytest.raises(ValueError, match="'a small photo' is not a caption of"):
            evaluate(tiny["sd"], {"a": tuned}, PROMPTS[2:], SEEDS, scorers=scorers, **arguments)
    for prompts, seeds in (([], SEEDS), (PROMPTS, [])):
        with pytest.raises(ValueError, match="give at least one of each"):
            evaluate(tiny["sd"], {"a": tuned}, prompts, seeds, scorers=[Brightness()], **arguments)
    assert not list(tmp_path.iterdir())


def test_score_folder_reads_a_manifest_and_writes_scores(painted, tmp_path):
    folder = tmp_path / "base"
    lines = [{"file": p.file.name, "prompt": p.prompt, "seed": p.seed} for p in painted[0]]
    (folder / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = score_folder(folder, [Brightness()])
    assert [row["brightness"] for row in rows] == pytest.approx([0.2, 0.4, 0, 0.2, 0.4, 0.6])
    assert [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()] == rows


def test_bad_scorers_are_named(painted):
    class Broken:
        name = "broken"

        def score(self, images, prompts):
            return torch.full((len(images),), float("nan"))

    class Short(Broken):
        def score(self, images, prompts):
            return torch.zeros(1)

    base, better = painted
    with pytest.raises(ScorerError, match=r"'broken' gave nan to .*0_0\.png \(prompt 'a red circle', seed 0\)"):
        compare(base, {"better": [better]}, [Broken()])
    with pytest.raises(ScorerError, match="returned 1 scores for 6 images"):
        compare(base, {"better": [better]}, [Short()])
    with pytest.raises(ScorerError, match="same name"):
        compare(base, {"better": [better]}, [Brightness(), Brightness()])


def test_the_world_shows_what_a_damaged_base_loses(tmp_path):
    """Noise on every weight of the committed base: the true reward falls, on nearly every held-out prompt."""
    from diffusers import UNet2DConditionModel

    from diffalign.world import base_path
    from diffalign.world.captions import prompts

    unet = UNet2DConditionModel.from_pretrained(base_path(), subfolder="unet", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained(tmp_path / "unet")
    result = evaluate(
        str(base_path()),
        {"damaged": str(tmp_path / "unet")},
        prompts("heldout"),
        [0, 1],
        scorers=Scoring(["world"], faithfulness="world-accuracy"),
        out_dir=tmp_path / "out",
        sampling=Sampling(num_inference_steps=10),
    )
    score = result.models[0].scores["world"]
    assert score.base > 1
    assert score.gain.high < -0.1
    assert score.win_rate.high < 0.3
    assert result.models[0].faithfulness.gain.value < 0
