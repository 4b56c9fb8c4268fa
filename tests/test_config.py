"""Configs: round trip, overrides, and faults that are all named at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffalign.config import ConfigError, load_config, parse_config, save_config
from diffalign.objectives import DiffusionDPO, MaPO

MINIMAL = {
    "output_dir": "runs/x",
    "model": {"pretrained_model_name_or_path": "base"},
    "objective": {"name": "dpo", "beta": 2000},
    "data": {"path": "pairs.parquet"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_objective_node_is_the_dataclass(file: Path) -> None:
    assert load_config(file).objective == DiffusionDPO(beta=2000.0)


def test_overrides_reach_every_level(file: Path) -> None:
    config = load_config(
        file,
        ["training.learning_rate=1e-5", "objective.timesteps=[249, 999]", "seed=7", "model.attention=math"],
    )
    assert config.training.learning_rate == 1e-5
    assert config.objective.timesteps == (249, 999)
    assert (config.seed, config.model.attention) == (7, "math")


def test_a_bare_no_is_no_precision(file: Path) -> None:
    assert load_config(file, ["training.mixed_precision=no"]).training.mixed_precision == "no"


def test_another_objective_starts_from_its_own_defaults(file: Path) -> None:
    """MaPO's beta is 0.1: the 2000 that the file has for DPO is not meant for it."""
    assert load_config(file, ["objective.name=mapo"]).objective == MaPO()
    assert load_config(file, ["objective.beta=0.2", "objective.name=mapo"]).objective == MaPO(beta=0.2)
    assert load_config(file, ["objective.name=dpo"]).objective == DiffusionDPO(beta=2000.0)
    lora = load_config(file, ["tuning.rank=4"])
    assert load_config(file, ["tuning.method=full"]).tuning.method == "full"
    assert lora.tuning.rank == 4


def test_shipped_assets_are_found_from_any_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(file, ["data.path=assets/world/pairs/renders.parquet"])
    assert Path(config.data.path).is_file()
    assert load_config(file, ["data.path=assets/mine.parquet"]).data.path == "assets/mine.parquet"


def test_resolved_config_round_trips(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["tuning.rank=8", "validation.prompts=[a cat, a dog]", "objective.timesteps=[1]"])
    save_config(config, tmp_path / "out.yaml")
    assert load_config(tmp_path / "out.yaml") == config


def test_all_faults_at_once_with_the_nearest_names() -> None:
    tree = {
        **MINIMAL,
        "model": {"pretrained_model_name_or_path": "base", "gradient_checkpoint": True},
        "training": {"learnin_rate": 1e-5, "train_batch_size": 0, "mixed_precision": "bf17"},
        "objective": {"name": "dpo", "betta": 1},
        "data": {},
        "traning": {},
    }
    with pytest.raises(ConfigError) as e:
        parse_config(tree)
    text = str(e.value)
    assert "7 fault(s)" in text
    for expected in (
        "model.gradient_checkpoint: unknown key; did you mean 'gradient_checkpointing'?",
        "training.learnin_rate: unknown key; did you mean 'learning_rate'?",
        "training.train_batch_size: Input should be greater than or equal to 1, got 0",
        "training.mixed_precision: Input should be 'no', 'bf16' or 'fp16', got 'bf17'",
        "objective: betta: dpo has no such setting; did you mean 'beta'?",
        "data.path: required, and missing",
        "traning: unknown key; did you mean 'training'?",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.beta=-1"], "beta = -1"),
        (["objective.beta=much"], "beta: Input should be a valid number"),
        (["objective.name=dop"], "did you mean 'dpo'"),
        (["objective=dpo"], "mapping with a name"),
        (["data.resolution=100"], "multiple of 8"),
        (["data.cache_variants=2"], "needs data.cache_dir"),
        (["seed"], "key.sub=value"),
        (["seed.x=1", "seed.x.y=1"], "not a section"),
        (["seed=[1"], "not valid YAML"),
        (["tuning.method=full", "tuning.resume_lora=x"], r"tuning\.resume_lora: only tuning.method: lora"),
        (["training.lr_scheduler=constant", "training.lr_warmup_steps=5"], "constant has no warm-up"),
        (["training.optimizer=adafactor", "training.adam_beta1=0.8"], r"training\.adam_beta1: adafactor"),
        (["training.lr=1"], "did you mean 'learning_rate'"),
        (["objective.name=[dpo]"], "no objective is called"),
    ],
)
def test_single_faults(file: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(file, overrides)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(tmp_path / "list.yaml")
