"""Tuning methods by name: those of the core, those of contrib, and one's own, from a config to `generate`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import Trainer, TrainingArguments, load_pairs
from diffalign.config.schema import Config, ConfigError, load_config, parse_config
from diffalign.config.strict_yaml import read_yaml
from diffalign.errors import DiffalignError
from diffalign.io import plugins
from diffalign.models.adapters import methods
from diffalign.models.adapters.core_methods import FullFineTuning, LoRA
from diffalign.models.adapters.methods import (
    METHODS,
    Start,
    TuningMethod,
    WeightLayout,
    find_method,
    known_methods,
)
from diffalign.models.adapters.save_load import find_tuned, load_pipeline, load_tuned
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.reference import FrozenCopy
from diffalign.training.run import run_training
from diffalign.world import base_path, pairs_path
from tests.models.conftest import Model
from tests.training.test_run import metrics

PACKAGE = Path(__file__).parents[2] / "diffalign"
MakeConfig = Callable[..., Config]


class NormsFile(WeightLayout):
    """The weights of all group norms in one file."""

    kind = "norms"
    label = "group norms"
    names = ("norms.safetensors",)

    def owns(self, file: Path) -> bool:
        return file.name in self.names

    def is_on(self, unet: Any) -> bool:
        return hasattr(unet, "tunes_norms")

    def save(self, unet: Any, folder: Path, family: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: p.detach() for n, p in unet.named_parameters() if "norm" in n}, folder / self.names[0])
        return folder / self.names[0]

    def load(self, unet: Any, path: Path) -> None:
        with torch.no_grad():
            for name, value in load_file(path).items():
                unet.get_parameter(name).copy_(value)


@dataclass(frozen=True)
class Norms(TuningMethod):
    """Trains the group norms of the UNet alone."""

    layout = NormsFile()

    share: float = field(default=1.0, metadata={"gt": 0, "le": 1})

    def prepare(self, unet: Any, start: Start) -> None:
        unet.requires_grad_(False)
        unet.tunes_norms = True
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_("norm" in name)

    def make_reference(self, unet: Any, autocast_dtype: torch.dtype | None) -> FrozenCopy:
        return FrozenCopy(unet, autocast_dtype)


@pytest.fixture(autouse=True)
def no_other_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test asks for is unknown to the next."""
    monkeypatch.setattr(methods, "_used", {})
    monkeypatch.setattr(methods, "_skipped", set())


OWN = {"method": "tests.contrib.test_methods:Norms", "share": 0.5}


