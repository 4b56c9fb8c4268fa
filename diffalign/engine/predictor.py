"""A network as inversion asks it: for some rows of a batch, under their own conditioning, guided or not."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.engine.inversion import Predict
from diffalign.engine.measure import Network
from diffalign.records import Conditioning


def predictor(
    network: Network, cond: Conditioning, guidance: float = 1.0, uncond: Conditioning | None = None
) -> Predict:
    """A network's (guided) raw prediction for some rows of a flat batch; `cond` and `uncond` are flat.

    Guidance takes one forward of twice the rows, as in `measure`. Raises ValueError where it has no null prompt.
    """
    if guidance != 1.0 and uncond is None:
        raise ValueError(
            f"guidance = {guidance} needs the null prompt's conditioning (PairBatch.uncond): build the source with "
            "with_uncond=True, or set guidance: 1.0"
        )
    n = len(cond.prompt_embeds)

    def of(part: Conditioning, rows: Tensor) -> Conditioning:
        return part if len(rows) == n else part.map(lambda x: x[rows])

    def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        told = of(cond, rows)
        if uncond is None or guidance == 1.0:
            return network(x, t, told)
        both = network(torch.cat([x, x]), torch.cat([t, t]), _stacked(told, of(uncond, rows)))
        conditional, unconditional = both.unflatten(0, (2, -1))
        return unconditional + guidance * (conditional - unconditional)

    return predict


def _stacked(a: Conditioning, b: Conditioning) -> Conditioning:
    def stack(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else torch.cat([x, y])

    return Conditioning(
        torch.cat([a.prompt_embeds, b.prompt_embeds]), stack(a.pooled, b.pooled), stack(a.time_ids, b.time_ids)
    )
