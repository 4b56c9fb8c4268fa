"""How long a run of `diffalign init` is, from the number of pairs, and how often it logs, measures and saves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from diffalign.errors import DiffalignError, printable

# Diffusion-DPO's released SD1.5 run visits each pair about 5 times (2,000 steps of 2,048 of 851,293 pairs); the runs on
# 128 pairs in docs/heldout.md ended by their held-out pairs after 13 to 25 visits.
PASSES = 10
LEAST, MOST = 100, 2000  # steps: below, a learning rate has no time to act; above, more passes are a choice to be made
NOT_COUNTED = 1000  # steps where the number of pairs is not known


@dataclass(frozen=True)
class Length:
    """Steps of a run and their cadence. Every number of steps is a multiple of `logging`."""

    steps: int
    why: str  # one sentence, for the config's comment
    logging: int
    warmup: int
    measuring: int  # of held-out pairs
    saving: int  # checkpoints and validation images


def length_for(pairs: int | None, per_step: int, why_not: str = "") -> Length:
    """The length for so many usable pairs, `per_step` of them a step. pairs: None where they are not counted, with the
    reason `why_not`; MOST · per_step / PASSES or more all give MOST."""
    if pairs is None:
        steps = NOT_COUNTED
        because = f" ({why_not})" if why_not else ""
        why = f"The pairs were not counted{because}: {PASSES} passes are pairs * {PASSES} / {per_step} steps."
    else:
        wanted = pairs * PASSES / per_step
        steps = 20 * math.ceil(min(max(wanted, LEAST), MOST) / 20)
        passes = f"{steps * per_step / pairs:.3g} passes"
        counted = f"{pairs:,} usable pairs: {steps:,} steps of {per_step} are {passes}"
        if pairs >= enough(per_step):
            counted = f"At least {pairs:,} usable pairs: {steps:,} steps of {per_step} are {passes} or less"
        why = f"{counted}. init aims at {PASSES} passes, and at {LEAST} to {MOST:,} steps."
    logging = 5 if steps < 200 else 10
    tenth, quarter = (max(1, round(steps / part / logging)) * logging for part in (10, 4))
    return Length(steps, why, logging, min(100, tenth), tenth, quarter)


def enough(per_step: int) -> int:
    """The number of pairs from which on a run has MOST steps, so that no more need be counted."""
    return MOST * per_step // PASSES


def count_pairs(path: str, limit: int) -> tuple[int | None, str]:
    """How many usable pairs are at a path, at most `limit`; (None, why) for a Hub id, and where nothing can be read."""
    from diffalign.data.spec import DataSpec
    from diffalign.data.table.open import open_pairs

    if not Path(path).exists():
        return None, "they are on the Hub"
    try:
        table = open_pairs(path, DataSpec(max_pairs=limit))
        table.require_usable()
    except DiffalignError as error:
        return None, f"they could not be read: {printable(str(error)).splitlines()[0]}"
    return len(table), ""
