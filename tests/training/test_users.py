"""Whole runs with user attention: start, resume, accumulation, validation images, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffalign.cli.main import main
from diffalign.config.schema import Config, ConfigError
from diffalign.contrib.ppd.weights import USER_FILE
from diffalign.data.row import DataError
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.generate import generate
from diffalign.evaluation.recipe import Tuned
from diffalign.evaluation.sampling import Sampling
from diffalign.models.loading.family import ModelError
from diffalign.training.run import run_training
from tests.data.helpers import pick_rows, write_parquet
from tests.training.test_run import metrics, same

USERS = {"anna": [0.5, -1.0, 2.0], "ben": [0.0, 0.25, -3.0]}


@pytest.fixture
def user_pairs(tmp_path: Path) -> Path:
    """Eight pairs of two users, and users.json beside them."""
    (tmp_path / "users.json").write_text(json.dumps(USERS))
    rows = [row | {"user": list(USERS)[i % 3 == 0]} for i, row in enumerate(pick_rows(8))]
    return write_parquet(tmp_path / "pairs.parquet", rows)


@pytest.fixture
def make_user_config(make_config: Callable[..., Config], user_pairs: Path) -> Callable[..., Config]:
    def make(base: Path, overrides: dict[str, Any] | None = None) -> Config:
        shared: dict[str, Any] = {
            "tuning": {"method": "user_attention"},
            "data.path": str(user_pairs),
            "data.users": str(user_pairs.parent / "users.json"),
            "training.learning_rate": 1e-2,
        }
        return make_config(base, shared | (overrides or {}))

    return make


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / USER_FILE)


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_first_step_is_log_2_with_a_gradient_and_then_it_learns(
    family: str, precision: str, make_user_config: Callable[..., Config], request: pytest.FixtureRequest
) -> None:
    config = make_user_config(request.getfixturevalue(family), {"training.mixed_precision": precision})
    run_training(config)
    lines = metrics(config.output_dir)
    assert lines[0]["loss"] == float(torch.tensor(2.0).log())
    assert lines[0]["rewards/margins"] == 0.0
    assert lines[0]["grad_norm"] > 0
    assert lines[1]["loss"] != lines[0]["loss"]


def test_two_and_two_steps_are_four_bitwise(
    make_user_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    shared = {
        "training.lr_scheduler": "cosine",
        "training.lr_warmup_steps": 1,
        "training.ema_decay": 0.9,
        "training.checkpointing_steps": 2,
        "data.cache_dir": str(tmp_path / "cache"),
    }
    whole = make_user_config(tiny_sdxl, {**shared, "output_dir": str(tmp_path / "whole")})
    run_training(whole)
    for part in ("checkpoint-4", USER_FILE):  # as if it had been killed after step 2
        (tmp_path / "whole" / part).rename(tmp_path / part)
    again = {**shared, "output_dir": str(tmp_path / "whole"), "training.resume_from_checkpoint": "latest"}
    run_training(make_user_config(tiny_sdxl, again))
    assert same(weights(tmp_path / "whole"), weights(tmp_path))
    assert same(weights(tmp_path / "whole/checkpoint-4"), weights(tmp_path / "checkpoint-4"))
    with pytest.raises(ConfigError, match="contains a run"):
        run_training(whole)


def test_accumulation_and_batch_are_interchangeable_online_and_cached(
    make_user_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path
) -> None:
    found = []
    for batch, accumulation, cached in ((4, 1, False), (1, 4, True)):
        config = make_user_config(
            tiny_sd,
            {
                "output_dir": str(tmp_path / str(batch)),
                "training.train_batch_size": batch,
                "training.gradient_accumulation_steps": accumulation,
                "training.max_train_steps": 2,
                "training.adam_epsilon": 1e-4,  # Adam's first step is lr·sign(g): without this, rounding decides signs
                "training.learning_rate": 1e-3,
                **({"data.cache_dir": str(tmp_path / "cache")} if cached else {}),
            },
        )
        run_training(config)
        found.append(weights(config.output_dir))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=2e-6)


def test_the_same_pairs_of_other_people_are_another_run(
    make_user_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path
) -> None:
    swapped = tmp_path / "swapped.json"
    swapped.write_text(json.dumps({"anna": USERS["ben"], "ben": USERS["anna"]}))
    found = []
    for users in (tmp_path / "users.json", swapped):
        config = make_user_config(tiny_sd, {"data.users": str(users), "output_dir": str(tmp_path / users.stem)})
        run_training(config)
        found.append((weights(config.output_dir), metrics(config.output_dir)))
    assert found[0][1][0]["loss"] == found[1][1][0]["loss"]  # nobody has any effect yet
    assert not same(found[0][0], found[1][0])


def test_images_for_somebody(
    make_user_config: Callable[..., Config], tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation images, `generate` and `evaluate` draw for the user they are given; the base knows none."""
    for user in USERS:
        config = make_user_config(
            tiny_sd,
            {
                "output_dir": str(tmp_path / user),
                "training.max_train_steps": 3,
                "training.learning_rate": 0.1,
                "validation": {"prompts": ["a red circle"], "user": user, "num_inference_steps": 2, "every": 3},
            },
        )
        run_training(config)
    assert same(weights(tmp_path / "anna"), weights(tmp_path / "ben"))
    shown = [np.asarray(Image.open(tmp_path / user / "validation/step-000003.png")) for user in USERS]
    assert not np.array_equal(*shown)

    users = str(tmp_path / "users.json")
    common = ["--prompts", "a red circle", "--steps", "2", "--device", "cpu", "--users", users]
    for name, who in {"anna": ["anna"], "mixed": ["anna=0.5", "ben=0.5"], "again": ["anna=3"]}.items():
        asked = [word for one in who for word in ("--user", one)]
        out = ["--out", str(tmp_path / "pictures" / name)]
        main(["generate", str(tiny_sd), "--tuned", str(tmp_path / "anna"), *common, *asked, *out])
    pictures = {p.parent.name: np.asarray(Image.open(p)) for p in (tmp_path / "pictures").rglob("*.png")}
    assert np.array_equal(pictures["anna"], pictures["again"])
    assert not np.array_equal(pictures["anna"], pictures["mixed"])

    with pytest.raises(ValueError, match=r"made with other settings.*user"):
        generate(
            str(tiny_sd),
            ["a red circle"],
            [0],
            out_dir=tmp_path / "pictures/anna",
            tuned=Tuned(tmp_path / "anna", user=USERS["ben"]),
            sampling=Sampling(2),
        )
    with pytest.raises(ModelError, match="no user was given"):
        generate(
            str(tiny_sd),
            ["x"],
            [0],
            out_dir=tmp_path / "none",
            tuned=str(tmp_path / "anna"),
            sampling=Sampling(2),
        )
    with pytest.raises(SystemExit):
        main(["generate", str(tiny_sd), "--prompts", "x", "--user", "anna", "--out", str(tmp_path / "none")])
    assert "--users FILE and --user ID belong together" in capsys.readouterr().err

    class Brightness:
        name = "brightness"

        def score(self, images: Any, prompts: Any) -> torch.Tensor:
            return torch.tensor([float(np.asarray(image).mean()) for image in images])

    gains = []
    for user in USERS.values():
        result = evaluate(
            str(tiny_sd),
            {"ppd": Tuned(tmp_path / "anna", user=user)},
            ["a red circle", "a blue square"],
            [0],
            scorers=[Brightness()],
            out_dir=tmp_path / "evaluation",
            sampling=Sampling(2),
        )
        gains.append(result.models[0].scores["brightness"])
    assert gains[0].base == gains[1].base
    assert gains[0].tuned != gains[1].tuned
    assert len(list((tmp_path / "evaluation/images").iterdir())) == 3  # the base once, and one folder for each user


