"""What a campaign of kills runs: every kind of run and of long command, at the size of a test.

A kind is a command of `diffalign` on inputs that `prepare` writes once. `{inputs}` is their folder; the command writes
below its working folder, most into `out`. A training run is continued by its own command (the docs recommend
`resume_from_checkpoint=latest` for jobs that may be killed), the other commands likewise, with `--overwrite` where a
finished file would be refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.forked import in_child, run_forked
from benchmarks.models import pairs_file

JUDGE = "tests.sources.judges:Brightness"
SAMPLES = "--prompts {inputs}/prompts.txt --limit 3 --seeds 0-1 --steps 2 --resolution 32 --batch 2 --device cpu"
ROUND = {
    "scorer": JUDGE,
    "prompts_per_round": 4,
    "sampling_steps": 2,
    "keep_rounds": True,
}


@dataclass(frozen=True)
class Kind:
    """One line of the table."""

    command: str = "train {inputs}/{name}.yaml"
    again: str = ""  # words that continuing adds
    settings: Mapping[str, Any] = field(default_factory=dict)  # of a training run, beside `SHARED`
    processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)  # of the processes
    finished: str = ""  # words of the refusal to replace what a finished command left
    copied: tuple[str, ...] = ()  # inputs that the command writes into: each attempt has its own

    def words(self, name: str, inputs: Path) -> list[str]:
        """The command line."""
        return self.command.format(inputs=inputs, name=slug(name)).split()


def slug(name: str) -> str:
    """A file's name for a kind's."""
    return "".join(c if c.isalnum() else "_" for c in name)


SHARED: dict[str, Any] = {
    "output_dir": "out",
    "tuning": {"method": "lora", "rank": 2, "alpha": 2},
    "objective": {"name": "dpo", "beta": 500.0},
    "data": {"resolution": 32},
    "training": {
        "max_train_steps": 8,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "mixed_precision": "no",
        "resume_from_checkpoint": "latest",
    },
}
FULL = {"tuning": {"method": "full"}}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CACHED = {"cache_dir": "cache", "cache_variants": 1}

KINDS: dict[str, Kind] = {
    "train, LoRA": Kind(),
    "train, all weights, EMA, accumulation": Kind(
        settings={**FULL, "training": {"ema_decay": 0.9, "gradient_accumulation_steps": 2, "train_batch_size": 1}}
    ),
    "train, two checkpoints at most, two loader workers": Kind(
        settings={"training": {"checkpoints_total_limit": 2}, "data": {"dataloader_num_workers": 2}}
    ),
    "train, caching latents and the reference's errors": Kind(
        settings={"data": {**CACHED, "cache_reference_errors": True, "draws_per_pair": 2}}
    ),
    "train, caching trajectories (Inversion-DPO, two-pass)": Kind(
        settings={
            "objective": {"name": "inversion_dpo", "beta": 500, "steps": 4, "substeps": 1, "points_per_step": 2},
            "data": {**CACHED, "cache_trajectories": True},
        }
    ),
    "train, InPO": Kind(settings={"objective": {"name": "inpo", "beta": 500}}),
    "train, held-out pairs, early stopping, best weights": Kind(
        settings={
            "validation": {
                "pairs": 0.25,
                "pairs_every": 1,
                "early_stopping_patience": 5,
                "early_stopping_confidence": None,
                "load_best_model_at_end": True,
                "metric_for_best_model": "loss",
            }
        }
    ),
    "train, validation images": Kind(
        settings={
            "validation": {"prompts": ["a red circle"], "every": 2, "num_inference_steps": 2},
            "training": {"max_train_steps": 6},
        }
    ),
    "train, online SPO": Kind(
        settings={
            "objective": {"name": "spo"},
            "source": {"name": "rollout", **ROUND, "sampling_steps": 4, "plain_steps": 2, "threshold": 0.0},
            "data": {"path": "{inputs}/prompts.txt"},
        }
    ),
    "train, online pairs": Kind(
        settings={
            "source": {"name": "online_pairs", **ROUND, "samples_per_prompt": 2, "min_gap": 0.0},
            "data": {"path": "{inputs}/prompts.txt"},
        }
    ),
    "train, self-play": Kind(
        settings={
            "objective": {"name": "seppo", "beta": 500.0},
            "source": {
                "name": "selfplay",
                "updates_per_iteration": 2,
                "images_per_iteration": 4,
                "sampling_steps": 2,
                "generation_batch_size": 4,
            },
        }
    ),
    "train, preference model": Kind(
        settings={
            "tuning": None,
            "objective": None,
            "preference_model": {"pretrained_model_name_or_path": "{inputs}/clip"},
        }
    ),
    "train, two processes": Kind(processes=2),
    "train, two processes, all weights, EMA, cache": Kind(
        processes=2, settings={**FULL, "data": CACHED, "training": {"ema_decay": 0.9}}
    ),
    "train, two processes, online pairs": Kind(
        processes=2,
        settings={
            "source": {"name": "online_pairs", **ROUND, "samples_per_prompt": 2, "min_gap": 0.0},
            "data": {"path": "{inputs}/prompts.txt"},
        },
    ),
    "train, asynchronous checkpoints": Kind(
        settings={"training": {"async_checkpoints": True, "checkpoints_total_limit": 1}}
    ),
    "train, two processes, FSDP2": Kind(processes=2, settings=FULL, environment=FSDP2),
    "train, two processes, FSDP2, LoRA, EMA, cache": Kind(
        processes=2, settings={"data": CACHED, "training": {"ema_decay": 0.9}}, environment=FSDP2
    ),
    "encode": Kind("encode {inputs}/{name}.yaml", settings={"data": {**CACHED, "cache_variants": 1}}),
    "encode, two processes": Kind("encode {inputs}/{name}.yaml", processes=2, settings={"data": CACHED}),
    "data world": Kind("data world pairs.parquet --pairs 64", again="--overwrite"),
    "data world, folder": Kind("data world pairs --pairs 24", finished="is not an empty folder"),
    "data score": Kind(f"data score {{inputs}}/pairs.parquet --scorer {JUDGE} --out scores.jsonl --device cpu"),
    "data check": Kind(
        "data check {inputs}/pairs.parquet --full --sample sheet.png --json report.json", again="--overwrite"
    ),
    "data doubtful": Kind("data doubtful {inputs}/run --out doubtful.csv --page doubtful.html", again="--overwrite"),
    "calibrate": Kind(
        "calibrate {inputs}/{name}.yaml --steps 4 --pairs 8 --json calibration.json", again="--overwrite"
    ),
    "generate": Kind(f"generate {{inputs}}/base --tuned {{inputs}}/run --out out {SAMPLES}"),
    "evaluate": Kind(
        f"evaluate {{inputs}}/base --tuned dpo={{inputs}}/run --scorer {JUDGE} --out out --page page.html {SAMPLES}",
        again="--overwrite",
    ),
    "gallery": Kind(
        f"gallery {{inputs}}/base --tuned dpo={{inputs}}/run --strengths 0,1 --scorer {JUDGE} --out out {SAMPLES}",
        again="--overwrite",
    ),
    "score": Kind(f"score images --scorer {JUDGE} --device cpu", again="--overwrite", copied=("images",)),
    "label": Kind(
        f"label images --scorer {JUDGE} --device cpu --out pairs.parquet", again="--overwrite", copied=("images",)
    ),
    "compare": Kind(
        f"compare {{inputs}}/images dpo={{inputs}}/tuned_images --scorer {JUDGE} --out out", again="--overwrite"
    ),
    "export": Kind("export {inputs}/run --to kohya --out lora.safetensors", again="--overwrite"),
    "export, single file": Kind("export {inputs}/run --to single-file --out whole.safetensors", again="--overwrite"),
    "merge": Kind("merge {inputs}/base out {inputs}/run=0.5 {inputs}/run=0.25", finished="already contains"),
    "card": Kind("card run", again="--overwrite", copied=("run",)),
}


def config_of(kind: Kind, inputs: Path) -> dict[str, Any]:
    """The config of a kind of run."""
    tree = json.loads(json.dumps(SHARED))
    tree["model"] = {"pretrained_model_name_or_path": str(inputs / "base"), "gradient_checkpointing": "none"}
    tree["data"]["path"] = str(inputs / "pairs.parquet")
    settings = json.loads(json.dumps(dict(kind.settings)).replace("{inputs}", str(inputs)))
    for section, values in settings.items():
        if values is None:
            del tree[section]
        elif section in ("data", "training"):
            tree[section].update(values)
        else:
            tree[section] = values
    if "preference_model" in settings:
        del tree["model"]["gradient_checkpointing"]
    return tree


def prepare(inputs: Path, kinds: Mapping[str, Kind]) -> None:
    """Writes what the commands read, in children: this process must stay without threads, as it forks."""
    inputs.mkdir(parents=True)
    in_child(lambda: _write_inputs(inputs, kinds))
    samples = SAMPLES.format(inputs=inputs).split()
    for words in (
        ["train", "run.yaml", "output_dir=run"],
        ["generate", "base", "--out", "images", *samples],
        ["generate", "base", "--tuned", "run", "--out", "tuned_images", *samples],
    ):
        if (ended := run_forked(words, inputs)).code:
            raise RuntimeError(f"{words}: {ended.log.read_text()[-2000:]}")


def _write_inputs(inputs: Path, kinds: Mapping[str, Kind]) -> None:
    import yaml

    from diffalign.contrib.step_aware import world_judge
    from tests.tiny import make_tiny

    make_tiny(inputs / "base", "sd")
    world_judge.untrained(0).save_pretrained(inputs / "clip")
    world_judge.words().save_pretrained(inputs / "clip")
    pairs_file(inputs / "pairs.parquet", 12, 32)
    prompts = ("a red circle", "a blue square", "a photo", "the large square", "a green circle")
    (inputs / "prompts.txt").write_text("\n".join(prompts))
    for name, kind in {"run": Kind(), **kinds}.items():
        (inputs / f"{slug(name)}.yaml").write_text(yaml.safe_dump(config_of(kind, inputs)))
