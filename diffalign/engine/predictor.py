"""A network as inversion asks it: for some rows of a batch, under their own conditioning, guided or not.

And as a judge of half-made pictures asks it: for the clean latent that a noisy one is heading for.
"""

from __future__ import annotations

from torch import Tensor

from diffalign.engine.inversion import Predict
from diffalign.engine.measure import Network, guided
from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.types import Conditioning


def predictor(
    network: Network, cond: Conditioning, guidance: float = 1.0, uncond: Conditioning | None = None
) -> Predict:
    """A network's (guided) raw prediction for some rows of a flat batch; `cond` and `uncond` are flat.

    Guidance takes one forward of twice the rows, as in `measure`. Raises ValueError where it has no null prompt.
    """
    if guidance != 1.0 and uncond is None:
        raise DiffalignError(
            f"guidance = {guidance} needs the null prompt's conditioning (PairBatch.uncond): build the source with "
            "with_uncond=True, or set guidance: 1.0"
        )
    n = len(cond.prompt_embeds)

    def of(part: Conditioning, rows: Tensor) -> Conditioning:
        return part if len(rows) == n else part.map(lambda x: x[rows])

    def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        null = None if uncond is None else of(uncond, rows)
        return guided(network, x, t, of(cond, rows), guidance, null)

    return predict


def predict_x0(
    network: Network,
    schedule: NoiseSchedule,
    xt: Tensor,
    t: Tensor,
    cond: Conditioning,
    guidance: float = 1.0,
    uncond: Conditioning | None = None,
) -> Tensor:
    """x̂_0 "n c h w": the clean latent that a network's (guided) prediction at a flat batch's x_t stands for.

    Raises ValueError where it is undefined (`NoiseSchedule.to_x0`).
    """
    return schedule.to_x0(guided(network, xt, t, cond, guidance, uncond), xt, t)
