"""Configs, schedules, and small files of a run: prompts, users, scores, manifests, checkpoints."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from diffalign.config.schema import load_config, packaged_configs, save_config
from diffalign.data.table.prompts import read_prompts
from diffalign.data.table.scores import read_scores
from diffalign.data.table.users import open_users, parse_mixture
from diffalign.engine.schedule import NoiseSchedule
from diffalign.evaluation.manifest import read_image_manifest
from diffalign.evaluation.scoring import score_folder
from diffalign.rewards import load_scorer
from diffalign.training.checkpoints.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_source_state,
    load_training_state,
    save_checkpoint,
)
from tests.data.helpers import png
from tests.fuzz.harness import Run
from tests.fuzz.odd import as_bytes, damaged, json_text, mutated, scalar, value

SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "rescale_betas_zero_snr": False,
}


@cache
def _configs() -> list[tuple[str, dict[str, Any]]]:
    texts = [file.read_text(encoding="utf-8") for file, _ in packaged_configs()]
    return [(text, yaml.safe_load(text)) for text in texts]


def config(rng: Random, folder: Path) -> Run:
    """A packaged config with other values, keys and bytes."""
    text, tree = rng.choice(_configs())
    if rng.random() < 0.7:
        changed = mutated(rng, tree, rng.randrange(1, 4))
        data = as_bytes(yaml.safe_dump(changed, allow_unicode=rng.random() < 0.5, sort_keys=False))
    else:
        lines = text.splitlines(keepends=True)
        if rng.random() < 0.3:  # a section or a line given twice
            lines += lines[rng.randrange(len(lines)) :]
        data = damaged(rng, "".join(lines).encode())
    return _loads(folder, data, [])


def override(rng: Random, folder: Path) -> Run:
    """A packaged config with odd words of the command line."""
    text, tree = rng.choice(_configs())
    names = [f"{section}.{key}" for section, keys in tree.items() if isinstance(keys, dict) for key in keys]
    words = []
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice((*names, *tree, "training.learning_rate", "tuning.rank", "objective.beta", str(scalar(rng))))
        odd = rng.choice((str(scalar(rng)), str(value(rng)), repr(scalar(rng))))
        words.append(rng.choice((f"{name}={odd}", f"{name} = {odd}", f"{name}:{odd}", f"{name}=={odd}", name, odd)))
    return _loads(folder, text.encode(), words)


def _loads(folder: Path, data: bytes, words: list[str]) -> Run:
    file = folder / "config.yaml"
    file.write_bytes(data)

    def run() -> Any:
        found = load_config(file, words)
        save_config(found, folder / "again.yaml")
        again = load_config(folder / "again.yaml")
        assert again.resolved() == found.resolved(), "a saved config comes back as another"
        return found.resolved()

    return run


def schedule(rng: Random, folder: Path) -> Run:
    """A scheduler's config."""
    tree = mutated(rng, SCHEDULE, rng.randrange(1, 4))

    def run() -> Any:
        made = NoiseSchedule.from_config(tree)
        ends = torch.tensor([0, made.num_train_timesteps - 1])
        noisy = made.add_noise(torch.ones(2, 1), torch.ones(2, 1), ends)
        return made.alphas_cumprod, made.final_alpha_cumprod, noisy

    return run


def prompts(rng: Random, folder: Path) -> Run:
    """A file of prompts, or what is given in its place."""
    rows = [{"prompt": f"a fox {i}", "n": i} for i in range(3)]
    suffix = rng.choice((".txt", ".jsonl", ".csv", ".parquet", ".TXT", ".json", ""))
    file = folder / f"prompts{suffix}"
    if suffix == ".parquet":
        _parquet(rng, file, mutated(rng, rows, 2))
    elif suffix == ".jsonl":
        file.write_bytes(as_bytes("".join(json_text(row) + "\n" for row in mutated(rng, rows, 2))))
    elif suffix == ".csv":
        file.write_bytes(as_bytes("prompt,n\n" + "".join(f"{value(rng)},{i}\n" for i in range(3))))
    else:
        file.write_bytes(as_bytes("\n".join(str(value(rng)) for _ in range(3))))
    if rng.random() < 0.4:
        file.write_bytes(damaged(rng, file.read_bytes()))
    name = rng.choice((str(file), str(file), str(file), str(scalar(rng)), str(folder), str(file) + "x"))
    limit = rng.choice((None, None, 1, 0, -1))

    def run() -> Any:
        found = read_prompts(name, limit=limit)
        assert found, "no prompt, without a word"
        assert all(prompt.strip() for prompt in found), f"a blank prompt: {found}"
        assert all(prompt.encode() for prompt in found)

    return run


