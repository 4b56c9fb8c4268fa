"""The direction of an objective before its first step: its gradient beside Diffusion-DPO's on the same pairs.

At the start every objective of the DPO family has the loss log 2; only the gradients differ. For each quarter of the
timestep range, and for all of it:

    cosine       of the objective's mean gradient with DPO's, on the same pairs and timesteps
    DPO, again   of DPO's gradient with itself under other noise: below 1 because of noise alone
    ratio        of the norms
    noise std    of the noise that the network should have predicted: 1 for drawn noise
    error        of the policy there, chosen and rejected side

A cosine needs no training run and does not replace one: it describes the first step in the space of raw weights.
Memory: twelve gradients; use LoRA for a large model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.engine.measure import Models, along, point_chunks, seen_in_chunks, weighed, with_leaves
from diffalign.engine.random import pair_key
from diffalign.errors import DiffalignError
from diffalign.io.progress import Progress
from diffalign.models.policy.networks import Networks
from diffalign.objectives import DiffusionDPO, Objective
from diffalign.objectives.base import ask
from diffalign.training.build import Run
from diffalign.training.metrics import QUARTERS
from diffalign.types import CHOSEN, REJECTED, PairBatch, Probe


@dataclass(frozen=True)
class Direction:
    """One quarter of the timestep range, or all of it."""

    low: int
    high: int
    cosine: float | None  # None where one of the gradients is zero
    cosine_dpo: float | None
    norm_ratio: float | None
    noise_std: tuple[float, float]  # chosen, rejected; nan where no point fell into the quarter
    error: tuple[float, float]
    error_dpo: tuple[float, float]  # at the points of Diffusion-DPO


def diagnose(run: Run, batches: int = 8) -> list[Direction]:
    """The four quarters and then the whole range, from so many micro-batches of the run's data.

    Raises ValueError under several processes: gradients of a wrapped network belong to its backward pass.
    """
    if run.accelerator.num_processes > 1:
        raise DiffalignError("diagnose runs in one process; start it without a launcher")
    dpo = DiffusionDPO(beta=getattr(run.objective, "beta", 2000.0))
    own, plain, again = _Sums(run), _Sums(run), _Sums(run)
    source = run.source.batches(0)
    for _ in Progress(range(batches), desc="gradients", unit=" batches"):
        batch = next(source).to(run.accelerator.device)
        if (images := len(batch.latents)) != 2:
            raise DiffalignError(
                f"diagnose compares both sides of pairs, and {run.config.data.path} has lists of {images} images; "
                "diagnose a run on pairs"
            )
        own.add(run.objective, batch)
        plain.add(dpo, batch)
        again.add(dpo, replace(batch, keys=_other_noise(batch.keys)))
    T = run.networks.schedule.num_train_timesteps
    edges = [T * q // QUARTERS for q in range(QUARTERS + 1)]
    spans = [(edges[q], edges[q + 1], slice(q, q + 1)) for q in range(QUARTERS)] + [(0, T, slice(0, QUARTERS))]
    found = []
    for low, high, part in spans:
        g, d, a = (sums.gradient[part].sum(0) for sums in (own, plain, again))
        norm = float(d.norm())
        found.append(
            Direction(
                low=low,
                high=high,
                cosine=_cosine(g, d),
                cosine_dpo=_cosine(a, d),
                norm_ratio=float(g.norm()) / norm if norm else None,
                noise_std=own.mean("square", part, root=True),
                error=own.mean("error", part),
                error_dpo=plain.mean("error", part),
            )
        )
    return found


def directions_table(found: list[Direction]) -> str:
    """The quarters and the whole range as a Markdown table, chosen / rejected where there are two figures."""
    head = ("t", "cosine with DPO", "DPO, again", "norm ratio", "noise std", "error", "error of DPO's points")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for d in found:
        cosines = ("no gradient" if c is None else f"{c:+.2f}" for c in (d.cosine, d.cosine_dpo))
        ratio = "-" if d.norm_ratio is None else f"{d.norm_ratio:.2f}"
        sides = (f"{c:.{n}f} / {r:.{n}f}" for (c, r), n in ((d.noise_std, 2), (d.error, 4), (d.error_dpo, 4)))
        lines.append(f"| {d.low}-{d.high} | {' | '.join((*cosines, ratio, *sides))} |")
    return "\n".join(lines)


def direction_values(found: list[Direction]) -> list[dict[str, Any]]:
    """The same for a JSON file."""
    return [asdict(d) for d in found]


class _SelfReferenced:
    """The networks of a run without a reference, with the policy in its place."""

    def __init__(self, networks: Networks) -> None:
        self.schedule = networks.schedule
        self.policy = self.reference = networks.policy


class _Sums:
    """Gradients and errors of one objective, by quarter of the timestep range."""

    def __init__(self, run: Run) -> None:
        self.run = run
        size = sum(p.numel() for p in run.parameters)
        self.gradient = torch.zeros(QUARTERS, size, device=run.accelerator.device)
        self._totals = {name: torch.zeros(2, QUARTERS, dtype=torch.float64) for name in ("error", "square", "count")}

    def add(self, objective: Objective, batch: PairBatch) -> None:
        """One micro-batch. A loss depends on the errors alone, so its slope there sorts the gradient by timestep."""
        networks, parameters = self.run.networks, self.run.parameters
        probe = ask(objective, batch, networks)
        quarter = (probe.t * QUARTERS // networks.schedule.num_train_timesteps).expand(probe.xt.shape[:-3])
        size = probe.points_per_forward or probe.points or 1
        chunks = [probe] if probe.points is None else point_chunks(probe, size)
        # a run that has no reference starts where DPO's would be: at the policy's own errors
        models: Models = _SelfReferenced(networks) if self.run.reference_kind == "none" else networks
        with torch.no_grad():
            chunks, evidence = seen_in_chunks(models, probe, chunks)
        evidence, leaves = with_leaves(evidence)
        slopes = torch.autograd.grad(weighed(objective.score(evidence), evidence).loss.mean(), leaves)
        for q in range(QUARTERS):
            inside = (quarter == q).to(slopes[0].device)
            if not bool(inside.any()):
                continue
            weights = [slope * inside for slope in slopes]
            parts = [weights] if probe.points is None else zip(*(w.split(size, -1) for w in weights))
            for chunk, part in zip(chunks, parts):
                grads = torch.autograd.grad(along(chunk, networks.policy, part), parameters, allow_unused=True)
                flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]
                self.gradient[q] += torch.cat([g.flatten() for g in flat]).float()
        self._observe(probe, evidence.policy.detach(), quarter)

    def mean(self, name: str, part: slice, root: bool = False) -> tuple[float, float]:
        """Chosen and rejected side's mean over the points of some quarters."""
        value = self._totals[name][:, part].sum(1) / self._totals["count"][:, part].sum(1)
        value = value.sqrt() if root else value
        return float(value[CHOSEN]), float(value[REJECTED])

    def _observe(self, probe: Probe, error: Tensor, quarter: Tensor) -> None:
        noise = self.run.networks.schedule.to_eps(probe.target, probe.xt, probe.t.expand(quarter.shape))
        square = (noise**2).mean((-3, -2, -1))
        for q in range(QUARTERS):
            inside = (quarter == q).to(error.device)
            for name, value in (("error", error), ("square", square), ("count", torch.ones_like(error))):
                total = torch.where(inside, value, 0).double().flatten(1).sum(1).cpu()
                self._totals[name][: len(total), q] += total


def _cosine(a: Tensor, b: Tensor) -> float | None:
    a, b = a.double(), b.double()
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms else None


def _other_noise(keys: Tensor) -> Tensor:
    """Keys of the same visits with other draws; t is drawn anew as well."""
    return torch.tensor([pair_key(1, str(int(key)), 0) for key in keys], dtype=torch.int64)
