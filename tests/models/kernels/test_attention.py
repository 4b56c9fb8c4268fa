from __future__ import annotations

import importlib.util

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.models.adapters.lora import add_lora, lora_parameters
from diffalign.models.kernels.attention import PinnedAttention, cross_attentions, set_attention, shares_text
from diffalign.models.kernels.checkpointing import set_checkpointing
from diffalign.models.loading.family import ModelError
from diffalign.models.policy.networks import Networks
from tests.models.conftest import Model, move_lora

FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Calls(TorchDispatchMode):
    """Counts of the attention kernels that really run."""

    def __init__(self):
        super().__init__()
        self.flash = self.flash_backward = self.softmax = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.flash += name == FLASH
        self.flash_backward += name == FLASH + "_backward"
        self.softmax += "softmax" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


def lora_unet(model: Model) -> torch.nn.Module:
    unet = model.unet()
    add_lora(unet, rank=4, alpha=8)
    move_lora(unet)
    return unet


def step(model: Model, unet) -> tuple[Calls, torch.Tensor, torch.Tensor]:
    """What ran in a forward and backward pass, the prediction, and one gradient."""
    networks = Networks(unet, family=model.base.family, schedule=model.base.schedule)
    with Calls() as calls:
        out = networks.policy(model.xt, model.t, model.cond)
        out.square().mean().backward()
    return calls, out.detach(), lora_parameters(unet)[-1].grad


def attentions(unet) -> int:
    return len(unet.attn_processors)


def test_the_kernel_asked_for_is_the_kernel_that_runs(model: Model):
    for backend, runs_flash in (("flash", True), ("math", False), ("auto", True)):
        unet = lora_unet(model)
        set_attention(unet, backend, "cpu")
        calls, _, _ = step(model, unet)
        n = attentions(unet)
        assert (calls.flash, calls.flash_backward) == ((n, n) if runs_flash else (0, 0)), backend
        assert calls.softmax == (0 if runs_flash else n), backend


def test_backends_agree(model: Model):
    results = []
    for backend in ("auto", "flash", "math"):
        unet = lora_unet(model)
        set_attention(unet, backend, "cpu")
        results.append(step(model, unet)[1:])
    for out, gradient in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1e-6)


def test_recomputation_in_the_backward_pass_uses_the_same_kernel(model: Model):
    unet = lora_unet(model)
    set_attention(unet, "math", "cpu")
    set_checkpointing(unet, "full")
    calls, _, _ = step(model, unet)
    assert calls.flash == 0
    assert calls.softmax == 2 * attentions(unet)


def test_nothing_outside_the_unet_is_changed(model: Model):
    unet = lora_unet(model)
    set_attention(unet, "math", "cpu")
    q = torch.randn(1, 2, 5, 8)
    with Calls() as calls:
        step(model, unet)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert calls.flash == 1


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_prompt_of_both_sides_is_projected_once(model: Model, backend, checkpointing):
    """Keys and values of half the rows; prediction and gradients are those of the prompts given twice."""
    found = []
    for sharing in (False, True):
        unet = lora_unet(model)
        set_attention(unet, backend, "cpu")
        set_checkpointing(unet, checkpointing)
        networks = Networks(unet, family=model.base.family, schedule=model.base.schedule)
        assert networks.shares_text
        networks.shares_text = sharing
        pairs = len(model.xt)
        cond = model.cond.map(lambda x: x.expand(2, *x.shape)).flatten()
        xt = torch.cat([model.xt, model.xt.flip(0) * 0.5])
        with Rows(unet) as rows:
            out = networks.policy(xt, model.t.repeat(2), cond)
            out.square().mean().backward()
        assert rows.seen == {pairs if sharing else 2 * pairs}
        found.append((out.detach(), [p.grad for p in lora_parameters(unet)]))
    (out, gradients), (once, gradients_once) = found
    torch.testing.assert_close(once, out, rtol=1e-5, atol=1e-5)
    for g, g_once in zip(gradients, gradients_once, strict=True):
        torch.testing.assert_close(g_once, g, rtol=1e-3, atol=1e-6)


