"""Base against tuned models on the same prompts and seeds: pictures, scores, guards, grid, report.

out_dir/images/NAME-HASH/   the pictures of one model; HASH covers weights and sampling settings, so a second
                            evaluation reuses whatever has not changed
out_dir/scores.jsonl        every single score: model, run, prompt, seed
out_dir/result.json, table.txt, grid.png
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.data.table.prompts import unique
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare
from diffalign.evaluation.generate import PATHS, generate, settings_of
from diffalign.evaluation.grid import comparison_grid
from diffalign.evaluation.manifest import Picture
from diffalign.evaluation.report import BASE, Result, check_name
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scoring import write_rows
from diffalign.io.folder_lock import folder_lock
from diffalign.rewards import Scorer, load_scorer
from diffalign.rewards.base import check_prompts

RESULT_FILES = ("result.json", "table.txt", "scores.jsonl", "grid.png")


def evaluate(
    base: str,
    tuned: Mapping[str, str | Sequence[str]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    scorers: Sequence[str | Scorer],
    out_dir: str | Path,
    faithfulness: str | Scorer | None = None,
    sampling: Sampling | None = None,
    negative_tuned: Mapping[str, str | Sequence[str]] | None = None,
    user: Sequence[float] | None = None,
    tie: float | None = None,
    grid_rows: int = 8,
    progress: bool = True,
) -> Result:
    """Compare each model of `tuned` with `base` and write everything to `out_dir`.

    `tuned` maps a name to what `generate` takes as `tuned`, or to a list of them: training runs of one method that
    differ in their seed, reported as one line with runs resampled too. `negative_tuned` maps such a name to the weights
    of the unconditional branch of guidance (`generate`'s), one for all its runs or one for each; a name that `tuned`
    lacks is the base with that branch. `scorers` and `faithfulness` are names for `load_scorer` or scorers. `user` is
    the embedding of whom the tuned models draw for, where they have user attention; the base knows no users. `tie`
    replaces the scorers' own tie thresholds. The other arguments are `generate`'s.
    """
    if not scorers:
        raise DiffalignError("no scorer is named; give at least one, for example scorers=['pickscore']")
    models = _models(tuned, negative_tuned or {})
    if not models or BASE in models:
        raise DiffalignError(f"tuned models are named {list(models)}; name at least one, and none of them '{BASE}'")
    for name in models:
        check_name(name)
    sampling = sampling or Sampling()
    loaded = [_scorer(scorer, sampling.device) for scorer in scorers]
    faithful = _scorer(faithfulness, sampling.device) if faithfulness is not None else None
    folder = Path(out_dir)
    check_prompts([*loaded, faithful], prompts)
    prompts, seeds = unique(prompts), list(dict.fromkeys(int(seed) for seed in seeds))
    paths: dict[str, list[tuple[str | None, str | None]]] = {BASE: [(None, None)], **models}
    settings = {
        name: [
            settings_of(base, path, sampling, negative_tuned=away, user=user if path else None) for path, away in some
        ]
        for name, some in paths.items()
    }
    for name, some in settings.items():
        if len({_tag(one) for one in some}) < len(some):
            raise DiffalignError(f"two runs of '{name}' have the same weights: {paths[name]}; name each run once")
    with folder_lock(folder, "an evaluation"):
        pictures = {
            name: [
                generate(
                    base,
                    prompts,
                    seeds,
                    out_dir=folder / "images" / f"{name}-{_tag(settings[name][run])}",
                    tuned=path,
                    negative_tuned=away,
                    user=user if path else None,
                    sampling=sampling,
                    progress=progress,
                )
                for run, (path, away) in enumerate(some)
            ]
            for name, some in paths.items()
        }
        runs = {name: pictures[name] for name in models}
        result, rows = compare(pictures[BASE][0], runs, loaded, faithful, tie=tie, settings=settings, progress=progress)
        write_result(folder, result, rows, {name: some[0] for name, some in pictures.items()}, grid_rows)
    return result


def write_result(
    folder: Path,
    result: Result,
    rows: Sequence[dict[str, object]],
    pictures: Mapping[str, Sequence[Picture]],
    grid_rows: int = 8,
) -> None:
    """Writes a comparison: scores.jsonl, result.json, table.txt and, of some of the prompts, grid.png.

    pictures: by name what a column of the grid shows, the base first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "scores.jsonl", rows)
    result.write(folder / "result.json")
    (folder / "table.txt").write_text(result.table() + "\n", encoding="utf-8")
    prompts = result.prompts
    shown = prompts[:: max(1, -(-len(prompts) // grid_rows))] if grid_rows else []  # evenly over the list
    if shown:
        comparison_grid(shown, _cells(pictures, shown)).save(folder / "grid.png")


def _models(
    tuned: Mapping[str, str | Sequence[str]], negative: Mapping[str, str | Sequence[str]]
) -> dict[str, list[tuple[str | None, str | None]]]:
    """(tuned, negative_tuned) of every run by the model's name. Raises ValueError where their numbers do not match."""
    models: dict[str, list[tuple[str | None, str | None]]] = {}
    for name in (*tuned, *(name for name in negative if name not in tuned)):
        ours, away = _listed(tuned.get(name)), _listed(negative.get(name))
        if len(ours) != len(away) and len(ours) > 1 < len(away):
            raise DiffalignError(
                f"'{name}' has {len(ours)} tuned weights and {len(away)} negative ones; give one negative for all "
                "runs, or one for each"
            )
        count = max(len(ours), len(away))
        models[name] = list(zip(ours * (count // len(ours)), away * (count // len(away)), strict=True))
    return models


def _listed(some: str | Sequence[str] | None) -> list[str | None]:
    return [some] if some is None or isinstance(some, str) else list(some)


def _tag(settings: Mapping[str, Any]) -> str:
    """8 hex digits of all that a picture depends on; paths do not count, the weights found there do."""
    known = {key: value for key, value in settings.items() if key not in PATHS and (key, value) != ("user", None)}
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=4).hexdigest()


def _scorer(scorer: str | Scorer, device: str) -> Scorer:
    return load_scorer(scorer, device) if isinstance(scorer, str) else scorer


def _cells(pictures: Mapping[str, Sequence[Picture]], prompts: Sequence[str]) -> dict[str, list[Image.Image]]:
    """Of each prompt the first column's first seed, in every column."""
    first: dict[str, int] = {}
    for picture in next(iter(pictures.values())):
        first.setdefault(picture.prompt, picture.seed)
    columns = {name: {(p.prompt, p.seed): p for p in some} for name, some in pictures.items()}
    return {name: [found[prompt, first[prompt]].open() for prompt in prompts] for name, found in columns.items()}
