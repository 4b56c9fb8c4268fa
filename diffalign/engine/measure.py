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

Some losses depend on two more numbers, which are computed for those alone (`Probe.needs_distance`, `needs_alignment`):
the squared distance between the predictions of policy and reference on each side, and the inner product of the sides'
gradients in the space of predictions, where a masked error has the gradient mask · e.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    return compare(_with_reference(models, probe), _predict(models.policy, _asked_once(probe)))


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
    with torch.no_grad():
        chunks, evidence = seen_in_chunks(models, probe, point_chunks(probe, probe.points_per_forward))
    evidence, leaves = with_leaves(evidence)
    scored, total = loss(evidence)
    slopes = torch.autograd.grad(total, leaves)
    parts = zip(*(slope.split(probe.points_per_forward, dim=-1) for slope in slopes), strict=True)
    for i, (chunk, slope) in enumerate(zip(chunks, parts, strict=True)):
        with nullcontext() if i == len(chunks) - 1 else no_sync():
            backward(along(chunk, models.policy, slope))
    return evidence, scored


def seen_in_chunks(models: Models, probe: Probe, chunks: list[Probe]) -> tuple[list[Probe], Evidence]:
    """The chunks with the reference's part in each, and the evidence of all of them; call it without grad.

    What is kept of a point is no more than its x_t and target: where the loss depends on the distance between the
    networks, the reference's prediction.
    """
    chunks = [_with_reference(models, chunk) for chunk in chunks]
    parts = [compare(chunk, _predict(models.policy, _asked_once(chunk))) for chunk in chunks]
    if len(parts) == 1:
        return chunks, parts[0]

    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values, dim=-1)

    whole = probe.evidence(torch.cat([part.policy for part in parts], dim=-1), joined("reference"))
    return chunks, replace(whole, distance=joined("distance"), alignment=joined("alignment"))


def with_leaves(evidence: Evidence) -> tuple[Evidence, list[Tensor]]:
    """The evidence with its parts that carry grad as leaves, and these: the slope of a loss is its gradient there."""
    policy = evidence.policy.detach().requires_grad_()
    distance = None if evidence.distance is None else evidence.distance.detach().requires_grad_()
    leaves = [policy] if distance is None else [policy, distance]
    return replace(evidence, policy=policy, distance=distance), leaves


def along(probe: Probe, network: Network, slopes: Sequence[Tensor]) -> Tensor:
    """Σ slope · part over the parts of the evidence that carry grad: its gradient is the loss's, at these points."""
    seen = compare(probe, _predict(network, _asked_once(probe)))
    total = (seen.policy * slopes[0]).sum()
    return total if seen.distance is None else total + (seen.distance * slopes[1]).sum()


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
    sizes = [probe.t.shape[0] for probe in probes]
    with torch.no_grad():
        whole = cat(probes)
        answer = _predict(models.reference, _asked_once(whole))
        found = squared_errors(answer, whole).split(sizes, dim=1)
    answers = answer.split(sizes, dim=1) if first.needs_distance else [None] * len(probes)
    return [replace(p, reference=e, reference_answer=a) for p, e, a in zip(probes, found, answers, strict=True)]


def errors(network: Network, probe: Probe) -> Tensor:
    """Mean over c, h, w of the squared difference of prediction and target: "side pair [point]", float32 or better.

    A mask multiplies the squared difference before the mean. The mean is not divided by the mask's sum.
    """
    return squared_errors(_predict(network, _asked_once(probe)), probe)


def squared_errors(prediction: Tensor, probe: Probe) -> Tensor:
    """The errors of predictions "side pair [point] c h w" at the points of a probe; see `errors`."""
    return _masked_mean((prediction - probe.target) ** 2, probe)


def compare(probe: Probe, prediction: Tensor) -> Evidence:
    """The evidence of the policy's predictions "side pair [point] c h w" and of the reference's part in the probe.

    Where both sides have the same inputs, one side of a prediction is enough. Raises DiffalignError where the loss
    depends on the distance between the networks and only the reference's errors are known.
    """
    evidence = probe.evidence(squared_errors(prediction, probe), probe.reference)
    if probe.needs_distance:
        if probe.reference_answer is None:
            raise DiffalignError(
                "the loss depends on the distance between policy and reference, and only the reference's errors were "
                "cached; set data.cache_reference_errors: false, or remove what asks for the distance"
            )
        apart = _masked_mean((prediction - probe.reference_answer) ** 2, probe)
        evidence = replace(evidence, distance=apart.expand(evidence.policy.shape))
    if probe.needs_alignment:
        gradient = _masked(prediction.detach() - probe.target, probe)  # of each error in its prediction, but for 2/chw
        evidence = replace(evidence, alignment=(gradient[:1] * gradient).mean(dim=(-3, -2, -1)))
    return evidence


def _masked_mean(square: Tensor, probe: Probe) -> Tensor:
    return _masked(square, probe).mean(dim=(-3, -2, -1))


def _masked(x: Tensor, probe: Probe) -> Tensor:
    """ "side pair [point] c h w" times the mask "pair h w", all channels alike."""
    if probe.terms.mask is None:
        return x
    places = probe.terms.mask.to(x)[:, None]
    return x * (places if probe.points is None else places[:, None])


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


def _with_reference(models: Models, probe: Probe) -> Probe:
    """The probe with the reference's part in its evidence, which the reference is asked for where it is not known."""
    if not probe.needs_reference or probe.reference is not None:
        return probe
    with torch.no_grad():
        answer = _predict(models.reference, _asked_once(probe))
        known = answer if probe.needs_distance else None
        return replace(probe, reference=squared_errors(answer, probe), reference_answer=known)


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
    distance = None if evidence.distance is None else evidence.distance.detach()
    return replace(evidence, policy=evidence.policy.detach(), distance=distance)


def _detached_score(score: Score) -> Score:
    return replace(score, loss=score.loss.detach(), logit=None if score.logit is None else score.logit.detach())
