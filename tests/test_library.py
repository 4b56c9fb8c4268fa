"""The library's public names: what a script or notebook imports, and that it runs as `diffalign train` does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

import diffalign
from diffalign import (
    DiffalignError,
    DiffusionDPO,
    FullFineTuning,
    LoRA,
    Trainer,
    TrainingArguments,
    load_pairs,
)
from diffalign.config.schema import load_config
from diffalign.training.run import run_training
from diffalign.world import base_path, pairs_path

LORA = "pytorch_lora_weights.safetensors"


def arguments(folder: Path, **settings: object) -> TrainingArguments:
    return TrainingArguments(
        **{  # type: ignore[arg-type]
            "output_dir": str(folder),
            "max_train_steps": 2,
            "train_batch_size": 2,
            "report_to": "none",
            "logging_steps": 1,
            **settings,
        }
    )


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, diffalign; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    assert all(getattr(diffalign, name) is not None for name in diffalign.__all__)
    assert set(diffalign.__all__) <= set(dir(diffalign))
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = diffalign.Trainr


def test_a_run_from_python_is_the_run_of_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        model=base_path(),
        objective=DiffusionDPO(beta=2000.0),
        train_dataset=load_pairs(pairs_path(), resolution=16, max_pairs=4),
        tuning=LoRA(rank=2),
        args=arguments(tmp_path / "python", learning_rate=1e-3),
    )
    last = trainer.train()
    ends = capsys.readouterr().out.splitlines()[-4:]  # as `diffalign train` ends before its next commands
    assert [line.split()[0] for line in ends] == ["loss", "accuracy", "health", "page"]
    assert ends[-1] == f"      page  {tmp_path / 'python/run.html'}"
    first = lines(tmp_path / "python")[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["grad_norm"] > 0
    assert last["loss"] != first["loss"]
    config = load_config(tmp_path / "python/config.yaml", [f"output_dir={tmp_path / 'yaml'}"])
    run_training(config)  # type: ignore[arg-type]
    one, two = load_file(tmp_path / "python" / LORA), load_file(tmp_path / "yaml" / LORA)
    assert all(torch.equal(one[name], two[name]) for name in one)
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / LORA)
    assert all(torch.equal(one[name], saved[name]) for name in one)


def test_an_open_pipeline_and_a_data_set_object_train_as_paths_do(tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base_path())
    rows = Dataset.from_parquet(str(pairs_path()), cache_dir=str(tmp_path / "cache")).select(range(4))
    shared = {"resolution": 16, "max_pairs": 4}
    objects = Trainer(
        pipeline, "dpo", load_pairs(rows, **shared), arguments(tmp_path / "objects"), tuning=FullFineTuning()
    )
    objects.train()
    paths = Trainer(
        str(base_path()),
        DiffusionDPO(),
        load_pairs(pairs_path(), **shared),
        arguments(tmp_path / "paths"),
        tuning=FullFineTuning(),
    )
    paths.train()
    assert [line["loss"] for line in lines(tmp_path / "objects")] == [
        line["loss"] for line in lines(tmp_path / "paths")
    ]
    tuned = load_file(tmp_path / "paths/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, tuned[name]) for name, weight in pipeline.unet.state_dict().items())  # in place
    with pytest.raises(DiffalignError, match="given as an open pipeline"):
        objects.generate(["a red circle on a blue background"])


def test_rows_may_hold_images() -> None:
    from PIL import Image

    one, two = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    pairs = load_pairs([{"prompt": "a red circle", "chosen": one, "rejected": two}])
    assert len(pairs) == 1
    assert pairs.table[0].chosen.open().getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": "dpoo"}, r"no objective is called 'dpoo'; did you mean 'dpo'\?"),
        ({"objective": "no.such.module:Loss"}, "there is no module 'no'"),
        ({"objective": "diffalign.objectives.dpo:DPO"}, "diffalign.objectives.dpo has no 'DPO'"),
        ({"objective": "diffalign.types_that_are_not:X"}, "there is no module"),
        ({"objective": "fractions:Fraction"}, "'fractions:Fraction' is not a dataclass"),
        ({"train_dataset": 3}, "cannot be read from builtins.int; give a path"),
        ({"model": object()}, "object has no unet, vae, scheduler"),
        ({"validation": {"promts": ["a"]}}, "promts: unknown key; did you mean 'prompts'"),
        ({"tuning": LoRA(rank=0)}, "rank: Input should be greater than or equal to 1, got 0"),
    ],
)
def test_a_mistake_is_named_before_anything_is_loaded(change: dict[str, object], said: str, tmp_path: Path) -> None:
    settings: dict[str, object] = {"model": base_path(), "objective": "dpo", "train_dataset": "x", **change}
    with pytest.raises(DiffalignError, match=said):
        Trainer(args=arguments(tmp_path / "run"), **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_setting_of_load_pairs_that_does_not_exist_is_named() -> None:
    with pytest.raises(DiffalignError, match="load_pairs: resolutoin: unknown key; did you mean 'resolution'"):
        load_pairs(pairs_path(), resolutoin=16)


def test_a_pipeline_in_half_precision_is_refused() -> None:
    pipeline: DiffusionPipeline = StableDiffusionXLPipeline.from_pretrained(base_path()).to(torch.float16)
    with pytest.raises(DiffalignError, match=r"UNet is torch.float16; load it in torch.float32"):
        Trainer(pipeline, "dpo", "x", TrainingArguments(output_dir="x"))


def test_the_snippet_of_the_readme_trains(tmp_path: Path) -> None:
    """As it is printed there, but for the model, the pairs and the length."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    snippet = readme.partition("```python\n")[2].partition("```")[0]
    for there, here in {
        '"stabilityai/stable-diffusion-xl-base-1.0"': repr(str(base_path())),
        '"my/pairs"': repr(str(pairs_path())),
        '"runs/mine"': repr(str(tmp_path / "run")),
        "max_train_steps=500": "max_train_steps=1",
    }.items():
        assert there in snippet
        snippet = snippet.replace(there, here)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "run" / LORA).is_file()
