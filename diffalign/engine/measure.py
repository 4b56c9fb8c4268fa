"""Where networks are called: squared errors of policy and reference at the points of a probe.

A loss depends on the errors alone, so its gradient at the errors can be had without building any graph through
the network, and the network can then be differentiated a few points at a time:

    pass 1   all errors without grad           ->  E, loss(E), g = dloss/dE
    pass 2   for each chunk of points, with grad:  backward(Σ g · E)

The parameter gradient is the same and N points cost the memory of one chunk, for one more forward per point.
A network with dropout would draw different masks in the two passes; `models/policy/networks.py` refuses one.

Where the sides of a probe share x_t and all conditioning (the side axis of each is an expanded view), a network is
asked once for both, and its answer is compared with both targets.

What the data say of a pair acts here, so that no objective needs to know: its mask multiplies the squared errors
before their mean, and its weight the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from diffalign.engine.schedule import NoiseSchedule
from diffalign.errors import DiffalignError
from diffalign.types import Conditioning, Evidence, Probe, Score, cat, sides_share


class Models(Protocol):
    """The two networks an objective compares. Batches are flat: x "n c h w", t int64 [n]."""

    schedule: NoiseSchedule

    def policy(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The tuned network's raw prediction, float32, through the wrapped (DDP) module."""
        ...

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The frozen network's raw prediction on the same dtype path and kernels, without grad."""
        ...


Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


def measure(models: Models, probe: Probe) -> Evidence:
    """Policy and reference errors at every point: one reference forward (if any), then one policy forward.

    The reference goes first so that its activations are gone before the policy's graph is built.
    """
    reference = _reference_errors(models, probe, [probe])
    return probe.evidence(errors(models.policy, probe), reference)


def measure_and_backward(
    models: Models,
    probe: Probe,
    score: Callable[[Evidence], Score],
    *,
    scale: float = 1.0,
    backward: Callable[[Tensor], None] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Evidence, Score]:
    """Measures, scores, weighs and backpropagates scale · mean(loss); evidence and score come back without graph.

    A probe with more points than its `points_per_forward` goes in two passes, any other the direct way. `no_sync`
    suppresses gradient reduction of a wrapped module and is entered for every backward but the last.
    """
    points, points_per_forward = probe.points, probe.points_per_forward
    if points is None or points_per_forward is None or points_per_forward >= points:
        evidence = measure(models, probe)
        scored = weighed(score(evidence), evidence)
        backward(scored.loss.mean() * scale)
        return _detached(evidence), _detached_score(scored)

    chunks = point_chunks(probe, points_per_forward)
    with torch.no_grad():
        reference = _reference_errors(models, probe, chunks)
        evidence = probe.evidence(joined_errors(models.policy, chunks), reference)
    leaf = evidence.policy.requires_grad_()
    scored = weighed(score(replace(evidence, policy=leaf)), evidence)
    (slope,) = torch.autograd.grad(scored.loss.mean() * scale, leaf)
    for i, (chunk, g) in enumerate(zip(chunks, slope.split(points_per_forward, dim=-1), strict=True)):
        with nullcontext() if i == len(chunks) - 1 else no_sync():
            backward((errors(models.policy, chunk) * g).sum())
    return _detached(evidence), _detached_score(scored)


def weighed(score: Score, evidence: Evidence) -> Score:
    """The score with each pair's loss multiplied by its weight, where the data have weights."""
    weight = evidence.terms.weight
    return score if weight is None else replace(score, loss=score.loss * weight.to(score.loss))


def ask_reference(models: Models, probes: list[Probe]) -> list[Probe]:
    """The probes of several micro-batches with the reference's errors in them, from one forward over all their pairs.

    A forward without grad keeps nothing, so it can be larger than the policy's. Its kernels may round otherwise: equal
    weights then give margins of rounding's size in place of exactly 0. A probe with points is asked by its own chunks.
    """
    first = probes[0]
    if not first.needs_reference or first.reference is not None or first.points is not None or len(probes) == 1:
        return probes
    with torch.no_grad():
        found = errors(models.reference, cat(probes))
    sizes = [probe.t.shape[0] for probe in probes]
    return [replace(probe, reference=e) for probe, e in zip(probes, found.split(sizes, dim=1), strict=True)]


