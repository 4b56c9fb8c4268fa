"""Doubtful labels: the pairs of a run, ordered by how strongly the tuned model disagrees with their label.

A wrong label is memorised in the end, but later and less than the right ones, because these agree with each
other. So the tuned model's margin (reward of the chosen image less that of the rejected one) tells wrong labels apart,
better after few visits of each pair than after many. Which visit is best is not known, and the weights of one step rank
by chance as well. So the final weights and those of all checkpoints are measured at the same points, and their margins
are averaged, as in the area under the margin (Pleiss et al., arXiv 2001.10528).

The margins of a pair at its points (t, ε) have very different sizes, and those at low noise are memorised first.
Each is divided by the spread over all pairs with those weights at that point and bounded by tanh, so that none decides
alone. It counts by how well the margins there predict the held-out pairs of the run: by the square of their mean
bounded margin, 0 where that is negative. In units of the spread over all pairs this mean is small where the training
pairs are memorised, even if the held-out pairs' accuracy is not; and points share much of their noise, so the better
ones count more than in proportion. Held-out pairs that are not among the ranked ones are measured besides. Without
held-out pairs, or where none is predicted, all count alike.

Differs from the paper: margins are those of a few checkpoints, not of every epoch, and no threshold is learned from
pairs with a label that was swapped on purpose. Left out: cross-fitting (a run for every fold, each on the other folds).
It needs several trainings, and two or five runs found fewer than one on nine tenths (`docs/heldout.md`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffalign.config.schema import Config, parse_config
from diffalign.config.sections import ValidationSection
from diffalign.config.strict_yaml import ConfigError, read_yaml
from diffalign.data.heldout import split_by_prompt
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.row import ImageError
from diffalign.data.spec import DataSpec
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.errors import DiffalignError
from diffalign.io.manifest import read_manifest
from diffalign.models.adapters.save_load import find_tuned
from diffalign.models.loading.encoder import Encoder
from diffalign.training.build import build
from diffalign.training.build_source import buckets_of
from diffalign.training.checkpoints.checkpoint import STATE_FILE, checkpoints
from diffalign.training.heldout.measure import FixedPoints, PointValues
from diffalign.training.metrics import QUARTERS
from diffalign.training.open_data import open_heldout, prepared
from diffalign.training.processes import make_accelerator

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Doubt:
    """A pair and what the tuned model says about its label."""

    index: int  # in the table
    score: float  # in [-1, 1]: mean of the bounded margins; below 0 the model ranks the pair against its label
    error: float  # standard error of the score over the pair's points
    margin: float  # mean margin over points and weights, in the objective's unit
    agreeing: float  # share of points at which the chosen image has the higher reward
    worst_quarter: int | None  # of t, 1 to 4, with the lowest bounded margin; None where points have several timesteps
    heldout: bool  # whether the run did not train on it


@dataclass(frozen=True)
class Doubts:
    """The pairs of a run, the most doubtful first."""

    table: PairTable
    ranked: list[Doubt]
    pairs: str  # the pairs' path
    spec: DataSpec  # how they were read
    trained: frozenset[str] = frozenset()  # ids of the pairs that the run trained on
    weights: tuple[str, ...] = ()  # the measured ones: names of checkpoints, and "final weights"


def doubtful_pairs(
    run_dir: str | Path,
    *,
    points: int = 8,
    batch_size: int | None = None,
    newest: int | None = None,
    pairs: tuple[str, DataSpec] | None = None,
    check: Callable[[PairTable, str], None] | None = None,
) -> Doubts:
    """Every pair of a run, ordered by how strongly its weights disagree with it: the final ones and all checkpoints'.

    run_dir: a run, or one of its checkpoints, which is measured alone. points: (t, ε) of each pair, a multiple of 4.
    batch_size: pairs in a forward; None: the run's. newest: so many of the checkpoints; None: all. pairs: a path and
    how it is read, for other pairs than the run's. check: called with the pairs and their path before any is measured.
    Raises DiffalignError for a folder without a run, and for a run without labelled pairs or whose objective does not
    compare the images of a pair; ModelError where there are no tuned weights, or damaged ones.
    """
    config = _config(Path(run_dir))
    folders = weight_folders(Path(run_dir), newest)
    accelerator = make_accelerator(config)
    run = build(config, accelerator)
    assert isinstance(run.table, PairTable), "a run with a source is refused"
    own = _own_heldout(_recorded(Path(run_dir)), config, run.table)
    heldout = set[str]() if own is None else set(own.ids)
    table, path, spec = run.table, config.data.path, config.data.spec
    if pairs is not None:
        path, spec = pairs
        table = open_pairs(path, spec)
        table.require_usable()
        table = prepared(_reading(config, path), table)
    if check is not None:
        check(table, path)
    resolution = config.data.resolution or run.base.family.default_resolution
    encoder = Encoder(run.base, accelerator.device)
    loader = LoaderSpec(
        run_seed=0,
        train_batch_size=1,
        with_uncond=run.objective.needs_uncond,
        signed_masks=run.objective.takes_signs,
    )
    asked = {"pairs": table}
    if own is not None and (pairs is not None or not heldout <= set(table.ids)):  # others may be labelled otherwise
        asked["held-out pairs"] = own
    fixed = {}
    for what, each in asked.items():
        content = Online(encoder, resolution, buckets=buckets_of(config.data, each, resolution))
        source = OfflinePairs(each, content, loader)
        fixed[what] = FixedPoints(source, points, batch_size or config.training.train_batch_size)
    values: dict[str, list[PointValues]] = {what: [] for what in asked}
    for place, (name, folder) in enumerate(folders.items()):
        run.load_weights(folder)
        for what, measured in fixed.items():
            measured.title = f"measuring {what} with {name}"
            found = measured.values(run.objective, run.networks)
            values[what] += [replace(value, point=place * points + value.point) for value in found]
    held = {place for place, id in enumerate(table.ids) if id in heldout}
    timesteps = run.networks.schedule.num_train_timesteps
    trained = frozenset(run.table.ids) - heldout
    order = ranked(values["pairs"], held, timesteps, len(folders), values.get("held-out pairs", ()))
    return Doubts(table, order, path, spec, trained, tuple(folders))


def _own_heldout(recorded: Config, config: Config, table: PairTable) -> PairTable | None:
    """The held-out pairs of a run: a share of its table, or the pairs of another path. Raises DataError."""
    share = recorded.validation
    if isinstance(share.pairs, float):
        return table.part(split_by_prompt(table.prompts, share.pairs, share.pairs_seed, share.max_pairs)[1])
    others = open_heldout(recorded)
    return None if others is None else prepared(_reading(config, str(share.pairs)), others)


def _reading(config: Config, path: str) -> Config:
    """The config with other pairs, whose number says nothing about its batch."""
    data, training = config.data.model_copy(update={"path": path}), config.training
    return config.model_copy(update={"data": data, "training": training.model_copy(update={"train_batch_size": 1})})


def weight_folders(run_dir: Path, newest: int | None = None) -> dict[str, Path]:
    """The folders of a run's weights by name, by step: its checkpoints (the newest so many) and the final weights.

    A checkpoint of the same step as the final weights is left out. Raises ModelError for weights that are missing or
    damaged.
    """
    final = read_manifest(run_dir)
    step = None if isinstance(final, str) else final["step"]
    there = [folder for folder in checkpoints(run_dir) if folder.name != f"checkpoint-{step}"]
    if newest is not None:
        there = there[max(len(there) - newest, 0) :]
    last = run_dir.name if (run_dir / STATE_FILE).is_file() else "final weights"
    found = {folder.name: folder for folder in there} | {last: run_dir}
    for folder in found.values():
        find_tuned(folder)
    return found


def ranked(
    values: Iterable[PointValues],
    heldout: set[int],
    timesteps: int,
    weights: int = 1,
    others: Iterable[PointValues] = (),
) -> list[Doubt]:
    """Measured pairs, the most doubtful first; `heldout` are the indices of those that were not trained on.

    weights: how many were measured; a pair's points are those of the first weights, then the same of the next ones.
    others: held-out pairs beside them at the same points, which decide how much points count instead of `heldout`.
    Raises DiffalignError where nothing was measured, and for margins that are not finite.
    """
    pairs, margins, times = _by_pair(values)
    held = np.array([pair in heldout for pair in pairs])
    spread = margins.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    bounded = np.tanh(margins / spread)
    beside = list(others)
    counts = point_weights(np.tanh(_by_pair(beside)[1] / spread) if beside else bounded[held])
    scores = bounded @ counts
    # the weights of a run are measured at the same points, so their mean at a point is one observation
    of_points = counts.reshape(weights, -1).sum(0)
    at_points = (bounded * counts).reshape(len(pairs), weights, -1).sum(1) / np.where(of_points > 0, of_points, 1.0)
    errors = np.sqrt(((at_points - scores[:, None]) ** 2 * of_points**2).sum(1))
    return [
        Doubt(
            index=pairs[i],
            score=float(scores[i]),
            error=float(errors[i]),
            margin=float(margins[i].mean()),
            agreeing=float((margins[i] > 0).mean()),
            worst_quarter=_worst_quarter(bounded[i], times[i], timesteps),
            heldout=bool(held[i]),
        )
        for i in np.argsort(scores, kind="stable")
    ]


def _by_pair(values: Iterable[PointValues]) -> tuple[list[int], Floats, Floats]:
    """Pairs, and their margins and timesteps [pair point]. Raises DiffalignError for none, and for one not finite."""
    ordered = sorted(values, key=lambda value: (value.pair, value.point))
    if not ordered:
        raise DiffalignError("none of the run's pairs can be read; `diffalign data check` says why")
    if odd := {value.pair for value in ordered if value.margin is None or not math.isfinite(value.margin)}:
        raise DiffalignError(
            f"the margins of {len(odd)} pairs are not finite (first: pair {min(odd)}), so pairs cannot be ranked; the "
            "run's weights may have diverged: name an earlier checkpoint"
        )
    pairs = list(dict.fromkeys(value.pair for value in ordered))
    margins = np.array([value.margin for value in ordered], float).reshape(len(pairs), -1)
    times = np.array([math.nan if value.t is None else value.t for value in ordered]).reshape(margins.shape)
    return pairs, margins, times


def point_weights(bounded: Floats) -> Floats:
    """How much points count, from bounded margins [pair, point] of held-out pairs: their squared mean there; sum 1."""
    pairs, points = bounded.shape
    if pairs:
        gained = np.clip(bounded.mean(0), 0, None) ** 2
        if gained.any():
            return np.asarray(gained / gained.sum())
    return np.full(points, 1 / points)


def _worst_quarter(bounded: Floats, times: Floats, timesteps: int) -> int | None:
    if np.isnan(times).any():
        return None
    quarter = (times * QUARTERS // timesteps).astype(int)
    means = {q: bounded[quarter == q].mean() for q in range(QUARTERS) if (quarter == q).any()}
    return min(means, key=lambda q: means[q]) + 1


def _recorded(run_dir: Path) -> Config:
    """The config that a run recorded. Raises DiffalignError where it has none with an objective."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise DiffalignError(
            f"{run_dir}: there is no config.yaml, so it is no run; name a run's folder or a checkpoint"
        )
    config = parse_config(read_yaml(file), str(file), recorded=True)
    if not isinstance(config, Config):
        raise DiffalignError(f"{run_dir} trains a preference model; name the run of an objective")
    return config


