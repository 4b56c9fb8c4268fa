"""What a scorer is: images and prompts in, one number per image out.

Anything with a `name` and a `score` is a scorer; nothing has to be inherited. A scorer whose `score` has a parameter
`t` judges what a sampler is heading for at timestep t, the decoded x̂_0; `as_step_aware` makes any scorer one of these.
A scorer may also have

    tie              float: two scores closer than this count as equal (default 0.01, see `tie_of`)
    span             (float, float): where its scores of ordinary images lie, in its own unit. Ranges and thresholds
                     in configs are compared with it and refused where they must be another unit's
    embed_images     images -> unit vectors "n d": lets the diversity guard measure in feature space
    check_prompts    prompts -> None: raises for one that it cannot judge by, before any image is made
    group_of         prompt -> str: reports also count each group of prompts by itself
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from PIL.Image import Image
from torch import Tensor

from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError

DEFAULT_TIE = 0.01


class ScorerError(DiffalignError):
    """A scorer is unknown, cannot be loaded, or was asked for something it cannot score."""


@runtime_checkable
class Scorer(Protocol):
    """A judge of images. Higher is better; the unit is the scorer's own."""

    name: str

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Tensor:
        """Float [n]: image i judged against prompt i."""
        ...


class StepAwareScorer(Protocol):
    """A scorer of intermediate images: x̂_0 decoded at timestep t, never the noisy x_t itself."""

    name: str

    def score(self, images: Sequence[Image], prompts: Sequence[str], t: Tensor) -> Tensor:
        """Float [n]: image i, decoded from the x̂_0 of timestep t[i] (int64 [n]), judged against prompt i."""
        ...


@runtime_checkable
class LatentScorer(Protocol):
    """A judge of noisy latents x_t. Higher is better; it decodes nothing, and cannot score images."""

    name: str

    def score_latents(self, latents: Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
        """Float [n]: x_t "n c h w" at the noise levels t (int64 [n]), each judged against its prompt."""
        ...

    def check_latents(self, family: str, channels: int, schedule: NoiseSchedule) -> None:
        """Raises ScorerError for latents that are not of its kind: their model's family, channels and noise levels."""
        ...


def as_step_aware(scorer: Scorer | StepAwareScorer) -> StepAwareScorer:
    """`scorer` behind the step-aware interface: where its `score` has no parameter `t`, the timestep is ignored.

    What comes back raises ScorerError for a wrong number of prompts, timesteps or scores, and names the prompt of a
    score that is not finite.
    """
    return _AtStep(scorer, takes_timestep(scorer))


def takes_timestep(scorer: Scorer | StepAwareScorer) -> bool:
    """Whether a scorer's `score` has a parameter `t`."""
    return "t" in inspect.signature(scorer.score).parameters


class _AtStep:
    def __init__(self, scorer: Any, takes_t: bool) -> None:
        self.name: str = scorer.name
        self.tie = tie_of(scorer)
        self._scorer, self._takes_t = scorer, takes_t

    def score(self, images: Sequence[Image], prompts: Sequence[str], t: Tensor) -> Tensor:
        check_lengths(self.name, images, prompts)
        if t.dtype != torch.int64 or t.shape != (len(images),):
            raise ScorerError(
                f"scorer '{self.name}' got timesteps {t.dtype} {tuple(t.shape)} for {len(images)} images; "
                "pass one int64 timestep per image"
            )
        scores = self._scorer.score(images, prompts, t) if self._takes_t else self._scorer.score(images, prompts)
        if scores.shape != (len(images),):
            raise ScorerError(f"scorer '{self.name}' gave {tuple(scores.shape)} scores for {len(images)} images")
        return check_finite(self.name, scores, prompts)


def tie_of(scorer: Any) -> float:
    """The difference below which two scores of this scorer count as equal, in its own unit."""
    return float(getattr(scorer, "tie", DEFAULT_TIE))


def span_of(scorer: Any) -> tuple[float, float] | None:
    """The range of a scorer's scores of ordinary images, as it or its class declares it; None without a declaration.

    Raises ScorerError unless it is two finite numbers, the lower first.
    """
    span = getattr(scorer, "span", None)
    if span is None:
        return None
    try:
        low, high = map(float, span)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ScorerError(f"{scorer!r} has span = {span!r}; give two finite numbers, the lower first, or None")
    return low, high


def group_of(scorer: Any, prompt: str) -> str:
    """The group that a prompt belongs to by this scorer; "" where it makes no groups."""
    group = getattr(scorer, "group_of", None)
    return "" if group is None else str(group(prompt))


def check_prompts(scorers: Sequence[Any], prompts: Sequence[str]) -> None:
    """Lets each scorer with `check_prompts` refuse prompts before images are generated; raises what it raises."""
    for scorer in scorers:
        check = getattr(scorer, "check_prompts", None)
        if check is not None:
            check(prompts)


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether a value of JSON is a finite number; JSON's integers may have more digits than a float holds."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_lengths(name: str, images: Sequence[Image], prompts: Sequence[str]) -> None:
    """Raise ScorerError unless there is exactly one prompt per image."""
    if len(images) != len(prompts):
        raise ScorerError(
            f"scorer '{name}' got {len(images)} images and {len(prompts)} prompts; "
            "pass one prompt per image (repeat the prompt for several seeds)"
        )


def check_finite(name: str, scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scores; raises ScorerError naming the first prompt whose score is NaN or infinite."""
    broken = (~scores.isfinite()).nonzero().flatten().tolist()
    if broken:
        i = broken[0]
        raise ScorerError(
            f"scorer '{name}' gave {float(scores[i])} for {prompts[i]!r} ({len(broken)} of {len(scores)} scores are "
            "not finite); are its weights, and the latents of the image, finite?"
        )
    return scores
