"""The calls of the networks: squared errors of policy and reference at the points of a probe.

A loss depends on the errors alone. So its gradient by the errors needs no graph through the network, and the network
can then be differentiated for a few points at a time:

    pass 1   all errors without grad               ->  E, loss(E), g = dloss/dE
    pass 2   for each chunk of points, with grad:      backward(Σ g · E)

The gradient of the parameters is the same. N points need the memory of one chunk, and one more forward per point.
Dropout would draw different masks in the two passes; `models/policy/networks.py` refuses such networks.

Where both sides of a probe share x_t and all conditioning (each side axis is an expanded view), a network is called
once for both, and its prediction is compared with both targets.

The data's terms of a pair act here, so that no objective has to apply them: the mask multiplies the squared errors
before their mean, and the weight multiplies the loss.
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
    """The two networks that an objective compares. Batches are flat: x "n c h w", t int64 [n]."""

    schedule: NoiseSchedule

    def policy(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Raw prediction of the tuned network, float32, through the wrapped (DDP) module."""
        ...

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Raw prediction of the frozen network, without grad, in the same dtypes and with the same kernels."""
        ...


Network = Callable[[Tensor, Tensor, Conditioning], Tensor]


def measure(models: Models, probe: Probe) -> Evidence:
    """Errors of policy and reference at every point: one forward of the reference, if needed, then one of the policy.

    The reference comes first, so that its activations are freed before the policy's graph is built.
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
    """Measures the errors, scores them, backpropagates scale · mean(loss), and returns both without graph.

    A probe with more points than its `points_per_forward` takes two passes, any other one pass. `no_sync` suppresses
    the gradient reduction of a wrapped module; every backward but the last runs inside it.
    """

    def loss(evidence: Evidence) -> tuple[Score, Tensor]:
        scored = weighed(score(evidence), evidence)
        return scored, scored.loss.mean() * scale

    if probe.points is not None and probe.points > (probe.points_per_forward or probe.points):
        evidence, scored = _two_passes(models, probe, loss, backward, no_sync)
    else:
        evidence = measure(models, probe)
        scored, total = loss(evidence)
        backward(total)
    return _detached(evidence), _detached_score(scored)


def _two_passes(
    models: Models,
    probe: Probe,
    loss: Callable[[Evidence], tuple[Score, Tensor]],
    backward: Callable[[Tensor], None],
    no_sync: Callable[[], AbstractContextManager[None]],
) -> tuple[Evidence, Score]:
    """All errors without grad and the slope of the loss at them, then a chunk of points at a time with grad."""
    assert probe.points_per_forward is not None
    chunks = point_chunks(probe, probe.points_per_forward)
    with torch.no_grad():
        reference = _reference_errors(models, probe, chunks)
        evidence = probe.evidence(joined_errors(models.policy, chunks), reference)
    leaf = evidence.policy.requires_grad_()
    scored, total = loss(replace(evidence, policy=leaf))
    (slope,) = torch.autograd.grad(total, leaf)
    for i, (chunk, g) in enumerate(zip(chunks, slope.split(probe.points_per_forward, dim=-1), strict=True)):
        with nullcontext() if i == len(chunks) - 1 else no_sync():
            backward((errors(models.policy, chunk) * g).sum())
    return evidence, scored


def weighed(score: Score, evidence: Evidence) -> Score:
    """The score, with each pair's loss multiplied by the pair's weight if the data have weights."""
    weight = evidence.terms.weight
    return score if weight is None else replace(score, loss=score.loss * weight.to(score.loss))


def ask_reference(models: Models, probes: list[Probe]) -> list[Probe]:
    """The probes of several micro-batches with the reference's errors added, from one forward over all their pairs.

    A forward without grad stores no activations, so its batch can be larger than the policy's. Other batch sizes may
    round differently: equal weights then give margins of the size of rounding errors instead of exactly 0. Probes with
    a point axis come back unchanged.
    """
    first = probes[0]
    if not first.needs_reference or first.reference is not None or first.points is not None or len(probes) == 1:
        return probes
    with torch.no_grad():
        found = errors(models.reference, cat(probes))
    sizes = [probe.t.shape[0] for probe in probes]
    return [replace(probe, reference=e) for probe, e in zip(probes, found.split(sizes, dim=1), strict=True)]


def errors(network: Network, probe: Probe) -> Tensor:
    """Mean over c, h, w of the squared difference of prediction and target: "side pair [point]", float32 or better.

    A mask multiplies the squared difference before the mean. The mean is not divided by the mask's sum.
    """
    return squared_errors(_predict(network, _asked_once(probe)), probe)


