"""Every packaged config: it parses, its header has all labels, and its command runs this file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from diffalign.config.schema import PreferenceModelConfig, load_config
from diffalign.objectives import OBJECTIVES
from diffalign.training.optim.optimizers import effective_batch, effective_lr

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "training_configs"
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name != "accelerate")
CONFIGS = {path.relative_to(FOLDER).as_posix(): path for path in FILES}
PACKAGED = 74  # a config that disappears, or one that no test sees, changes this number
EMBEDDED = ("world/", "emoji/")  # folders whose configs run on committed files
LABELS = ("Command", "Hardware", "Time", "Expect", "Source")
NAMED_BY_SOURCE = {
    "spin": "seppo",
    "raft": "sft",
    "advantage": "sft",
    "online_dpo": "dpo",
    "npo": "dpo",
    "ppd": "dpo",
    "lpo": "spo",
}  # not by objective
PAIRS_PUBLISHED = {"dpo_full": 2048, "sft_full": 2048, "inpo_full": 1024, "smpo_full": 1024, "mapo_full": 128}  # a step


def header(path: Path) -> dict[str, str]:
    """The labelled lines of a header, continuation lines joined; "Purpose" is its first line."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    fields, label = {"Purpose": lines[0].lstrip("# ")}, ""
    for line in lines[1:]:
        if found := re.fullmatch(r"# (\w+): +(\S.*)", line):
            label = found[1]
            fields[label] = found[2]
        elif label and re.match(r"# {10,}\S", line):
            fields[label] += " " + line.lstrip("# ")
        else:
            label = ""
    return fields


def test_none_is_missing() -> None:
    assert len(CONFIGS) == PACKAGED
    assert {name.split("/")[0] for name in CONFIGS} == {"world", "emoji", "sd15", "sdxl"}


@pytest.mark.parametrize("name", CONFIGS)
def test_parses_and_says_what_it_is(name: str) -> None:
    path = CONFIGS[name]
    config = load_config(path)
    fields = header(path)
    assert len(fields["Purpose"]) > 20
    assert set(LABELS) <= fields.keys()
    assert fields["Command"] == f"accelerate launch -m diffalign train training_configs/{name}"
    assert config.output_dir == f"runs/{name.removesuffix('.yaml')}"
    stem = re.sub(r"_\d+gb$", "", Path(name).stem).removesuffix("_full").removesuffix("_lora")
    if isinstance(config, PreferenceModelConfig):
        assert stem == {"latent": "latent_judge"}.get(config.preference_model.kind, config.preference_model.kind)
    else:
        assert config.objective.name == NAMED_BY_SOURCE.get(stem, stem)
    assert max(map(len, path.read_text().splitlines())) <= 120


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_what_is_meant(name: str) -> None:
    """Every key in the file is one the config has (none is a default's misspelling), with the value it says."""
    written = yaml.safe_load(CONFIGS[name].read_text())
    resolved = load_config(CONFIGS[name]).resolved()
    for section, keys in written.items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            assert resolved[section][key] == value, f"{section}.{key}"


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith(EMBEDDED)])
def test_the_worlds_configs_point_at_committed_files(name: str) -> None:
    config = load_config(CONFIGS[name])
    assert (ROOT / config.model.pretrained_model_name_or_path / "model_index.json").is_file()
    assert (ROOT / config.data.path).is_file()


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith(EMBEDDED)])
def test_the_others_say_that_the_data_are_the_users(name: str) -> None:
    config, text = load_config(CONFIGS[name]), CONFIGS[name].read_text()
    assert "data.path is a placeholder" in text
    source = None if isinstance(config, PreferenceModelConfig) else config.source
    if source is None or source.data == "winners":
        assert config.data.path == "data/pairs"
        assert "data.path=my/pairs.parquet" in text
    else:
        assert config.data.path == "data/prompts.txt"
        assert "data.path=my/prompts.txt" in text


def test_published_batches_and_learning_rates_come_out() -> None:
    seen = 0
    for name, path in CONFIGS.items():
        pairs = PAIRS_PUBLISHED.get(Path(name).stem)
        if pairs is None or name.startswith(EMBEDDED):
            continue
        seen += 1
        training = load_config(path).training
        assert effective_batch(training, processes=1) == pairs, name
        assert effective_lr(training, processes=1) == pytest.approx(1e-5 if pairs == 128 else 1e-8 * pairs), name
    assert seen == 9


