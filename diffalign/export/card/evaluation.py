"""An evaluation of the weights that a card is of: its table, and a strip of pictures before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from diffalign.errors import DiffalignError
from diffalign.evaluation.grid import FONT, GAP, INK, PAPER, fit
from diffalign.evaluation.manifest import GeneratedImage, read_image_manifest
from diffalign.evaluation.recipe import tag_of, weights_fingerprint
from diffalign.evaluation.report import BASE
from diffalign.export.names import ExportError
from diffalign.export.tuned_run import TunedRun

RESULT = "result.json"
STRIP = "before_after.jpg"
SHOWN = 5  # prompts in the strip, at most
CELL = 176  # pixels per side of an image in the strip, at most
LABEL = 56  # width of the strip's first column


@dataclass(frozen=True)
class Evaluation:
    """A folder that `diffalign evaluate` wrote, and the model in it that has the card's weights."""

    folder: Path
    result: dict[str, Any]
    model: str

    @property
    def prompts(self) -> list[str]:
        """All prompts."""
        return list(self.result["prompts"])

    def tags(self, model: str) -> list[str]:
        """The hashes in the names of a model's image folders, one for each of its runs."""
        return [tag_of(settings) for settings in self.result["settings"].get(model, [])]


def read_evaluation(folder: Path, run: TunedRun) -> Evaluation:
    """The evaluation in a folder. Raises ExportError where it is none, or measured other weights than the run's."""
    result, measured = _read(folder)
    found = _of_weights(folder, result, measured, weights_fingerprint(run.tuned.path))
    if found is None:
        raise ExportError(
            f"{folder / RESULT} measured other weights ({', '.join(measured)}) than those at {run.tuned.path}: "
            "evaluate these, or name the folder of their evaluation"
        )
    return found


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, list[str | None]]]:
    """The result in a folder, and the fingerprints of the weights of each model. Raises ExportError."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        settings = {model["name"]: result["settings"][model["name"]] for model in result["models"]}
        measured = {name: [_alone(one) for one in some] for name, some in settings.items()}
        _ = result["prompts"], result["seeds"], result["versions"]
    except FileNotFoundError:
        raise ExportError(f"{folder} has no {RESULT}: name the folder that `diffalign evaluate --out` wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ExportError(f"{folder / RESULT} is not the result of `diffalign evaluate` ({error!r})") from None
    return result, measured


def _of_weights(
    folder: Path, result: dict[str, Any], measured: Mapping[str, Sequence[str | None]], mine: str
) -> Evaluation | None:
    model = next((name for name, found in measured.items() if mine in found), None)
    return None if model is None else Evaluation(folder, result, model)


def _alone(settings: Mapping[str, Any]) -> str | None:
    """The fingerprint of the weights that made a model's images; None where they were not used alone and whole."""
    whole = settings.get("strength") in (None, 1, 1.0) and not settings.get("negative_tuned")
    return str(settings["fingerprint"].get("tuned")) if whole else None


def find_evaluations(run: TunedRun) -> list[Evaluation]:
    """The evaluations of these weights in the folders of `searched_in`, the newest first.

    An evaluation records the fingerprint of the weights that it measured: those of others are not taken.
    """
    places = {file.resolve(): file for folder in searched_in(run) for file in sorted(folder.glob(f"*/{RESULT}"))}
    found, mine = [], ""
    for file in sorted(places.values(), key=lambda each: each.stat().st_mtime_ns, reverse=True):
        try:
            result, measured = _read(file.parent)
        except ExportError:
            continue  # a result.json of another program
        mine = mine or weights_fingerprint(run.tuned.path)
        if (evaluation := _of_weights(file.parent, result, measured, mine)) is not None:
            found.append(evaluation)
    return found


def searched_in(run: TunedRun) -> list[Path]:
    """Folders whose subfolders may be evaluations: the run, what the run is in, and the working folder."""
    run_folder = run.folder.absolute()
    return list(dict.fromkeys([run_folder, run_folder.parent, Path.cwd()]))


def gains_table(evaluation: Evaluation) -> list[list[str]]:
    """Header and rows: for each scorer and model its gain over the base with the interval, and how often it wins."""
    head, rows = ["scorer", "model", "base", "gain", "win rate", "wins / ties / losses", "runs"], []
    for model in sorted(evaluation.result["models"], key=lambda one: one["name"] != evaluation.model):
        measured = dict(model["scores"])
        if model.get("faithfulness"):
            measured[f"{evaluation.result['faithfulness']} (faithfulness)"] = model["faithfulness"]
        for scorer, score in measured.items():
            head[3:5] = [f"{name} [{score['level'] * 100:.0f} % interval]" for name in ("gain", "win rate")]
            cells = [f"{score['base']:.3f}", _interval(score["gain"], "+.3f"), _interval(score["win_rate"], ".2f")]
            counts = f"{score['wins']} / {score['ties']} / {score['losses']}"
            rows.append([scorer, model["name"], *cells, counts, str(score["runs"])])
    return [head, *sorted(rows, key=lambda row: row[0])]


def draw_strip(evaluation: Evaluation) -> tuple[Image.Image, list[str]] | None:
    """The base's images above the tuned model's, same prompts and noise, and their prompts; None without images."""
    before, after = (_images(evaluation, name) for name in (BASE, evaluation.model))
    both = [key for key in before if key in after]
    firsts = list({prompt: (prompt, seed) for prompt, seed in reversed(both)}.values())[::-1]
    chosen = firsts[:: max(1, -(-len(firsts) // SHOWN))][:SHOWN]
    if not chosen:
        return None
    rows = {"base": [before[key] for key in chosen], "tuned": [after[key] for key in chosen]}
    cells = {name: [fit(one.open(), CELL) for one in images] for name, images in rows.items()}
    return _drawn(cells), [prompt for prompt, _ in chosen]


def _images(evaluation: Evaluation, model: str) -> Mapping[tuple[str, int], GeneratedImage]:
    """A model's images (of its first run) by prompt and seed; empty where they were deleted."""
    for tag in evaluation.tags(model):
        try:
            found = read_image_manifest(evaluation.folder / "images" / f"{model}-{tag}")
        except DiffalignError:
            continue
        return {(image.prompt, image.seed): image for image in found}
    return {}


def _drawn(cells: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Rows of images, each row with its name in front."""
    side = max(max(image.size) for images in cells.values() for image in images)
    count = max(len(images) for images in cells.values())
    canvas = Image.new("RGB", (LABEL + count * (side + GAP), len(cells) * (side + GAP) - GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for row, (name, images) in enumerate(cells.items()):
        top = row * (side + GAP)
        draw.text((GAP, top + side // 2 - FONT), name, INK, ImageFont.load_default(FONT))
        for column, image in enumerate(images):
            canvas.paste(image, (LABEL + column * (side + GAP), top))
    return canvas


def _interval(estimate: Mapping[str, float | None], style: str) -> str:
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    if value is None:
        return "not measured"
    if low is None or high is None:
        return f"{value:{style}} [no interval]"
    return f"{value:{style}} [{low:{style}}, {high:{style}}]"
