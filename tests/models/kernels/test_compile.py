"""Compiled blocks: the same numbers, one graph for each shape and network, and unchanged names.

With the backends `eager` and `aot_eager`, which trace and differentiate as inductor does and generate no code.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from diffalign.models.adapters.lora import add_lora
from diffalign.models.kernels.checkpointing import set_checkpointing
from diffalign.models.kernels.compile import compile_blocks
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import LoraOff
from tests.models.conftest import Model, move_lora


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def step(model: Model, unet, networks: Networks) -> list[torch.Tensor]:
    """Reference, policy, and the gradients of one step."""
    unet.zero_grad()
    reference = networks.reference(model.xt, model.t, model.cond)
    policy = networks.policy(model.xt, model.t, model.cond)
    (policy - reference).square().mean().backward()
    return [reference, policy.detach(), *(p.grad.clone() for p in unet.parameters() if p.requires_grad)]


def lora_networks(model: Model):
    unet = model.unet().train()
    add_lora(unet, rank=4)
    networks = Networks(unet, family=model.base.family, schedule=model.base.schedule, reference=LoraOff(unet))
    return unet, networks


def test_policy_and_reference_have_their_own_graphs_and_compile_once(models: dict[str, Model]) -> None:
    """Of SDXL, which has all blocks that are compiled: SD's are of the same classes and settings."""
    model = models["sdxl"]
    unet, networks = lora_networks(model)
    names = list(unet.state_dict())
    at_start = step(model, unet, networks)
    assert torch.equal(at_start[0], at_start[1])
    move_lora(unet)
    plain = step(model, unet, networks)
    graphs: list[int] = []

    def counting(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    blocks = compile_blocks(unet, counting)
    assert blocks > 4
    first = step(model, unet, networks)
    compiled = len(graphs)
    assert 0 < compiled <= 2 * blocks
    for _ in range(2):
        for a, b in zip(step(model, unet, networks), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # traced: another code path
    assert len(graphs) == compiled  # LoRA was switched off and on, and nothing was compiled again
    assert not torch.equal(first[0], first[1])  # the switch was seen by the compiled blocks
    assert list(unet.state_dict()) == names


def test_compiled_blocks_differentiate_under_checkpointing(models: dict[str, Model]) -> None:
    model = models["sdxl"]
    unet, networks = lora_networks(model)
    move_lora(unet)
    plain = step(model, unet, networks)
    compile_blocks(unet, "aot_eager")
    set_checkpointing(unet, "full")
    for a, b in zip(step(model, unet, networks), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