def test_check_says_what_is_trained(
    make_user_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffalign.config.schema import save_config

    save_config(make_user_config(tiny_sdxl), tmp_path / "run.yaml")
    main(["check", str(tmp_path / "run.yaml")])
    text = capsys.readouterr().out
    assert "user_attention of 4 tokens, users of 3 numbers" in text
    assert "reference: the policy with user attention off" in text
    assert USER_FILE in text
    assert "loss 0.693147" in text


def test_data_without_users_and_users_that_nobody_uses(
    make_user_config: Callable[..., Config],
    make_config: Callable[..., Config],
    tiny_sd: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(DataError, match="no column user_embed"):
        run_training(make_config(tiny_sd, {"tuning": {"method": "user_attention"}}))
    with pytest.raises(DataError, match=r"validation\.user.*did you mean 'anna'"):
        run_training(make_user_config(tiny_sd, {"validation": {"prompts": ["x"], "user": "anne"}}))
    rows = [row | {"user_embed": [float(i), 1.0]} for i, row in enumerate(pick_rows(4))]
    own = write_parquet(tmp_path / "own.parquet", rows)
    with caplog.at_level("INFO"):
        run_training(make_config(tiny_sd, {"data.path": str(own), "training.max_train_steps": 1}))
    assert "only tuning.method: user_attention uses them" in caplog.text
    config = make_user_config(tiny_sd, {"data.path": str(own), "data.users": None, "output_dir": str(tmp_path / "own")})
    run_training(config)
    assert weights(config.output_dir)["user_attention.proj.weight"].shape[1] == 2


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"tuning": {"method": "lora"}}, "data.users: only tuning.method: user_attention"),
        ({"tuning": {"method": "user_attention", "rank": 8}}, "tuning: rank: only tuning.method: lora"),
        ({"tuning": {"user_tokens": 8}, "data.users": None}, "tuning: user_tokens: only tuning.method: user_attention"),
        ({"validation": {"prompts": ["x"]}}, "validation.user"),
        (
            {"tuning": {"method": "user_attention", "reference": "runs/x"}},
            "tuning: reference: only tuning.method: lora or full has this setting; remove it",
        ),
        ({"validation": {"user": "anna"}}, "need both validation.prompts"),
        ({"validation": {"pairs": 0.5, "least_diversity": 0.8}}, "validation.least_diversity: images are sampled"),
        ({"validation": {"pairs": 0.5, "faithfulness": "clip"}}, "validation.faithfulness: images are sampled"),
        ({"validation": {"prompts": ["x"], "user": "anna"}, "data.users": None}, "is an id in data.users"),
        ({"source": {"name": "selfplay"}, "objective": {"name": "seppo"}}, "generates pairs without users"),
    ],
)
def test_settings_that_contradict(
    overrides: dict[str, Any], fault: str, make_user_config: Callable[..., Config], tiny_sd: Path
) -> None:
    with pytest.raises(ConfigError, match=fault):
        make_user_config(tiny_sd, overrides)