def errors(network: Network, probe: Probe) -> Tensor:
    """Mean over c, h, w of the squared difference from the target: "side pair [point]", float32 or better.

    With a mask, the mean of the squared difference times the mask; it is not divided by the mask's sum.
    """
    return squared_errors(_predict(network, _asked_once(probe)), probe)


def squared_errors(prediction: Tensor, probe: Probe) -> Tensor:
    """The errors of predictions "side pair [point] c h w" that were made at a probe's points; see `errors`."""
    square = (prediction - probe.target) ** 2
    if probe.terms.mask is not None:
        places = probe.terms.mask.to(square)[:, None]  # "pair c h w", all channels alike
        square = square * (places if probe.points is None else places[:, None])
    return square.mean(dim=(-3, -2, -1))


def _asked_once(probe: Probe) -> Probe:
    """The probe at its first side alone, where both sides ask the same of the network; its targets stay two."""
    inputs = [probe.xt, *probe.cond.tensors(), *(() if probe.uncond is None else probe.uncond.tensors())]
    if not all(sides_share(x) for x in inputs):  # t is theirs in common anyway
        return probe
    one = probe.select(side=slice(0, 1))
    return replace(probe, xt=one.xt, cond=one.cond, uncond=one.uncond)


@torch.no_grad()
def predictions(network: Network, probe: Probe) -> Tensor:
    """The network's (guided) predictions at all points, shaped like x_t; `points_per_forward` of them at a time."""
    points = probe.points
    if points is None:
        return _predict(network, probe)
    chunks = point_chunks(probe, probe.points_per_forward or points)
    return torch.cat([_predict(network, chunk) for chunk in chunks], dim=2)


def _reference_errors(models: Models, probe: Probe, chunks: list[Probe]) -> Tensor | None:
    """The errors that the probe brings along, or else the reference's own answers to its chunks."""
    if not probe.needs_reference:
        return None
    if probe.reference is not None:
        return probe.reference
    with torch.no_grad():
        return joined_errors(models.reference, chunks)


def joined_errors(network: Network, chunks: list[Probe]) -> Tensor:
    """The errors of the chunks as those of the probe they were cut from."""
    found = [errors(network, chunk) for chunk in chunks]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _predict(network: Network, probe: Probe) -> Tensor:
    """The network's (guided) prediction at all points, shaped like the probe's x_t."""
    lead = probe.xt.shape[:-3]  # side, pair and, where there is one, point
    xt = probe.xt.flatten(0, len(lead) - 1)
    t = probe.t.expand(lead).flatten().to(xt.device, non_blocking=True)
    cond = _flat_conditioning(probe.cond, probe.points)
    null = None
    if probe.guidance != 1.0:
        if probe.uncond is None:
            raise DiffalignError(f"guidance = {probe.guidance} needs the null prompt's conditioning (Probe.uncond)")
        null = _flat_conditioning(probe.uncond, probe.points)
    prediction = guided(network, xt, t, cond, probe.guidance, null)
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32)).unflatten(0, lead)


def guided(
    network: Network, xt: Tensor, t: Tensor, cond: Conditioning, guidance: float, uncond: Conditioning | None
) -> Tensor:
    """A flat batch's raw prediction with classifier-free guidance: one forward of twice the rows.

    Without a null prompt, or with guidance 1, the conditional prediction alone.
    """
    if uncond is None or guidance == 1.0:
        return network(xt, t, cond)
    both = network(torch.cat([xt, xt]), torch.cat([t, t]), cond.followed_by(uncond))
    conditional, unconditional = both.unflatten(0, (2, -1))
    return unconditional + guidance * (conditional - unconditional)


def _flat_conditioning(cond: Conditioning, points: int | None) -> Conditioning:
    if points is not None:
        cond = cond.map(lambda x: x.unsqueeze(2).expand((*x.shape[:2], points, *x.shape[2:])).flatten(1, 2))
    return cond.flatten()


def point_chunks(probe: Probe, size: int) -> list[Probe]:
    """The probe cut along its point axis."""
    return [probe.select(point=slice(start, start + size)) for start in range(0, probe.points or 1, size)]


def _detached(evidence: Evidence) -> Evidence:
    return replace(evidence, policy=evidence.policy.detach())


def _detached_score(score: Score) -> Score:
    return replace(score, loss=score.loss.detach(), logit=None if score.logit is None else score.logit.detach())
