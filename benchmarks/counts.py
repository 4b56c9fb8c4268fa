"""The computation that a training step needs, counted on the meta device: SDXL in its real size takes seconds.

Useful FLOPs per pair = rows evaluated with grad · (forward + backward) + rows evaluated without grad · forward. A row
is one sample in a network's batch. If both sides of a pair are rows, the keys and values of their common prompt count
once. Work that is repeated to save memory does not count (gradient checkpointing, the second pass of a chunked
objective). Multiplications and additions count separately, as in all published figures. Attention counts as its two
products in the forward and four in the backward. All operations except matrix products, convolutions and attention are
left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, flop_registry

from diffalign.engine.measure import measure_and_backward
from diffalign.engine.random import pair_key
from diffalign.engine.schedule import NoiseSchedule
from diffalign.models.adapters.lora import add_lora, fuse_lora, lora_layers
from diffalign.models.kernels.attention import set_attention
from diffalign.objectives.base import ask
from diffalign.training.inspect.meta_forward import unet_inputs
from diffalign.types import Conditioning, PairBatch, Transitions
from tests.gpu_models import SDXL_SCHEDULER


@dataclass(frozen=True)
class NetworkFlops:
    """FLOPs of one row."""

    forward: int  # of the frozen network
    policy_forward: int  # LoRA included
    backward: int


@dataclass(frozen=True)
class Rows:
    """Rows asked of the networks for each pair."""

    policy: int  # with grad
    policy_no_grad: int
    reference: int
    policy_calls: int
    reference_calls: int
    shared_text: bool  # every forward with grad, and the reference's, had both sides of a pair and their one prompt


# LoRA's update is added in place, which torch's own table has no entry for.
_FORMULAS = {**flop_registry, torch.ops.aten.addmm_: addmm_flop}


class Flops(TorchDispatchMode):
    """Sums the FLOPs of what is called; torch's FlopCounterMode without its module tracking, which takes minutes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator and adds its count."""
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def meta_unet(config: dict[str, Any], lora_rank: int | None) -> nn.Module:
    """The UNet of a config without weights; with a LoRA of that rank, or all of it trained."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    set_attention(unet, "auto", "cpu")
    if lora_rank is None:
        return unet.requires_grad_(True).train()
    add_lora(unet, lora_rank)
    fuse_lora(unet)
    return unet.train()


def flops_of(unet: nn.Module, side: int, sharing: int = 1) -> NetworkFlops:
    """Counts one row of a UNet on the meta device, at latents of `side` x `side`; so many rows share a prompt."""
    inputs, layers = unet_inputs(unet, sharing, side, prompts=1), lora_layers(unet)
    with Flops() as policy:
        out = unet(**inputs)[0]
    with Flops() as backward:
        out.sum().backward()
    forward = policy
    if layers:
        for layer in layers:
            layer._disable_adapters = True
        with torch.no_grad(), Flops() as forward:
            unet(**inputs)
        for layer in layers:
            layer._disable_adapters = False
    return NetworkFlops(*(counted.total // sharing for counted in (forward, policy, backward)))


class _Asked(nn.Module):
    """Both networks of a step, as a sum that costs nothing and counts its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.schedule = NoiseSchedule.from_config(SDXL_SCHEDULER)
        self.rows = dict.fromkeys(("policy", "policy_no_grad", "reference"), 0)
        self.calls = dict.fromkeys(("policy", "reference"), 0)
        self.shared_text = True

    def policy(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if torch.is_grad_enabled():
            self.shared_text &= cond.distinct_prompts is not None
        self.rows["policy" if torch.is_grad_enabled() else "policy_no_grad"] += len(xt)
        self.calls["policy"] += 1
        return xt * 0.5 + self.shift

    def reference(self, xt: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.shared_text &= cond.distinct_prompts is not None
        self.rows["reference"] += len(xt)
        self.calls["reference"] += 1
        return xt * 0.5


def random_pairs(pairs: int, side: int = 4, channels: int = 4, shared_start: bool = True) -> PairBatch:
    """A batch with all that any objective may ask for: null prompt, scores, transitions."""
    g = torch.Generator().manual_seed(0)
    shape = (channels, side, side)
    embeds = torch.randn(1, pairs, 3, 5, generator=g).expand(2, -1, -1, -1)
    noisy = torch.randn(1, pairs, *shape, generator=g).expand(2, *(-1,) * 4)
    return PairBatch(
        latents=torch.randn(2, pairs, *shape, generator=g),
        cond=Conditioning(embeds),
        keys=torch.tensor([pair_key(0, f"pair-{i}", 0) for i in range(pairs)]),
        uncond=Conditioning(torch.zeros_like(embeds)),
        scores=torch.rand(2, pairs, generator=g),
        transitions=Transitions(
            noisy=noisy if shared_start else noisy.clone(),
            clean=torch.randn(2, pairs, *shape, generator=g),
            t=torch.full((pairs,), 501),
            t_prev=torch.full((pairs,), 451),
        ),
    )


def objective_rows(objective: Any, *, recompute: bool = False, transitions: bool = False) -> Rows:
    """What an objective asks of the networks for a pair.

    recompute: count the first pass of a chunked objective too, which is done again with grad.
    transitions: the batch carries recorded transitions, as SPO's always does and a kept inversion's may.
    """
    if not recompute and getattr(objective, "points_per_forward", None) is not None:
        objective = dataclasses.replace(objective, points_per_forward=None)
    pairs, asked = 2, _Asked()
    batch = random_pairs(pairs)
    if not transitions:
        batch = dataclasses.replace(batch, transitions=None)
    with torch.no_grad():
        probe = ask(objective, batch, asked)
    measure_and_backward(asked, probe, objective.score)
    per_pair = {name: rows // pairs for name, rows in asked.rows.items()}
    return Rows(
        **per_pair,
        policy_calls=asked.calls["policy"],
        reference_calls=asked.calls["reference"],
        shared_text=asked.shared_text,
    )


def useful_flops(rows: Rows, network: NetworkFlops) -> int:
    """FLOPs per pair that training cannot do without."""
    with_grad = rows.policy * (network.policy_forward + network.backward)
    return with_grad + rows.policy_no_grad * network.policy_forward + rows.reference * network.forward


def forward_equivalents(rows: Rows) -> int:
    """A pair's work in forwards of one row, a backward counted as two (full tuning)."""
    return 3 * rows.policy + rows.policy_no_grad + rows.reference


class Operators(TorchDispatchMode):
    """Counts operators below autograd, views included: what Python and the dispatcher pay for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One more."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def kept_bytes(unet: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes that a forward keeps for its backward, weights apart, every storage once."""
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor is held, so that its storage's address stays its own

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = unet(**inputs)[0]
    del out
    return sum(size for size, _ in kept.values())


def least_bytes(unet: nn.Module, rows: Rows, kept: int, pairs: int, calls: int) -> int:
    """Bytes that a step cannot help moving: weights at every pass, what is kept written and read once, Adam's state.

    kept: of one row. calls: passes over the weights in a step, a backward counted as one.
    """
    weights = sum(p.numel() * p.element_size() for p in unet.parameters())
    trained = sum(p.numel() * p.element_size() for p in unet.parameters() if p.requires_grad)
    return calls * weights + 2 * kept * rows.policy * pairs + 7 * trained  # read p, g, m, v; write p, m, v
