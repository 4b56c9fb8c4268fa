"""Every packaged config is built and takes its dry run, with small models of its family and the world's pairs.

What a test cannot have is replaced, and nothing else: weights, pairs, prompts, scorers, an optimiser that CUDA has,
more than one worker that reads images, and most substeps of an inversion.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.cli.main import main
from diffalign.config.schema import PreferenceModelConfig, load_config
from diffalign.engine.schedule import NoiseSchedule
from diffalign.objectives.inpo import steps_fit
from diffalign.objectives.inversion_dpo import InversionDPO
from tests.gpu_models import SDXL_SCHEDULER
from tests.test_training_configs import CONFIGS, EMBEDDED, PACKAGED

ROOT = Path(__file__).parent.parent
WORLD = ROOT / "assets" / "world"
JUDGE = "tests.sources.judges:Brightness"


def replaced(name: str, folder: Path, request: pytest.FixtureRequest) -> list[str]:
    """The overrides of a config for a run without downloads."""
    config = load_config(CONFIGS[name])
    source = None if isinstance(config, PreferenceModelConfig) else config.source
    changes = [f"output_dir={folder}", "data.max_pairs=40"]
    if getattr(source, "prompts_per_round", 0) > 40:
        changes.append("source.prompts_per_round=32")
    if name.startswith(EMBEDDED):
        return changes
    base = request.getfixturevalue("tiny_sd" if name.startswith("sd15/") else "tiny_sdxl")
    prompts = source is not None and source.data == "prompts"
    changes += [
        f"model.pretrained_model_name_or_path={base}",
        "model.pretrained_vae_model_name_or_path=null",
        "model.variant=null",
        f"data.path={WORLD / ('train.txt' if prompts else 'pairs/renders.parquet')}",
        "data.resolution=32",
    ]
    if config.training.optimizer == "adamw_8bit":
        changes.append("training.optimizer=adamw")
    if config.data.dataloader_num_workers > 1:
        changes.append("data.dataloader_num_workers=1")  # eight processes would begin for one pair
    objective = getattr(config, "objective", None)
    if isinstance(objective, InversionDPO):  # up to 80 forwards, of which a quarter take the same loop
        steps_fit(NoiseSchedule.from_config(SDXL_SCHEDULER), objective.steps * objective.substeps)
        changes.append(f"objective.substeps={max(objective.substeps // 4, 1)}")
    if hasattr(source, "scorer"):
        changes.append(f"source.scorer={JUDGE}")
    if isinstance(config, PreferenceModelConfig) and config.preference_model.kind == "latent":
        changes.append("preference_model.text_projection=null")
    elif isinstance(config, PreferenceModelConfig):
        clip = WORLD / "judge" / "clip"
        changes += [f"preference_model.pretrained_model_name_or_path={clip}", f"preference_model.tokenizer={clip}"]
        if config.preference_model.relabel_with is not None:
            changes.append(f"preference_model.relabel_with={JUDGE}")
    return changes


@pytest.mark.parametrize("name", CONFIGS)
def test_builds_and_takes_a_step(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check", str(CONFIGS[name]), *replaced(name, tmp_path / "out", request)])
    said = capsys.readouterr().out
    assert "dry run" in said
    assert "gradient norm" in said or "beyond fp16's range" in said
    assert not (tmp_path / "out").exists()  # a dry run leaves nothing behind


def test_none_is_left_out() -> None:
    assert len(CONFIGS) == PACKAGED >= 52