def _parquet(rng: Random, file: Path, rows: Any) -> None:
    """Rows as parquet where arrow can hold them; as text under that name where it cannot."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.Table.from_pylist(rows), file)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        file.write_bytes(as_bytes(json_text(rows)))


def users(rng: Random, folder: Path) -> Run:
    """A file of users' embeddings, and a mixture of them."""
    rows: dict[str, Any] = {f"u{i}": [0.1 * i, 1.0, -1.0] for i in range(3)}
    suffix = rng.choice((".json", ".json", ".parquet", ".safetensors", ".txt"))
    file = folder / f"users{suffix}"
    if suffix == ".parquet":
        _parquet(rng, file, mutated(rng, [{"user": k, "embedding": v} for k, v in rows.items()], 2))
    elif suffix == ".safetensors":
        odd = float(rng.choice((0.0, float("nan"), float("inf"), 1.0)))
        save_file({name: torch.full((rng.choice((3, 3, 3, 2)),), odd) for name in rows}, file)
    else:
        file.write_bytes(as_bytes(json_text(mutated(rng, rows, 2))))
    if rng.random() < 0.3:
        file.write_bytes(damaged(rng, file.read_bytes()))
    words = rng.choice((["u0"], ["u0", "u1=2"], [f"u0={scalar(rng)}"], [str(scalar(rng))], ["u1=0"], []))

    def run() -> Any:
        found = open_users(file)
        return found.embeddings, found.mixed(parse_mixture(words)) if words else 0

    return run


def scores(rng: Random, folder: Path) -> Run:
    """A file of scores; an image that could not be read has null."""
    rows: list[Any] = [{"scorer": "world"}, *({"id": f"a{i}", "score_0": 0.1 * i, "score_1": None} for i in range(3))]
    data = as_bytes("".join(json_text(row) + "\n" for row in mutated(rng, rows, 2)))
    file = folder / "scores.jsonl"
    file.write_bytes(damaged(rng, data) if rng.random() < 0.4 else data)

    def run() -> Any:
        found = read_scores(file, rng.choice((None, "world")))
        return [0.0 if number != number else number for pair in found.values() for number in pair]  # nan: not read

    return run


def manifest(rng: Random, folder: Path) -> Run:
    """A folder of images whose manifest or files are odd."""
    rows: list[Any] = []
    for seed in range(2):
        (folder / f"{seed}.png").write_bytes(png(seed, (16, 16)))
        rows.append({"file": f"{seed}.png", "prompt": "a red circle on a grey background", "seed": seed})
    data = as_bytes("".join(json_text(row) + "\n" for row in mutated(rng, rows, rng.randrange(3))))
    (folder / "manifest.jsonl").write_bytes(damaged(rng, data) if rng.random() < 0.3 else data)
    if rng.random() < 0.3:
        (folder / "0.png").write_bytes(damaged(rng, png(0, (16, 16))))
    if rng.random() < 0.5:
        return lambda: [picture.seed for picture in read_image_manifest(folder, complete=rng.random() < 0.5)]
    return lambda: score_folder(folder, [load_scorer("world")])


def checkpoint(rng: Random, folder: Path) -> Run:
    """A run's folder of two checkpoints with damage to files."""
    for step in (1, 2):
        state = {"x": torch.full((4,), float(step))}
        content = Checkpoint(
            step, lambda to: save_file({"w": torch.ones(3)}, to / "w.safetensors"), state, {"round": step}
        )
        save_checkpoint(folder, content)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for file in rng.sample(files, rng.randrange(1, 4)):
        how = rng.random()
        if how < 0.15:
            file.unlink()
        elif how < 0.2:
            file.unlink()
            file.mkdir()
        elif file.suffix == ".json" and how < 0.6:
            file.write_bytes(as_bytes(json_text(mutated(rng, yaml.safe_load(file.read_text()), 2))))
        else:
            file.write_bytes(damaged(rng, file.read_bytes()))
    if rng.random() < 0.1:
        shutil.rmtree(folder / "checkpoint-2")
    wanted = rng.choice(("latest", "latest", "latest", "checkpoint-1", "checkpoint-2", str(scalar(rng))))

    def run() -> Any:
        found = find_checkpoint(folder, wanted)
        if found is None:
            return 0
        state = load_training_state(found)
        assert torch.equal(state["x"], torch.full((4,), float(state["step"]))), "other weights than were saved"
        return state, load_source_state(found)

    return run
