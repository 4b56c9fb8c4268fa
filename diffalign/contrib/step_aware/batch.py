"""The inputs of a preference model: decoded x̂_0 of both images of a pair, labels, and weights.

    t ~ U{0 … T−1} and one noise for both images of a pair
    x_t = a_t x_0 + s_t ε,   x̂_0 from the frozen base with guidance,   image = decode(x̂_0)

Source: the release of SPO (arXiv 2406.04314), `spm_task.py`. Differs from it: draws belong to the pair, so batch size,
processes and resuming change nothing; pairs that share a prompt are counted in the data used, not read from a column;
the weights of a step are normalised over the whole step, as the release does over its gathered batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from diffalign.contrib.step_aware.loss import TIE, prompt_weights, relabel
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.sampler import PairOrder, Processes, positions_for
from diffalign.data.table.pairs import PairTable
from diffalign.engine.measure import guided
from diffalign.models.loading.decoder import decode_latents
from diffalign.models.loading.modules import VAE
from diffalign.models.policy.networks import Networks
from diffalign.objectives.base import shared_noise
from diffalign.rewards import Scorer
from diffalign.rewards.base import check_finite
from diffalign.types import PairBatch, Terms


@torch.no_grad()
def decoded_predictions(batch: PairBatch, networks: Networks, vae: VAE, guidance: float) -> tuple[Tensor, Tensor]:
    """Decoded x̂_0 "side pair 3 H W" (nominally in [−1, 1]) and their timesteps int64 [pair] on the CPU."""
    probe = shared_noise(batch, networks.schedule)
    sides = probe.xt.shape[:2]
    xt = probe.xt.flatten(0, 1)
    t = probe.t.expand(sides).flatten().to(xt.device)
    uncond = None if batch.uncond is None else batch.uncond.flatten()
    prediction = guided(networks.policy, xt, t, batch.cond.flatten(), guidance, uncond)
    x0 = networks.schedule.to_x0(prediction, xt, t)
    return decode_latents(vae, x0).unflatten(0, sides), probe.t


class Labels:
    """The labels of pairs by id: the data's, or those that another scorer gives the clean images."""

    def __init__(self, table: PairTable, judge: Scorer | None, gap: float) -> None:
        self.table, self.judge, self.gap = table, judge, gap
        self._index = {name: i for i, name in enumerate(table.ids)}
        self._judged: dict[str, tuple[float, float]] = {}  # each pair is judged once

    def prompts(self, ids: tuple[str, ...]) -> list[str]:
        """The prompts of the pairs."""
        return [self.table.prompts[self._index[name]] for name in ids]

    def __call__(self, ids: tuple[str, ...]) -> Tensor:
        """Labels float32 "side pair", on the CPU. Raises ScorerError for a score that is not finite."""
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
        return weights[positions_for(step, batch, accumulation, Processes(process, processes)) - first].float()


class WeightedPairs(OfflinePairs):
    """Offline pairs whose batches carry each pair's weight in its optimiser step."""

    def __init__(self, weights: StepWeights, *pairs: Any, **settings: Any) -> None:
        """`pairs`, `settings`: as for `OfflinePairs`."""
        super().__init__(*pairs, **settings)
        self.weights = weights

    def batches(self, first_step: int = 0) -> Iterator[PairBatch]:
        """As of `OfflinePairs`, with weights."""
        spec, batches = self.spec, super().batches(first_step)
        for step in count(first_step):
            share = (spec.train_batch_size, spec.gradient_accumulation_steps, *astuple(spec.processes))
            for weight in self.weights(step, *share):
                yield replace(next(batches), terms=Terms(weight=weight))
