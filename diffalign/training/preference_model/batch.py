"""What a preference model sees of a batch of pairs: half-made pictures, labels and weights.

    t ~ U{0 … T−1} and one noise for both images of a pair
    x_t = a_t x_0 + s_t ε,   x̂_0 from the frozen base with guidance,   picture = decode(x̂_0)

Source: the release of SPO (arXiv 2406.04314), `spm_task.py`. Differs from it: draws belong to the pair, so batch size,
processes and resuming change nothing; pairs that share a prompt are counted in the data used, not read from a column;
the weights of a step are normalised over the whole step, as the release does over its gathered batch.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from diffalign.data.sampler import PairOrder, positions_for
from diffalign.data.table.pairs import PairTable
from diffalign.engine.measure import guided
from diffalign.models.loading.decoder import decode
from diffalign.models.loading.modules import VAE
from diffalign.models.policy.networks import Networks
from diffalign.objectives.base import shared_noise
from diffalign.rewards import Scorer
from diffalign.rewards.base import check_finite
from diffalign.rewards.preference_loss import TIE, prompt_weights, relabel
from diffalign.types import PairBatch


@torch.no_grad()
def half_made(batch: PairBatch, networks: Networks, vae: VAE, guidance: float) -> tuple[Tensor, Tensor]:
    """Decoded x̂_0 "side pair 3 H W" (nominally in [−1, 1]) and their timesteps int64 [pair] on the CPU."""
    probe = shared_noise(batch, networks.schedule)
    sides = probe.xt.shape[:2]
    xt = probe.xt.flatten(0, 1)
    t = probe.t.expand(sides).flatten().to(xt.device)
    uncond = None if batch.uncond is None else batch.uncond.flatten()
    prediction = guided(networks.policy, xt, t, batch.cond.flatten(), guidance, uncond)
    x0 = networks.schedule.to_x0(prediction, xt, t)
    return decode(vae, x0).unflatten(0, sides), probe.t


class Labels:
    """The labels of pairs by id: the data's, or another scorer's verdict on the clean pictures."""

    def __init__(self, table: PairTable, judge: Scorer | None, gap: float) -> None:
        self.table, self.judge, self.gap = table, judge, gap
        self._index = {name: i for i, name in enumerate(table.ids)}
        self._judged: dict[str, tuple[float, float]] = {}  # a verdict belongs to the pair: it is asked for once

    def prompts(self, ids: tuple[str, ...]) -> list[str]:
        """The prompts of the pairs."""
        return [self.table.prompts[self._index[name]] for name in ids]

    def __call__(self, ids: tuple[str, ...]) -> Tensor:
        """Labels float32 "side pair", on the CPU. Raises ScorerError for a verdict that is not finite."""
        if self.judge is not None:
            self._ask(self.judge, [name for name in dict.fromkeys(ids) if name not in self._judged])
            return torch.tensor([self._judged[name] for name in ids]).T
        ties = [self.table.tie(self._index[name]) for name in ids]
        return torch.tensor([(TIE, TIE) if tie else (1.0, 0.0) for tie in ties]).T

    def _ask(self, judge: Scorer, ids: list[str]) -> None:
        if not ids:
            return
        rows = [self.table[self._index[name]] for name in ids]
        prompts = [row.prompt for row in rows] * 2
        images = [row.chosen.open() for row in rows] + [row.rejected.open() for row in rows]
        scores = check_finite(judge.name, judge.score(images, prompts), prompts)
        first, second = relabel(scores.unflatten(0, (2, -1)).float(), self.gap).tolist()
        self._judged.update(zip(ids, zip(first, second, strict=True), strict=True))


class StepWeights:
    """Weights of the pairs of an optimiser step: pairs that share a prompt weigh as one, and a step sums to 1."""

    def __init__(self, table: PairTable, seed: int, pairs: int) -> None:
        """`pairs`: in one optimiser step, over all processes."""
        of_prompt = Counter(table.prompts)
        self.counts = torch.tensor([of_prompt[prompt] for prompt in table.prompts])
        self.order, self.pairs = PairOrder(len(table), seed), pairs

    def __call__(self, step: int, batch: int, accumulation: int, process: int, processes: int) -> Tensor:
        """Weights float32 [accumulation batch] of the process's share of the step after `step` steps.

        A pair that cannot be read passes its weight on to its substitute.
        """
        first = step * self.pairs
        planned = torch.tensor([self.order(first + i)[0] for i in range(self.pairs)])
        weights = prompt_weights(self.counts[planned])
        return weights[positions_for(step, batch, accumulation, process, processes) - first].float()
