"""Which weights are exported, and for which base, from folders as runs leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.config.schema import Config, parse_config, save_config
from diffalign.contrib.ppd.user_attention import add_user_attention
from diffalign.contrib.ppd.weights import save_user_attention
from diffalign.export.names import ExportError
from diffalign.export.tuned_run import find_tuned_run, shown
from diffalign.models.adapters.lora import LORA_FILE
from diffalign.models.loading.family import ModelError
from tests.models.adapters.test_merge import write_full, write_lora
from tests.models.conftest import Model

MakeConfig = Callable[..., Config]


@pytest.fixture
def run(model: Model, tmp_path: Path) -> Path:
    return Path(write_lora(model, tmp_path / "run", seed=1, rank=4, alpha=10))


def test_the_base_is_the_runs_own_unless_another_place_is_named(
    model: Model, run: Path, make_config: MakeConfig
) -> None:
    settings = {"model.revision": "main", "model.variant": "fp16", "model.prediction_type": "v_prediction"}
    save_config(make_config(model.folder, settings), run / "config.yaml")
    for path in (run, run / LORA_FILE):
        what = find_tuned_run(path)
        assert (what.tuned.kind, what.tuned.path, what.objective) == ("lora", run / LORA_FILE, "dpo")
        assert what.base.pretrained_model_name_or_path == str(model.folder)
        assert what.base.revision == "main"
    moved = find_tuned_run(run, "elsewhere").base
    assert (moved.pretrained_model_name_or_path, moved.revision, moved.variant) == ("elsewhere", None, None)
    assert moved.prediction_type == "v_prediction"  # a fact of the run, wherever its base lies
    assert find_tuned_run(run).provenance() | {"diffalign.objective": "dpo"} == find_tuned_run(run).provenance()


def test_a_unet_folder_finds_the_settings_beside_it(model: Model, tmp_path: Path, make_config: MakeConfig) -> None:
    run = Path(write_full(model, tmp_path / "run", 1))
    save_config(make_config(model.folder), run / "config.yaml")
    assert find_tuned_run(run) == find_tuned_run(run / "unet")
    assert find_tuned_run(run).tuned.kind == "unet"


def test_without_settings_a_merge_says_its_base_and_else_the_user_must(run: Path) -> None:
    with pytest.raises(ModelError, match=r"says which base .* give it with --base"):
        find_tuned_run(run)
    assert find_tuned_run(run, "the/base").base.pretrained_model_name_or_path == "the/base"
    (run / "merge.json").write_text(json.dumps({"base": "merged/base", "parts": []}))
    what = find_tuned_run(run)
    assert (what.base.pretrained_model_name_or_path, what.objective) == ("merged/base", None)
    assert find_tuned_run(run, "the/base").base.pretrained_model_name_or_path == "the/base"


def test_an_average_is_exported_from_the_finished_run_and_raw_weights_by_their_name(
    model: Model, run: Path, make_config: MakeConfig
) -> None:
    save_config(make_config(model.folder, {"training.ema_decay": 0.99}), run / "config.yaml")
    assert find_tuned_run(run).tuned.path == run / LORA_FILE
    torch.save({"step": 1}, run / "training_state.pt")  # now it is a checkpoint
    with pytest.raises(ExportError, match=rf"EMA: .*Export the finished run.*naming them: {run / LORA_FILE}"):
        find_tuned_run(run)
    assert find_tuned_run(run / LORA_FILE).tuned.path == run / LORA_FILE
    save_config(make_config(model.folder), run / "config.yaml")
    assert find_tuned_run(run).tuned.path == run / LORA_FILE  # a checkpoint without EMA


def test_user_attention_and_judges_are_refused(model: Model, tmp_path: Path, make_config: MakeConfig) -> None:
    unet = model.unet()
    add_user_attention(unet, dim=8, tokens=2)
    save_user_attention(unet, tmp_path)
    with pytest.raises(ExportError, match="is user attention, a layer that no other program has"):
        find_tuned_run(tmp_path, str(model.folder))
    tree = make_config(model.folder).resolved()
    del tree["model"]["gradient_checkpointing"]  # a setting of runs with an objective
    judge = {key: tree[key] for key in ("model", "data", "output_dir")} | {"preference_model": {}}
    save_config(parse_config(judge), tmp_path / "config.yaml")
    with pytest.raises(ExportError, match="trained a preference model"):
        find_tuned_run(tmp_path, str(model.folder))


def test_where_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tuned weights at"):
        find_tuned_run(tmp_path / "none", "base")


def test_no_file_says_whose_machine_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "alice"
    (home / "base").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    assert [shown(str(home / "base")), shown(str(home)), shown(f"{home}/gone")] == ["base", "", "gone"]
    monkeypatch.chdir(home)
    assert [shown("base"), shown("../alice/base"), shown("org/name"), shown(".")] == ["base", "base", "org/name", ""]