def test_advice_for_several_gpus_keeps_the_batch() -> None:
    for name, path in CONFIGS.items():
        found = re.search(r"--num_processes (\d+) .*gradient_accumulation_steps=(\d+)", path.read_text())
        if name.startswith(EMBEDDED):
            continue
        assert found, name
        training = load_config(path).training
        there = training.model_copy(update={"gradient_accumulation_steps": int(found[2])})
        assert effective_batch(there, int(found[1])) == effective_batch(training, 1), name


@pytest.mark.parametrize(
    ("family", "rank", "lr", "pairs", "threshold", "candidates"),
    [("sd15", 4, 6e-5, 40, 0.3, 4), ("sdxl", 64, 1e-5, 16, 0.4, 2)],
)
def test_spo_is_as_published(family: str, rank: int, lr: float, pairs: int, threshold: float, candidates: int) -> None:
    config = load_config(CONFIGS[f"{family}/spo_lora.yaml"])
    assert (config.tuning.rank, config.tuning.lora_alpha) == (rank, rank)
    assert effective_batch(config.training, processes=1) == pairs
    assert (config.training.learning_rate, config.training.adam_weight_decay) == (lr, 1e-4)
    source = config.source
    assert (source.threshold, source.num_candidates, source.sampling_steps) == (threshold, candidates, 20)
    assert (config.objective.beta, config.objective.clip, config.objective.guidance) == (10.0, 0.1, 5.0)


@pytest.mark.parametrize(
    ("family", "rank", "lr", "pairs", "low", "high"),
    [("sd15", 4, 6e-5, 40, 0.35, 0.5), ("sdxl", 64, 1e-5, 16, 0.45, 0.6)],
)
def test_lpo_is_as_published(family: str, rank: int, lr: float, pairs: int, low: float, high: float) -> None:
    config = load_config(CONFIGS[f"{family}/lpo_lora.yaml"])
    assert (config.tuning.rank, config.training.learning_rate, config.objective.beta) == (rank, lr, 500.0)
    assert effective_batch(config.training, processes=1) == pairs
    source = config.source
    assert (source.threshold, source.threshold_max, source.num_candidates, source.plain_steps) == (low, high, 4, 0)
    judge = load_config(CONFIGS[f"{family}/latent_judge.yaml"])
    assert effective_batch(judge.training, processes=1) == {"sd15": 128, "sdxl": 32}[family]
    assert (judge.training.learning_rate, judge.preference_model.guidance_scale) == (1e-5, 7.5)


@pytest.mark.parametrize(("family", "lr", "steps"), [("sd15", 3e-6, 8000), ("sdxl", 1e-6, 7000)])
def test_the_preference_models_published_recipe(family: str, lr: float, steps: int) -> None:
    config = load_config(CONFIGS[f"{family}/step_aware.yaml"])
    training = config.training
    assert effective_batch(training, processes=1) == 64
    assert (effective_lr(training, processes=1), training.max_train_steps) == (lr, steps)
    assert (training.adam_weight_decay, training.lr_warmup_steps, training.lr_scheduler) == (0.3, 500, "linear")
    assert (config.preference_model.relabel_with is not None) == (family == "sdxl")
    assert (config.preference_model.guidance_scale, config.preference_model.relabel_gap) == (5.0, 0.1)


def test_the_world_shows_most_objectives() -> None:
    configs = [load_config(path) for name, path in CONFIGS.items() if name.startswith("world/")]
    shown = {config.objective.name for config in configs if not isinstance(config, PreferenceModelConfig)}
    assert shown <= OBJECTIVES.keys()
    assert len(shown) == 21


# what the releases' own code says (its train scripts' transforms and prompt encoding), by config
FLIPPED = ("dpo_full", "sft_full", "inpo_full", "smpo_full", "mapo_full", "kto_full")
ENCODED_NULL = ("sdxl/dpo_full.yaml", "sdxl/inpo_full.yaml", "sdxl/smpo_full.yaml")


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.endswith("_full.yaml") and n.split("/")[0] != "world"])
def test_deviations_from_a_release_are_settings_or_said(name: str) -> None:
    path, stem = CONFIGS[name], Path(name).stem
    config, text = load_config(path), path.read_text()
    if stem == "seppo_full":
        assert "was not released" in text
        return
    assert config.data.random_flip == (stem in FLIPPED)
    assert config.data.random_flip or "No flip here" in text
    assert "Lanczos" in text
    assert (config.model.force_zeros_for_empty_prompt is False) == (name in ENCODED_NULL)
    constant = name.startswith("sdxl/") and stem != "mapo_full"  # MaPO's release passes true sizes
    assert ("the release always passes" in text) == constant
