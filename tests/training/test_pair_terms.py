"""Whole runs on pairs with weight, margin and mask, and the runs that refuse them before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.config.schema import Config, parse_config
from diffalign.data.row import DataError
from diffalign.training import build as setup
from diffalign.training.build import build
from diffalign.training.inspect.dry_run import describe_run
from diffalign.training.open_data import open_table
from diffalign.training.processes import make_accelerator
from diffalign.training.run import build_run, run_training
from tests.training.test_run import metrics, same, weights

MakeConfig = Callable[..., Config]
NEUTRAL: dict[str, Any] = {"weight": 1.0, "margin": 0.0, "mask": [[1.0, 1.0], [1.0, 1.0]]}


@pytest.fixture
def with_terms(pair_folder: Path, tmp_path: Path) -> Callable[..., str]:
    """`with_terms(weight=...)`: a copy of the twelve pairs that says so of each."""

    def write(**terms: Any) -> str:
        folder = tmp_path / "terms"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(pair_folder, folder)
        names = sorted(file.stem for file in folder.glob("*.txt"))
        prompts = {name: (folder / f"{name}.txt").read_text() for name in names}
        lines = [json.dumps({"name": name, "prompt": prompts[name], **terms}) for name in names]
        (folder / "captions.jsonl").write_text("\n".join(lines))
        return str(folder)

    return write


def test_neutral_terms_are_the_run_without_them_bitwise(
    make_config: MakeConfig, tiny_sd: Path, with_terms: Callable[..., str], tmp_path: Path
) -> None:
    shared = {"training.max_train_steps": 2, "data.random_flip": True}
    plain = make_config(tiny_sd, {**shared, "output_dir": str(tmp_path / "plain")})
    neutral = make_config(tiny_sd, {**shared, "output_dir": str(tmp_path / "n"), "data.path": with_terms(**NEUTRAL)})
    cached = {"data.cache_dir": str(tmp_path / "cache"), "data.cache_variants": 2, "output_dir": str(tmp_path / "c")}
    for config in (plain, neutral):
        run_training(config)
    run_training(make_config(tiny_sd, {**shared, "data.path": with_terms(**NEUTRAL), **cached}))
    assert same(weights(plain.output_dir), weights(neutral.output_dir))
    assert metrics(plain.output_dir) == metrics(neutral.output_dir)
    assert metrics(tmp_path / "c")[0]["grad_norm"] == pytest.approx(metrics(plain.output_dir)[0]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("terms", [{"weight": 0.0}, {"mask": [[0.0]]}])
def test_pairs_that_do_not_count_teach_nothing(
    terms: dict[str, Any], make_config: MakeConfig, tiny_sd: Path, with_terms: Callable[..., str]
) -> None:
    settings = {"training.max_train_steps": 1, "data.path": with_terms(**terms)}
    config = make_config(tiny_sd, settings)
    run_training(config)
    (line,) = metrics(config.output_dir)
    assert line["grad_norm"] == 0.0
    assert line["loss"] == (0.0 if "weight" in terms else float(torch.tensor(2.0).log()))


def test_a_margin_is_in_the_first_loss(make_config: MakeConfig, tiny_sd: Path, with_terms: Callable[..., str]) -> None:
    """-log s(0 - 1.5), at equal weights."""
    config = make_config(tiny_sd, {"training.max_train_steps": 1, "data.path": with_terms(margin=1.5)})
    run_training(config)
    (line,) = metrics(config.output_dir)
    assert line["loss"] == pytest.approx(float(torch.tensor(1.5).exp().log1p()), rel=1e-6)
    assert line["rewards/margins"] == 0.0
    assert "margin of each pair" in describe_run(build(config, make_accelerator(config)))


@pytest.mark.parametrize(
    ("terms", "change", "words"),
    [
        ({"margin": 1.0}, {"objective": {"name": "sft"}}, "sft has no log σ"),
        ({"mask": [[0.5, -0.5]]}, {"objective": {"name": "sft"}}, "the loss of sft does not depend"),
        (
            {"weight": 2.0},
            {"objective": {"name": "seppo"}, "source": {"name": "selfplay"}},
            r'data.columns: {weight: ""}',
        ),
    ],
)
def test_runs_that_cannot_use_them_stop_before_a_model_is_loaded(
    terms: dict[str, Any],
    change: dict[str, Any],
    words: str,
    make_config: MakeConfig,
    tiny_sd: Path,
    with_terms: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "load_run_base", lambda config: pytest.fail("a model was loaded"))
    config = make_config(tiny_sd, {"data.path": with_terms(**terms), **change})
    with pytest.raises(ValueError, match=words):
        build(config, make_accelerator(config))
    names = dict.fromkeys(terms, "")
    left_out = make_config(tiny_sd, {"data.path": with_terms(**terms), "data.columns": names, **change})
    open_table(left_out)


def test_a_preference_model_refuses_them(tiny_sd: Path, with_terms: Callable[..., str], tmp_path: Path) -> None:
    tree = {
        "output_dir": str(tmp_path / "out"),
        "model": {"pretrained_model_name_or_path": str(tiny_sd)},
        "preference_model": {"pretrained_model_name_or_path": str(tmp_path / "no clip")},
        "data": {"path": with_terms(weight=2.0), "resolution": 32},
        "training": {"report_to": "none"},
    }
    config: Any = parse_config(tree)
    with pytest.raises(DataError, match="a preference model learns which image is better"):
        build_run(config, make_accelerator(config))