def test_a_method_of_ones_own_trains_resumes_and_loads(make_config: MakeConfig, tiny_sd: Path, tmp_path: Path) -> None:
    shared = {
        "tuning": OWN,
        "training.max_train_steps": 4,
        "training.checkpointing_steps": 2,
        "training.learning_rate": 1e-2,
    }
    config = make_config(tiny_sd, {**shared, "output_dir": str(tmp_path / "run")})
    assert config.tuning == Norms(0.5)
    run_training(config)
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(float(torch.tensor(2.0).log()))
    assert lines[-1]["loss"] != lines[0]["loss"]
    whole = load_file(tmp_path / "run/norms.safetensors")
    assert load_config(tmp_path / "run/config.yaml") == config
    for part in ("checkpoint-4", "norms.safetensors"):  # as if it had been killed after step 2
        (tmp_path / "run" / part).rename(tmp_path / part)
    run_training(
        make_config(
            tiny_sd, {**shared, "output_dir": str(tmp_path / "run"), "training.resume_from_checkpoint": "latest"}
        )
    )
    again = load_file(tmp_path / "run/norms.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    found = find_tuned(tmp_path / "run")
    assert (found.kind, found.path.name) == ("norms", "norms.safetensors")
    unet = load_pipeline(str(tiny_sd), tuned=str(tmp_path / "run")).unet
    assert all(torch.equal(unet.get_parameter(name), value) for name, value in whole.items())


def test_a_method_given_as_an_object_is_saved_in_its_own_layout(tmp_path: Path) -> None:
    Trainer(
        base_path(),
        "dpo",
        load_pairs(pairs_path(), resolution=16, max_pairs=4),
        TrainingArguments(output_dir=str(tmp_path), max_train_steps=1, train_batch_size=2, report_to="none"),
        tuning=Norms(0.5),
    ).train()
    assert (tmp_path / "norms.safetensors").is_file()
    assert not (tmp_path / "unet").exists()
    assert find_tuned(tmp_path).kind == "norms"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("nowhere.at_all:Method", "there is no module 'nowhere'"),
        ("tests.contrib.test_methods:Nroms", "has no 'Nroms'"),
        ("tests.contrib.test_methods:NormsFile", "is not a dataclass that inherits from"),
    ],
)
def test_an_entry_point_that_fails_is_an_error_only_where_it_is_asked_for(
    place: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = "diffalign.tuning_methods"
    entries = [EntryPoint("broken", place, group), EntryPoint("norms", "tests.contrib.test_methods:Norms", group)]
    monkeypatch.setattr(plugins, "_offered", lambda what: {entry.name: entry for entry in entries})
    with caplog.at_level(logging.WARNING, "diffalign"):
        assert set(known_methods()) == {*METHODS, "norms"}
        assert known_methods()["norms"] is Norms
    (warning,) = caplog.messages  # of two calls
    assert re.search(f"tuning method 'broken' is left out: .*{reason}", warning)
    with pytest.raises(DiffalignError, match=f"tuning method 'broken'.*{reason}"):
        find_method("broken")


@pytest.mark.parametrize(
    ("tuning", "fault"),
    [
        ({"method": "loar"}, "no tuning method is called 'loar'; did you mean 'lora'"),
        ({"method": "tests.contrib.test_methods:Nroms"}, "has no 'Nroms'; did you mean 'Norms'"),
        ({"method": "tests.contrib.test_methods:NormsFile"}, "is not a dataclass that inherits from"),
        ({"method": "diffalign.objectives:DiffusionDPO"}, "is not a dataclass that inherits from"),
        ({**OWN, "share": 2}, "tuning: share: Input should be less than or equal to 1"),
        ({**OWN, "rank": 3}, "tuning: rank: only tuning.method: lora has this setting"),
        ({"method": "lora", "ranks": 3}, "tuning: ranks: unknown key; did you mean 'rank'"),
        ({"rank": 0}, "tuning: rank: Input should be greater than or equal to 1, got 0"),
        ({"alpha": 0}, "tuning: alpha: Input should be greater than 0"),
        ({"rank": 2.5, "alpha": "x"}, "rank: an integer is required, got 2.5; alpha: a number is required"),
        (LoRA(rank=-1), "tuning: rank: Input should be greater than or equal to 1, got -1"),
        ({"method": "full", "rank": 8}, "tuning: rank: only tuning.method: lora has this setting; remove it"),
        (5, "tuning: this is a section, got 5"),
        (None, "tuning: this is a section, got None"),
    ],
)
def test_what_is_refused(tuning: Any, fault: str, make_config: MakeConfig, tiny_sd: Path) -> None:
    tree = {**make_config(tiny_sd).resolved(), "tuning": tuning}
    with pytest.raises(ConfigError, match=re.escape(fault)):
        parse_config(tree)


def test_configs_with_the_settings_of_every_method_are_read(make_config: MakeConfig, tiny_sd: Path) -> None:
    """Earlier versions saved a run's config with the keys of all three methods."""
    earlier = {
        "method": "lora",
        "rank": 8,
        "alpha": None,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "resume_lora": None,
        "reference": None,
        "user_tokens": 4,
        "user_scale": 1.0,
    }
    tree = make_config(tiny_sd).resolved()
    for method, expected in {"lora": LoRA(rank=8), "full": FullFineTuning()}.items():
        tuning = {**earlier, "method": method, "rank": 8 if method == "lora" else 16}
        assert parse_config({**tree, "tuning": tuning}).tuning == expected
    user = parse_config({**tree, "tuning": {**earlier, "method": "user_attention", "rank": 16}}).tuning
    assert user == known_methods()["user_attention"](user_tokens=4, user_scale=1.0)


def test_a_saved_config_has_the_methods_own_settings_alone(make_config: MakeConfig, tiny_sd: Path) -> None:
    tree = make_config(tiny_sd, {"tuning": {"method": "full"}}).resolved()
    assert tree["tuning"] == {"method": "full", "reference": None}
    tree = make_config(tiny_sd, {"tuning": {"rank": 2}}).resolved()
    assert tree["tuning"]["target_modules"] == ["to_q", "to_k", "to_v", "to_out.0"]
    assert tree["tuning"]["rank"] == 2


def test_the_core_names_contrib_in_one_place_alone() -> None:
    """The table of methods names a class, which is imported when it is needed; the rest of the core knows none."""
    named = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "user_attention" in path.read_text() and "contrib" not in path.parts
    }
    assert named == {"models/adapters/methods.py"}
    assert METHODS["user_attention"].startswith("diffalign.contrib.ppd.")


def test_a_damaged_file_of_another_method_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "user_attention.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"user_attention\.safetensors"):
        load_tuned(model.unet(), tmp_path)


def test_the_packaged_config_of_ppd_uses_it() -> None:
    packaged = read_yaml(PACKAGE.parent / "training_configs/world/ppd.yaml")
    assert parse_config(packaged).tuning.method == "user_attention"
