"""A network as inversion calls it: for some rows of a batch, each with its conditioning, with or without guidance."""

from __future__ import annotations

from torch import Tensor

from diffalign.engine.inversion import Predict
from diffalign.engine.measure import Network, guided
from diffalign.errors import DiffalignError
from diffalign.types import Conditioning


def predictor(
    network: Network, cond: Conditioning, guidance: float = 1.0, uncond: Conditioning | None = None
) -> Predict:
    """A function for the raw prediction of some rows of a flat batch; `cond` and `uncond` are flat and have all rows.

    With guidance, m rows need one forward of 2m rows. Raises DiffalignError for guidance without `uncond`.
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
