"""Ensembles against hand computations."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from diffalign.cli.main import main
from diffalign.rewards import ScorerError, load_scorer
from tests.cli.test_images import PROMPTS, paint


class Red:
    name = "red"

    def score(self, images, prompts):
        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])


class Green(Red):
    name = "green"

    def score(self, images, prompts):
        return torch.tensor([float(image.getpixel((0, 0))[1]) for image in images])

    def check_prompts(self, prompts):
        if "forbidden" in prompts:
            raise ScorerError("no 'forbidden'")


class Broken(Red):
    name = "broken"

    def score(self, images, prompts):
        return torch.full((len(images),), float("nan"))


RED, GREEN, BROKEN = (f"{__name__}:{cls.__name__}" for cls in (Red, Green, Broken))


@pytest.fixture
def written(tmp_path):
    """Writes the file of an ensemble of Red (mean 20, sd 10) and Green (mean 50, sd 50)."""

    def write(**changes):
        members = [{"scorer": RED, "mean": 20, "std": 10}, {"scorer": GREEN, "mean": 50, "std": 50.0}]
        file = tmp_path / "ensemble.json"
        file.write_text(json.dumps({"k": 1, "members": members, **changes}))
        return f"ensemble={file}"

    return write


def test_the_score_is_the_mean_less_k_standard_deviations(written):
    images = [Image.new("RGB", (2, 2), colour) for colour in ((10, 100, 0), (30, 100, 0), (50, 50, 0))]
    prompts = ["a", "b", "c"]
    judge = load_scorer(written())
    z = [[-1, 1, 3], [1, 1, 0]]  # by hand
    torch.testing.assert_close(judge.standardised(images, prompts), torch.tensor(z, dtype=torch.float64))
    # means 0, 1, 1.5; deviations over two members 1, 0, 1.5: the third, which one member alone praises, is not the best
    assert judge.score(images, prompts).tolist() == pytest.approx([-1, 1, 0])
    alone = torch.cat([judge.score([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    assert torch.equal(alone, judge.score(images, prompts))  # no statistics of the batch
    assert load_scorer(written(k=0)).score(images, prompts).tolist() == pytest.approx([0, 1, 1.5])
    assert judge.score([], []).shape == (0,)
    assert (judge.name, load_scorer(written(name="wary")).name) == ("ensemble", "wary")
    with pytest.raises(ScorerError, match="no 'forbidden'"):
        judge.check_prompts(["forbidden"])


def test_a_score_that_is_not_finite_names_its_member_and_prompt(written):
    judge = load_scorer(
        written(members=[{"scorer": RED, "mean": 0, "std": 1}, {"scorer": BROKEN, "mean": 0, "std": 1}])
    )
    with pytest.raises(ScorerError, match=r"'broken' gave nan for 'a'"):
        judge.score([Image.new("RGB", (2, 2))], ["a"])


ONE = {"scorer": RED, "mean": 20, "std": 10}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"members": [ONE]}, "two or more"),
        ({"members": [ONE, ONE]}, "each once"),
        ({"members": [ONE, {**ONE, "scorer": "ensemble=a.json"}]}, r"member 2 has scorer = 'ensemble=a\.json'"),
        ({"members": [ONE, {"scorer": GREEN, "mean": 1}]}, "the fields scorer, mean and std"),
        ({"members": [ONE, {"scorer": GREEN, "mean": 1, "std": 0}]}, r"std = 0; measure it"),
        ({"members": [ONE, {"scorer": GREEN, "mean": True, "std": 1}]}, "mean = True"),
        ({"members": [ONE, {"scorer": GREEN, "mean": float("inf"), "std": 1}]}, "mean = inf"),
        ({"members": {}}, "no list `members`"),
        ({"k": -1}, "k = -1; give a finite number from 0"),
        ({"k": None}, "k = None"),
        ({"k": 10**400}, "k = 1000"),
        ({"name": 3}, "name = 3"),
        ({"standardise": "batch"}, r"unknown fields \['standardise'\]"),
    ],
)
def test_faults_of_the_file_are_named(written, changes, words):
    with pytest.raises(ScorerError, match=words):
        load_scorer(written(**changes))


def test_other_files_are_refused(tmp_path):
    for text in ("{", "[1]", ""):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ScorerError, match=r"a\.json.*it is JSON"):
            load_scorer(f"ensemble={tmp_path / 'a.json'}")
    with pytest.raises(ScorerError, match="is not read"):
        load_scorer(f"ensemble={tmp_path / 'none.json'}")
    with pytest.raises(ScorerError, match="name the file of an ensemble"):
        load_scorer("ensemble")


def test_score_measures_an_ensemble_that_compare_then_uses(tmp_path, capsys):
    """Reference images with red 10 to 60: mean 35, sd 17.078. Grey gains of 10, 10 and 0: 6.667 / 17.078 = .390."""
    levels = ([10, 20], [30, 40], [50, 60])
    base = paint(tmp_path / "base", dict(zip(PROMPTS, levels, strict=True)))
    better = paint(tmp_path / "better", dict(zip(PROMPTS, ([20, 30], [40, 50], [50, 60]), strict=True)))
    file = tmp_path / "made" / "both.json"
    scorers = ["--scorer", RED, "--scorer", GREEN]
    main(["score", str(base), *scorers, "--ensemble", str(file), "--k", "0.5"])
    assert f"--scorer ensemble={file}" in capsys.readouterr().out
    spec = json.loads(file.read_text())
    assert [member["scorer"] for member in spec["members"]] == [RED, GREEN]
    assert [member["mean"] for member in spec["members"]] == [35, 35]
    assert [member["std"] for member in spec["members"]] == pytest.approx([17.07825] * 2)
    assert (spec["k"], spec["measured_on"]) == (0.5, {"folders": [str(base)], "images": 6})
    main(["compare", str(base), f"dpo={better}", "--scorer", f"ensemble={file}", "--out", str(tmp_path / "out")])
    assert "+0.390" in capsys.readouterr().out


def test_an_ensemble_of_one_scorer_or_equal_images_is_refused(tmp_path, capsys):
    base = paint(tmp_path / "base", {"a": [7, 7]})
    nested = [RED, "ensemble=a.json"]
    for scorers, words in (([RED], "two scorers"), ([RED, GREEN], "to every image"), (nested, "an ensemble itself")):
        given = [word for name in scorers for word in ("--scorer", name)]
        with pytest.raises(SystemExit):
            main(["score", str(base), *given, "--overwrite", "--ensemble", str(tmp_path / "e.json")])
        assert words in capsys.readouterr().err
        assert not (tmp_path / "e.json").exists()
    both = ["--scorer", RED, "--scorer", GREEN]
    for twice, words in (([*both, *both[:2]], f"--scorer {RED} is given 2 times"), ([f"{base}/", *both], f"{base} is")):
        with pytest.raises(SystemExit):
            main(["score", str(base), *twice, "--overwrite", "--ensemble", str(tmp_path / "e.json")])
        assert words in capsys.readouterr().err