def squared_errors(prediction: Tensor, probe: Probe) -> Tensor:
    """The errors of predictions "side pair [point] c h w" at the points of a probe; see `errors`."""
    square = (prediction - probe.target) ** 2
    if probe.terms.mask is not None:
        places = probe.terms.mask.to(square)[:, None]  # "pair c h w", all channels alike
        square = square * (places if probe.points is None else places[:, None])
    return square.mean(dim=(-3, -2, -1))


def _asked_once(probe: Probe) -> Probe:
    """The probe with inputs of the first side alone if both sides have the same inputs; it still has both targets."""
    inputs = [probe.xt, *probe.cond.tensors(), *(() if probe.uncond is None else probe.uncond.tensors())]
    if not all(sides_share(x) for x in inputs):  # both sides always share t
        return probe
    one = probe.select(side=slice(0, 1))
    return replace(probe, xt=one.xt, cond=one.cond, uncond=one.uncond)


@torch.no_grad()
def predictions(network: Network, probe: Probe) -> Tensor:
    """Predictions of a network at all points, with guidance, shaped like x_t; `points_per_forward` points at a time."""
    points = probe.points
    if points is None:
        return _predict(network, probe)
    chunks = point_chunks(probe, probe.points_per_forward or points)
    return torch.cat([_predict(network, chunk) for chunk in chunks], dim=2)


def _reference_errors(models: Models, probe: Probe, chunks: list[Probe]) -> Tensor | None:
    """The reference's errors that the probe carries, or else those measured on its chunks; None without a reference."""
    if not probe.needs_reference:
        return None
    if probe.reference is not None:
        return probe.reference
    with torch.no_grad():
        return joined_errors(models.reference, chunks)


def joined_errors(network: Network, chunks: list[Probe]) -> Tensor:
    """The errors of all chunks, joined along the point axis."""
    found = [errors(network, chunk) for chunk in chunks]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _predict(network: Network, probe: Probe) -> Tensor:
    """Prediction of a network at all points, with guidance, shaped like the probe's x_t."""
    lead = probe.xt.shape[:-3]  # side, pair and, where there is one, point
    xt = probe.xt.flatten(0, len(lead) - 1)
    t = probe.t.expand(lead).flatten().to(xt.device, non_blocking=True)
    cond = _flat_conditioning(probe.cond, probe.points)
    if probe.guidance == 1.0:
        prediction = network(xt, t, cond)
    else:
        prediction = guided(network, xt, t, cond, probe.guidance, _null_conditioning(probe))
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32)).unflatten(0, lead)


def guided(
    network: Network, xt: Tensor, t: Tensor, cond: Conditioning, guidance: float, uncond: Conditioning | None
) -> Tensor:
    """Raw prediction for a flat batch with classifier-free guidance (arXiv 2207.12598), in one forward of 2n rows.

    Without a null prompt, or with guidance 1, it is the conditional prediction, in a forward of n rows.
    """
    if uncond is None or guidance == 1.0:
        return network(xt, t, cond)
    both = network(torch.cat([xt, xt]), torch.cat([t, t]), cond.followed_by(uncond))
    conditional, unconditional = both.unflatten(0, (2, -1))
    return unconditional + guidance * (conditional - unconditional)


def _null_conditioning(probe: Probe) -> Conditioning:
    """Flat; raises DiffalignError where the probe has none."""
    if probe.uncond is None:
        raise DiffalignError(
            f"guidance = {probe.guidance} needs the null prompt's conditioning; set Probe.uncond, or guidance = 1"
        )
    return _flat_conditioning(probe.uncond, probe.points)


def _flat_conditioning(cond: Conditioning, points: int | None) -> Conditioning:
    if points is not None:
        cond = cond.map(lambda x: x.unsqueeze(2).expand((*x.shape[:2], points, *x.shape[2:])).flatten(1, 2))
    return cond.flatten()


def point_chunks(probe: Probe, size: int) -> list[Probe]:
    """The probe cut along its point axis into probes of at most `size` points."""
    return [probe.select(point=slice(start, start + size)) for start in range(0, probe.points or 1, size)]


def _detached(evidence: Evidence) -> Evidence:
    return replace(evidence, policy=evidence.policy.detach())


def _detached_score(score: Score) -> Score:
    return replace(score, loss=score.loss.detach(), logit=None if score.logit is None else score.logit.detach())