class Rows:
    """How many rows of text the keys of cross-attention are made of."""

    def __init__(self, unet):
        self.seen = set()
        self.layers = [layer.to_k for layer in cross_attentions(unet)]

    def __enter__(self):
        def see(module, args):
            self.seen.add(len(args[0]))

        self.hooks = [layer.register_forward_pre_hook(see) for layer in self.layers]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def test_only_what_both_sides_have_is_projected_once(model: Model):
    unet = lora_unet(model)
    set_attention(unet, "auto", "cpu")
    networks = Networks(unet, family=model.base.family, schedule=model.base.schedule)
    pairs = len(model.xt)
    own = model.cond.map(lambda x: torch.stack([x, x * 0.5])).flatten()
    shared = model.cond.map(lambda x: x.expand(2, *x.shape)).flatten()
    some = shared.map(lambda x: x[:-1])
    for cond, expected in ((own, 2 * pairs), (some, 2 * pairs - 1), (shared.followed_by(shared), 4 * pairs)):
        n = len(cond.prompt_embeds)
        with Rows(unet) as rows, torch.no_grad():
            networks.policy(model.xt.repeat(4, 1, 1, 1)[:n], model.t.repeat(4)[:n], cond)
        assert rows.seen == {expected}


def test_other_processors_are_given_every_row(model: Model):
    """diffusers' own takes as many rows of text as of images; so does a cross-attention that is not plain."""
    unet = model.unet()
    set_attention(unet, "auto", "cpu")
    assert shares_text(unet)
    cross_attentions(unet)[0].rescale_output_factor = 2.0
    assert not shares_text(unet)
    unet = model.unet()
    unet.set_attn_processor(AttnProcessor2_0())
    assert not shares_text(unet)
    networks = Networks(unet, family=model.base.family, schedule=model.base.schedule)
    cond = model.cond.map(lambda x: x.expand(2, *x.shape)).flatten()
    with Rows(unet) as rows, torch.no_grad():
        networks.policy(model.xt.repeat(2, 1, 1, 1), model.t.repeat(2), cond)
    assert rows.seen == {2 * len(model.xt)}


def test_set_attention_says_what_it_chose(model: Model, monkeypatch):
    assert set_attention(model.unet(), "auto", "cpu") == "auto: PyTorch's choice"
    assert set_attention(model.unet(), "math", "cpu") == "math"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for capability, chosen in (((9, 0), "auto: cudnn first"), ((8, 0), "auto: PyTorch's choice")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        unet = model.unet()
        assert set_attention(unet, "auto", "cuda") == chosen
        processor = next(iter(unet.attn_processors.values()))
        assert isinstance(processor, PinnedAttention) == (capability == (9, 0))
        if capability == (9, 0):
            assert processor.kernels[:2] == [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


@pytest.mark.parametrize("backend", ["cudnn", "efficient", "xformers"])
def test_cuda_backends_are_refused_on_the_cpu(model: Model, backend: str):
    with pytest.raises(ModelError, match=r"needs a CUDA device.*cpu; allowed here: auto, flash, math"):
        set_attention(model.unet(), backend, "cpu")


def test_unknown_and_missing_backends_are_named(model: Model, monkeypatch):
    with pytest.raises(ModelError, match=r"'sage' is unknown; allowed on cpu: auto, flash, math"):
        set_attention(model.unet(), "sage", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install diffalign\[xformers\]"):
        set_attention(model.unet(), "xformers", "cuda")


def test_a_kernel_that_cannot_take_the_inputs_is_an_error_not_a_substitute(model: Model):
    unet = model.unet()
    set_attention(unet, "efficient", "cuda")  # as if the network were going to move there
    with pytest.raises(ModelError, match=r"'efficient' has no kernel for torch.float32 on cpu.*attention: auto"):
        Networks(unet, family=model.base.family, schedule=model.base.schedule).policy(model.xt, model.t, model.cond)
