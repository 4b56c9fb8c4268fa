"""Scorers by name. Nothing heavy is imported until a scorer is loaded.

load_scorer("world")                                  a built-in scorer
load_scorer("pickscore=/models/PickScore_v1")         the same, weights from a folder or another Hub id
load_scorer("geneval=/models/detr")                   faithfulness by an object detector of yours
load_scorer("step-aware=runs/judge")                  a preference model that `diffalign train` wrote
load_scorer("my_package.judges:Sharpness")            your own class (`device` is passed if it takes one)
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from importlib import import_module

from diffalign.rewards.base import (
    DEFAULT_TIE,
    LatentScorer,
    Scorer,
    ScorerError,
    StepAwareScorer,
    as_step_aware,
    span_of,
    tie_of,
)
from diffalign.rewards.table import SCORERS

__all__ = [
    "DEFAULT_TIE",
    "LatentScorer",
    "Scorer",
    "ScorerError",
    "StepAwareScorer",
    "as_step_aware",
    "declared_span",
    "declared_tie",
    "load_judge",
    "load_scorer",
    "scorer_names",
    "span_of",
    "tie_of",
]


def scorer_names() -> list[str]:
    """The built-in names that `load_scorer` knows."""
    return list(SCORERS)


def load_scorer(name: str, device: str = "cpu") -> Scorer:
    """The scorer of images called `name` with its weights on `device`.

    `name` is a built-in name, `NAME=PATH` (a folder, file or Hub id in place of the default weights), or
    `package.module:Class` for a scorer of your own. Raises ScorerError naming the nearest known name.
    """
    scorer = load_judge(name, device)
    if isinstance(scorer, LatentScorer):
        raise ScorerError(
            f"scorer '{name}' judges noisy latents, and what is asked for here is a scorer of images; it can be "
            "source.scorer of the source rollout"
        )
    return scorer


def load_judge(name: str, device: str = "cpu") -> Scorer | LatentScorer:
    """As `load_scorer`, and also a judge of noisy latents, for those who can show it some."""
    key, given, path = name.partition("=")
    factory = _factory(name)
    if given and not path:
        raise ScorerError(
            f"scorer '{name}' has nothing behind '='; name a path or address there, or give '{key}' alone"
        )
    if path and not _takes_path(factory):
        raise ScorerError(f"scorer '{name}': {key} takes no path; give '{key}' alone")
    arguments = {"device": device} if _takes_device(factory) else {}
    scorer = factory(path, **arguments) if path else factory(**arguments)
    if not isinstance(scorer, (Scorer, LatentScorer)):
        raise ScorerError(f"scorer '{name}': {factory} has no `name` or no `score(images, prompts)` method")
    return scorer


def declared_tie(name: str) -> float:
    """`tie_of` the scorer called `name`, without loading its weights. Raises ScorerError as `load_scorer` does."""
    return tie_of(_factory(name))


def declared_span(name: str) -> tuple[float, float] | None:
    """`span_of` the scorer called `name`, without loading its weights. Raises ScorerError as `load_scorer` does."""
    return span_of(_factory(name))


def _factory(name: str) -> Callable[..., object]:
    """What makes the scorer of that name."""
    key = name.partition("=")[0]
    target = SCORERS[key].target if key in SCORERS else key
    module, _, attribute = target.partition(":")
    if not attribute:
        raise ScorerError(_unknown(key))
    try:
        found: Callable[..., object] = getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ScorerError(
            f"scorer '{name}': cannot import {attribute} from {module} ({error}); "
            "a scorer of your own is named package.module:Class and must be on the Python path"
        ) from error
    return found


def _takes_path(factory: Callable[..., object]) -> bool:
    """Whether the first argument of a scorer can be a path."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except ValueError:  # some classes written in C do not say
        return True
    first = parameters[0] if parameters else None
    return first is not None and first.name != "device" and first.kind is not inspect.Parameter.KEYWORD_ONLY


def _takes_device(factory: Callable[..., object]) -> bool:
    try:
        return "device" in inspect.signature(factory).parameters
    except ValueError:  # some classes written in C do not say
        return False


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, SCORERS, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return (
        f"no scorer is called '{name}'{hint} Known: {', '.join(SCORERS)}. "
        "A scorer of your own is named package.module:Class."
    )
