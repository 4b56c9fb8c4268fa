"""Several scorers as one, lower where they disagree: mean - k * std of their standardised scores of an image.

    z_j = (s_j - mean_j) / std_j,   score = mean over j of z_j - k * std over j of z_j      (divisor: their number)

after Coste et al. (arXiv 2310.02743), who subtract the variance; the standard deviation leaves the score in z's unit,
standard deviations of the images that the members were measured on. mean_j and std_j are in the file, from one set of
images measured beforehand: never from the batch at hand, where a score would depend on its neighbours. A file:

    {"k": 1.0, "members": [{"scorer": "pickscore", "mean": 20.9, "std": 1.3}, {"scorer": "hpsv2.1", ...}]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from diffalign.io.files import save_text
from diffalign.rewards.base import Scorer, ScorerError, check_finite, check_lengths, check_prompts, is_finite_number

_EXAMPLE = '{"k": 1.0, "members": [{"scorer": "pickscore", "mean": 20.9, "std": 1.3}, ...]}'


@dataclass(frozen=True)
class Member:
    """A scorer, and what its scores were on the images that the ensemble was measured on."""

    scorer: str  # a name for load_scorer
    mean: float
    std: float  # above 0


@dataclass(frozen=True)
class EnsembleSpec:
    """What the file of an ensemble says."""

    k: float  # of the standard deviation, from 0: the plain mean
    members: tuple[Member, ...]  # two or more
    name: str = "ensemble"


class Ensemble:
    """In standard deviations of the measured images; 0 is what they have on average where the members agree."""

    span = (-4.0, 4.0)
    tie = 0.01

    def __init__(self, path: str = "", *, device: str = "cpu") -> None:
        """`path`: the file. Raises ScorerError for a fault in it, and what loading its members raises."""
        from diffalign.rewards import load_scorer

        if not path:
            raise ScorerError(
                "ensemble=FILE: name the file of an ensemble; `diffalign score --ensemble FILE` writes it"
            )
        self.spec = read_ensemble(Path(path))
        self.name = self.spec.name
        self.members: list[Scorer] = [load_scorer(member.scorer, device) for member in self.spec.members]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """What its members check; raises what they raise."""
        check_prompts(self.members, prompts)

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """mean - k * std over members, float64 [n]."""
        z = self.standardised(images, prompts)
        mean = z.mean(0)
        return mean - self.spec.k * (z - mean).square().mean(0).sqrt()

    def standardised(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Each member's scores in its own standard deviations, float64 [members, n]. Raises ScorerError for NaN."""
        check_lengths(self.name, images, prompts)
        rows = []
        for scorer, member in zip(self.members, self.spec.members, strict=True):
            scores = scorer.score(images, prompts).double().cpu()
            if scores.shape != (len(images),):
                raise ScorerError(f"scorer '{scorer.name}' gave {tuple(scores.shape)} scores for {len(images)} images")
            rows.append((check_finite(scorer.name, scores, prompts) - member.mean) / member.std)
        return torch.stack(rows)


def read_ensemble(file: Path) -> EnsembleSpec:
    """The file of an ensemble. Raises ScorerError naming the file and the field that is missing or wrong."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ScorerError(f"ensemble={file} is not read ({error}); it is JSON: {_EXAMPLE}") from error
    return _spec(file, found)


def _spec(file: Path, found: Any) -> EnsembleSpec:
    if not isinstance(found, dict) or not isinstance(found.get("members"), list):
        raise ScorerError(f"ensemble={file} has no list `members`; it is JSON: {_EXAMPLE}")
    known = {"k", "members", "name", "measured_on"}
    if unknown := sorted(set(found) - known):
        raise ScorerError(f"ensemble={file} has unknown fields {unknown}; known are {sorted(known)}")
    name = found.get("name", "ensemble")
    if not isinstance(name, str) or not name:
        raise ScorerError(f"ensemble={file} has name = {name!r}; give a text")
    members = tuple(_member(file, place, member) for place, member in enumerate(found["members"]))
    names = [member.scorer for member in members]
    if len(members) < 2 or len(set(names)) < len(names):
        raise ScorerError(f"ensemble={file} has the members {names}; it needs two or more, each once")
    return EnsembleSpec(_number(file, found, "k", least=0.0), members, name)


def _member(file: Path, place: int, found: Any) -> Member:
    where = f"{file}, member {place + 1}"
    if not isinstance(found, dict) or set(found) != {"scorer", "mean", "std"}:
        raise ScorerError(f"ensemble={where} is {found!r:.100}; it has the fields scorer, mean and std")
    scorer = found["scorer"]
    if not isinstance(scorer, str) or scorer.partition("=")[0] in ("", "ensemble"):
        raise ScorerError(
            f"ensemble={where} has scorer = {scorer!r:.100}; give the name of a scorer, not of an ensemble"
        )
    std = _number(where, found, "std", least=0.0)
    if std == 0:
        raise ScorerError(f"ensemble={where} ({scorer}) has std = 0; measure it on images that differ")
    return Member(scorer, _number(where, found, "mean"), std)


def _number(where: str | Path, found: Mapping[str, Any], field: str, least: float = -math.inf) -> float:
    value = found.get(field)
    if not is_finite_number(value) or value < least:
        limit = "" if least == -math.inf else f" from {least:g}"
        raise ScorerError(f"ensemble={where} has {field} = {value!r}; give a finite number{limit}")
    return float(value)


def write_ensemble(file: Path, k: float, scores: Mapping[str, Sequence[float]], measured_on: Sequence[str]) -> None:
    """The file of an ensemble of the scorers in `scores`, each with its scores of the same images.

    measured_on: where the images are, for the reader. Raises ScorerError for fewer than two scorers or images, and for
    a scorer that gave all images the same score.
    """
    sizes = {len(values) for values in scores.values()}
    if len(scores) < 2 or len(sizes) != 1 or min(sizes) < 2:
        raise ScorerError(f"an ensemble needs two scorers and two images or more; there are {len(scores)} and {sizes}")
    members = []
    for scorer, values in scores.items():
        std, mean = torch.std_mean(torch.tensor(values, dtype=torch.float64), correction=0)
        if std == 0:
            raise ScorerError(
                f"scorer '{scorer}' gave {float(mean):g} to every image; an ensemble needs images that differ"
            )
        members.append(asdict(Member(scorer, float(mean), float(std))))
    images = {"folders": list(measured_on), "images": sizes.pop()}
    content = {"k": float(k), "members": members, "measured_on": images}
    _spec(file, content)  # what cannot be read again is not written
    file.parent.mkdir(parents=True, exist_ok=True)
    save_text(file, json.dumps(content, indent=2) + "\n")
