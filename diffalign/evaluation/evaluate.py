"""Base against tuned models on the same prompts and seeds: images, scores, guards, grid, report.

out_dir/images/NAME-HASH/   the images of one model; HASH covers weights and sampling settings, so a second
                            evaluation reuses whatever has not changed
out_dir/scores.jsonl        every single score: model, run, prompt, seed
out_dir/result.json, table.txt, grid.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffalign.data.table.prompts import prompts_of
from diffalign.errors import DiffalignError
from diffalign.evaluation.compare import compare
from diffalign.evaluation.generate import generate_by
from diffalign.evaluation.grid import comparison_grid
from diffalign.evaluation.manifest import GeneratedImage
from diffalign.evaluation.recipe import ImageRecipe, Tuned, as_tuned
from diffalign.evaluation.report import BASE, Result, check_name, run_title
from diffalign.evaluation.sampling import Sampling
from diffalign.evaluation.scoring import Scoring, load_judges, write_rows
from diffalign.io.files import save_text, written_whole
from diffalign.io.folder_lock import folder_lock
from diffalign.rewards import Scorer
from diffalign.rewards.base import check_prompts

RESULT_FILES = ("result.json", "table.txt", "scores.jsonl", "grid.png")
GRID_ROWS = 8  # prompts in the grid, at most

Weights = str | Path | Tuned


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found and generated."""

    result: Result
    rows: list[dict[str, object]]  # of scores.jsonl
    images: dict[str, list[list[GeneratedImage]]]  # by model, the base first: those of each run


def evaluate(
    base: str,
    tuned: Mapping[str, Weights | Sequence[Weights]],
    prompts: str | Sequence[str],
    seeds: Sequence[int],
    *,
    scorers: Sequence[str | Scorer] | Scoring,
    out_dir: str | Path,
    sampling: Sampling | None = None,
) -> Result:
    """Compare each model of `tuned` with `base` and write everything to `out_dir`.

    `tuned` maps a name to what `generate` takes as `tuned`, or to a list of them: training runs of one method that
    differ in their seed, reported as one line with runs resampled too. `scorers` are names for `load_scorer` or
    scorers; a `Scoring` also names the faithfulness scorer and the tie threshold. The other arguments are `generate`'s.
    """
    return evaluation(base, tuned, prompts, seeds, scorers=scorers, out_dir=out_dir, sampling=sampling).result


def evaluation(
    base: str,
    tuned: Mapping[str, Weights | Sequence[Weights]],
    prompts: str | Sequence[str],
    seeds: Sequence[int],
    *,
    scorers: Sequence[str | Scorer] | Scoring,
    out_dir: str | Path,
    sampling: Sampling | None = None,
) -> Evaluation:
    """`evaluate`, with every score and image besides the result."""
    prompts = prompts_of(prompts)
    models = {name: [as_tuned(one) for one in _listed(some)] for name, some in tuned.items()}
    if not models or BASE in models:
        raise DiffalignError(f"tuned models are named {list(models)}; name at least one, and none of them '{BASE}'")
    for name in models:
        check_name(name)
    if not len(prompts) or not len(seeds):
        raise DiffalignError(f"{len(prompts)} prompts and {len(seeds)} seeds: give at least one of each")
    sampling, folder = sampling or Sampling(), Path(out_dir)
    judges = load_judges(scorers, sampling.device)
    check_prompts(judges.every, prompts)
    recipes = {
        name: [ImageRecipe(base, one, sampling) for one in some] for name, some in {BASE: [Tuned()], **models}.items()
    }
    for name, some in recipes.items():
        if len({recipe.tag for recipe in some}) < len(some):
            paths = [str(recipe.tuned.path) for recipe in some]
            raise DiffalignError(f"two runs of '{name}' have the same weights: {paths}; name each run once")
    with folder_lock(folder, "an evaluation"):
        images = {
            name: [
                generate_by(
                    one,
                    prompts,
                    seeds,
                    folder / "images" / f"{name}-{one.tag}",
                    title=run_title(name, run, len(some)),
                )
                for run, one in enumerate(some, 1)
            ]
            for name, some in recipes.items()
        }
        settings = {name: [recipe.settings for recipe in some] for name, some in recipes.items()}
        runs = {name: images[name] for name in models}
        result, rows = compare(images[BASE][0], runs, judges, settings=settings)
        write_result(folder, result, rows, {name: some[0] for name, some in images.items()})
    return Evaluation(result, rows, images)


def write_result(
    folder: Path, result: Result, rows: Sequence[dict[str, object]], columns: Mapping[str, Sequence[GeneratedImage]]
) -> None:
    """Writes a comparison: scores.jsonl, result.json, table.txt and, of some of the prompts, grid.png.

    columns: by name the images that a column of the grid shows, the base first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "scores.jsonl", rows)
    result.write(folder / "result.json")
    save_text(folder / "table.txt", result.table() + "\n")
    shown = result.prompts[:: max(1, -(-len(result.prompts) // GRID_ROWS))]  # evenly over the list
    with written_whole(folder / "grid.png") as partial:
        comparison_grid(shown, _cells(columns, shown)).save(partial, "PNG")


def _listed(some: Weights | Sequence[Weights]) -> Sequence[Weights]:
    return [some] if isinstance(some, Weights) else some


def _cells(columns: Mapping[str, Sequence[GeneratedImage]], prompts: Sequence[str]) -> dict[str, list[Image.Image]]:
    """Of each prompt the first column's first seed, in every column."""
    first: dict[str, int] = {}
    for image in next(iter(columns.values())):
        first.setdefault(image.prompt, image.seed)
    found = {name: {(one.prompt, one.seed): one for one in some} for name, some in columns.items()}
    return {name: [images[prompt, first[prompt]].open() for prompt in prompts] for name, images in found.items()}