def _config(run_dir: Path) -> Config:
    """The config by which a run's networks and all its pairs are opened again, with nothing cached or resumed."""
    config = _recorded(run_dir)
    if config.source is not None:
        raise DiffalignError(f"{run_dir}: source {config.source.name} generates its pairs, which have no labels")
    if config.objective.compares != "images":
        raise DiffalignError(
            f"{run_dir}: {config.objective.name} compares {config.objective.compares}, so its model has no margin of "
            "a pair; name the run of an objective like dpo"
        )
    data = {"cache_dir": None, "cache_variants": 1, "cache_trajectories": False, "cache_reference_errors": False}
    data |= {"curriculum": None, "random_flip": False, "center_crop": True}
    training = {"resume_from_checkpoint": None, "ema_decay": None, "reference_batch_size": None, "report_to": "none"}
    try:
        return config.model_copy(
            update={
                "data": config.data.model_copy(update=data),
                "training": config.training.model_copy(update=training),
                "model": config.model.model_copy(update={"compile": False, "gradient_checkpointing": "none"}),
                "validation": ValidationSection(user=config.validation.user),
            }
        )
    except ConfigError as error:
        raise DiffalignError(f"{run_dir}: {error}") from error


def image_path(table: PairTable, index: int, side: str) -> str:
    """The file of one image of a pair, "chosen" or "rejected"; empty where it is stored inside a file."""
    try:
        ref = getattr(table[index], side)
    except ImageError:
        return ""
    return str(ref.path) if ref.path is not None and ref.span is None else ""
