"""Configs of 0.1.0: each means what it meant to 0.1.0, or is refused with the remedy.

tests/golden/old_formats/configs holds six of its packaged configs and `resolved.json`, every setting that its own code
read from them (commit 1411373).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffalign.config.schema import Config, ConfigError, load_config

OLD = Path(__file__).parents[1] / "golden/old_formats/configs"
RESOLVED: dict[str, Any] = json.loads((OLD / "resolved.json").read_text())
# Settings whose default changed, with today's; MIGRATION.md says how to have the former one.
CHANGED_DEFAULTS = {"training.mixed_precision": "auto", "model.gradient_checkpointing": "auto"}
# 0.1.0 stored the settings of every tuning method. Today a config has its own method's, and accepts others at defaults.
OF_METHODS = {
    "lora": {"rank": 16, "alpha": None, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "resume_lora": None},
    "user_attention": {"user_tokens": 4, "user_scale": 1.0},
}


def settings(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting; a mapping without keys is a value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from settings(value, f"{above}{key}.")
        else:
            yield above + key, value


RENAMED = {"validation.steps": "validation.num_inference_steps"}


def of_its_method(stored: dict[str, Any]) -> dict[str, Any]:
    """The stored settings, without those of another tuning method, which are at their defaults."""
    tuning = stored.get("tuning", {})
    others = {k: v for m, own in OF_METHODS.items() if tuning and m != tuning["method"] for k, v in own.items()}
    assert {key: tuning[key] for key in others if key in tuning} == {k: v for k, v in others.items() if k in tuning}
    kept = {key: value for key, value in tuning.items() if key not in others}
    return stored | ({"tuning": kept} if tuning else {})


def old_with(tmp_path: Path, before: str, after: str) -> Path:
    """The file world_dpo.yaml of 0.1.0 with one line replaced."""
    text = (OLD / "world_dpo.yaml").read_text()
    assert text.count(before) == 1
    path = tmp_path / "old.yaml"
    path.write_text(text.replace(before, after))
    return path


@pytest.mark.parametrize("name", RESOLVED)
def test_a_config_of_the_first_release_means_the_same(name: str) -> None:
    today = dict(settings(load_config(OLD / f"{name}.yaml").resolved()))
    written = (OLD / f"{name}.yaml").read_text()
    for key, value in settings(of_its_method(RESOLVED[name])):
        changed = key in CHANGED_DEFAULTS and f"{key.rpartition('.')[2]}:" not in written
        assert today[RENAMED.get(key, key)] == (CHANGED_DEFAULTS[key] if changed else value), key


def test_the_resolved_config_that_a_run_stored_means_the_same(tmp_path: Path) -> None:
    """A run folder's config.yaml states every setting, so no default can change it."""
    for name, stored in RESOLVED.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(stored))  # JSON is YAML
        today = dict(settings(load_config(path).resolved()))
        meant = dict(settings(of_its_method(stored)))
        assert {key: today[RENAMED.get(key, key)] for key in meant} == meant, name


def test_a_former_name_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = old_with(tmp_path, "seed: 0\n", "seed: 0\nvalidation: {prompts: [a cat], steps: 7}\n")
    config = load_config(path)
    assert isinstance(config, Config)
    assert config.validation.num_inference_steps == 7
    assert "validation.steps is now called validation.num_inference_steps; rename the key in the config" in caplog.text
    assert "steps" not in config.resolved()["validation"]
    with pytest.raises(ConfigError, match="validation: steps is the former name of num_inference_steps, and both are"):
        load_config(path, ["validation.num_inference_steps=8"])
    assert load_config(path, ["validation.steps=9"]).validation.num_inference_steps == 9  # type: ignore[union-attr]


def test_both_values_of_the_former_defaults_can_be_written(tmp_path: Path) -> None:
    path = old_with(tmp_path, "  max_train_steps: 300\n", "  max_train_steps: 300\n  mixed_precision: no\n")
    config = load_config(path, ["model.gradient_checkpointing=none"])
    assert (config.training.mixed_precision, config.model.gradient_checkpointing) == ("no", "none")


# what 0.1.0 read as something that the file does not say, and what the error advises today
@pytest.mark.parametrize(
    ("before", "after", "advice"),
    [
        ("seed: 0\n", "seed: 010\n", "write 10, without leading zeros"),  # read as 8
        ("seed: 0\n", "seed: '5'\n", "write it without quotes"),
        ("seed: 0\n", "seed: 1_000\n", "write it without quotes and separators"),
        ("seed: 0\n", "seed: true\n", "an integer is required"),  # read as 1
        ("  resolution: 16\n", "  resolution: 16\n  random_flip: 1\n", "write true or false"),
        (
            "  lr_warmup_steps: 20\n",
            "  lr_warmup_steps: 20\n  lr_warmup_steps: 30\n",
            "merge the two",
        ),  # the last one won
    ],
)
def test_what_the_first_release_guessed_is_refused(tmp_path: Path, before: str, after: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        load_config(old_with(tmp_path, before, after))


def test_migration_names_what_changed() -> None:
    text = (Path(__file__).parents[2] / "MIGRATION.md").read_text()
    assert [key for key in (*CHANGED_DEFAULTS, *RENAMED, *RENAMED.values()) if f"`{key}`" not in text] == []
