"""The UNet with fused kernels: the same network, layer for layer, with less activation memory.

Numbers come from Triton's interpreter, on few places: it is slow. Bytes and nodes are counted on `meta`.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.counts import kept_bytes, meta_unet
from diffalign.config.schema import Config, ConfigError
from diffalign.experimental.fused_norm import NHWC
from diffalign.experimental.fusing import fuse_kernels
from diffalign.experimental.kernels import kernels_by
from diffalign.models.adapters.lora import add_lora, fuse_lora
from diffalign.models.kernels.checkpointing import place, set_checkpointing
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.reference import FrozenCopy, LoraOff
from diffalign.training.build import prepare_policy
from diffalign.training.build_source import _kernels
from diffalign.training.inspect.activation_memory import SavedForBackward
from diffalign.training.inspect.meta_forward import unet_inputs
from diffalign.types import Conditioning
from tests.models.conftest import Model, move_lora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(kernels_by(DEVICE) is None, reason="the kernels need triton")


def few_places(model: Model) -> tuple[Tensor, Tensor, Conditioning]:
    """One row of latents of 4 x 6 places."""
    return model.xt[:1, :, :4, :6].to(DEVICE), model.t[:1].to(DEVICE), model.cond.map(lambda v: v[:1]).to(DEVICE)


@pytest.fixture(scope="module")
def shallow(models: dict[str, Model]) -> Model:
    """SDXL's UNet with one level: every kind of layer, and half as many of each, for what holds layer by layer."""
    base = copy.copy(models["sdxl"].base)
    one_level = {
        "block_out_channels": (32,),
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "transformer_layers_per_block": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = type(base.unet).from_config({**base.unet.config, **one_level})
    base.unet = place(unet.requires_grad_(False).eval(), torch.device("cpu"))
    return replace(models["sdxl"], base=base)


def laid_out(model: Model) -> nn.Module:
    return model.unet().to(DEVICE).to(memory_format=NHWC)


def step(model: Model, unet: nn.Module, reference: bool = False) -> list[Tensor]:
    """Prediction and gradients of a step; with the reference's prediction last."""
    how = {"reference": LoraOff(unet)} if reference else {}
    networks = Networks(unet, family=model.base.family, schedule=model.base.schedule, device=DEVICE, **how)
    unet.zero_grad(set_to_none=True)
    point = few_places(model)
    out = networks.policy(*point)
    (out - 1).square().mean().backward()
    asked = [networks.reference(*point)] if reference else []
    return [out.detach(), *(p.grad for p in unet.parameters() if p.requires_grad), *asked]


@needs_triton
def test_full_tuning_has_the_same_prediction_and_gradients(model: Model) -> None:
    unet = laid_out(model).requires_grad_(True).train()
    plain = step(model, unet)
    names = list(unet.state_dict())
    blocks = sum(type(layer).__name__ == "ResnetBlock2D" for layer in unet.modules())
    transformers = sum(type(layer).__name__ == "Transformer2DModel" for layer in unet.modules())
    gated = sum(type(layer).__name__ == "GEGLU" for layer in unet.modules())
    assert min(blocks, transformers, gated) > 2
    assert fuse_kernels(unet, DEVICE) == blocks + transformers + gated + 1
    assert list(unet.state_dict()) == names
    assert not any(type(layer).__name__ in ("ResnetBlock2D", "GEGLU") for layer in unet.modules())
    fused = step(model, unet)
    assert not torch.equal(fused[0], plain[0])  # other kernels round otherwise: these have run
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item() + 1e-9)
        if other.norm() > 1e-6:
            assert ((one - other).norm() / other.norm()).item() < 2e-5


@needs_triton
def test_lora_under_every_checkpointing(shallow: Model) -> None:
    """The same bits whatever is made again, and at B = 0 those of the reference."""
    model = shallow
    unet = laid_out(model)
    add_lora(unet, rank=4, seed=1, target_modules=("to_q", "to_v", "ff.net.0.proj"))
    fuse_lora(unet)
    unet.to(DEVICE)
    fuse_kernels(unet, DEVICE)
    at_start = step(model, unet, reference=True)
    assert torch.equal(at_start[0], at_start[-1])
    move_lora(unet)
    found = {}
    for which in ("none", "selective", "full"):
        set_checkpointing(unet, which)
        found[which] = step(model, unet)
    assert not torch.equal(found["none"][0], at_start[0])
    for which in ("selective", "full"):
        for one, other in zip(found[which], found["none"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@needs_triton
def test_a_frozen_copy_is_the_policy_to_the_bit(shallow: Model) -> None:
    """It has the kernels too; half-precision weights and none that require grad change nothing."""
    base, unet = shallow.base, laid_out(shallow).requires_grad_(True).train()
    fuse_kernels(unet, DEVICE)
    networks = Networks(
        unet,
        family=base.family,
        schedule=base.schedule,
        reference=FrozenCopy(unet, torch.bfloat16),
        autocast_dtype=torch.bfloat16,
        device=DEVICE,
    )
    point = few_places(shallow)
    assert torch.equal(networks.policy(*point), networks.reference(*point))


@needs_triton
def test_images_stay_channels_last_from_end_to_end(models: dict[str, Model]) -> None:
    """Whatever goes into a resnet block, a transformer or the last norm; diffusers' own go to NCHW."""
    found = {}
    for fused in (False, True):
        unet = laid_out(models["sdxl"])
        if fused:
            fuse_kernels(unet, DEVICE)
        seen: list[bool] = []

        def look(_: nn.Module, given: tuple[Tensor, ...], seen: list[bool] = seen) -> None:
            seen.append(given[0].is_contiguous(memory_format=NHWC))

        for name, layer in unet.named_modules():
            if name.endswith(("resnets.0", "resnets.1", "attentions.0", "conv_norm_out")):
                layer.register_forward_pre_hook(look)
        step(models["sdxl"], unet.requires_grad_(True))
        found[fused] = seen
    assert all(found[True])
    assert not all(found[False])


def test_what_is_not_plain_keeps_its_class() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    from diffalign.experimental.fused_layers import FusedResnetBlock2D, fuse

    plain = {"in_channels": 16, "temb_channels": 8, "groups": 4}
    odd = [
        {"time_embedding_norm": "scale_shift"},
        {"non_linearity": "gelu"},
        {"dropout": 0.1},
        {"up": True},
        {"down": True},
    ]
    blocks = nn.ModuleList(ResnetBlock2D(**plain, **more) for more in ({}, *odd))
    assert fuse(blocks)["resnet blocks"] == 1
    assert [type(block) for block in blocks] == [FusedResnetBlock2D] + [ResnetBlock2D] * len(odd)


def test_without_cuda_nothing_changes_and_the_log_says_so(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    unet = models["sdxl"].unet()
    classes = [type(m) for m in unet.modules()]
    with caplog.at_level(logging.WARNING):
        assert fuse_kernels(unet, "cpu") == 0
    assert [type(m) for m in unet.modules()] == classes
    assert "fused_kernels" in caplog.text
    assert "torch's own" in caplog.text
    assert kernels_by("cpu") is None


def nodes(out: Tensor) -> Counter[str]:
    """Autograd's nodes below a result, by name."""
    seen, ahead = set(), [out.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [below for below, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def test_fewer_bytes_and_fewer_nodes(tiny_sdxl: Path) -> None:
    """Counted on `meta`, one row of 16 x 16, float32, everything trained; and how many bytes, to the byte.

    A norm with SiLU keeps x, mean and rstd where torch keeps the norm's answer as well (SiLU's goes to the convolution,
    which keeps it in both). A GEGLU keeps the projection where torch keeps gelu(g) as well.
    """
    from diffusers import UNet2DConditionModel

    config = dict(UNet2DConditionModel.load_config(tiny_sdxl / "unet"))
    found, expected = {}, 0
    for fused in (False, True):
        unet = meta_unet(config, None).to(memory_format=NHWC)
        answers = answers_of(unet)
        if fused:
            assert fuse_kernels(unet, "meta") == 21
        inputs = unet_inputs(unet, 1, 16)
        inputs["sample"] = inputs["sample"].contiguous(memory_format=NHWC)
        bytes_ = kept_bytes(unet, inputs)
        expected = expected if fused else sum(answers)
        with SavedForBackward() as kept:
            out = unet(**inputs)[0]
        found[fused] = bytes_, nodes(out), kept.bytes
    assert found[False][0] - found[True][0] == expected
    assert found[True][2] < found[False][2]
    gone, new = found[False][1] - found[True][1], found[True][1] - found[False][1]
    norms, gated = 2 * 8 + 4 + 1, 8  # of 8 resnet blocks, 4 transformers and the end
    assert (new["_GroupNormSiLUBackward"], new["_GegluBackward"]) == (norms, gated)
    assert (gone["NativeGroupNormBackward0"], gone["SiluBackward0"]) == (norms, norms - 4)
    assert {gone[f"{name}Backward0"] for name in ("Split", "Gelu", "Mul")} == {gated}


def answers_of(unet: nn.Module) -> list[int]:
    """Filled by a forward of diffusers' layers: bytes of what is not kept any more, norms' answers and gelu(g)."""
    sizes: list[int] = []
    gated = [layer for layer in unet.modules() if type(layer).__name__ == "GEGLU"]
    blocks = [layer for layer in unet.modules() if type(layer).__name__ == "ResnetBlock2D"]
    for layer in (*gated, *(norm for block in blocks for norm in (block.norm1, block.norm2)), unet.conv_norm_out):
        layer.register_forward_hook(lambda _, given, out: sizes.append(out.numel() * out.element_size()))
    return sizes


def test_the_config_says_what_goes_together(make_config: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.fused_kernels.*set model\.channels_last: true"):
        make_config(tmp_path, {"model.fused_kernels": True})
    with pytest.raises(ConfigError, match=r"model\.fused_kernels: model\.compile fuses the same layers"):
        make_config(tmp_path, {"model.fused_kernels": True, "model.channels_last": True, "model.compile": True})


@needs_triton
def test_the_lever_acts_and_kept_errors_know_it(
    make_config: Callable[..., Config], models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffalign.experimental.fused_layers import FusedGEGLU, FusedResnetBlock2D

    base = copy.copy(models["sdxl"].base)
    facts = []
    for fused in (False, True):
        config = make_config(models["sdxl"].folder, {"model.fused_kernels": fused, "model.channels_last": True})
        base.unet = models["sdxl"].unet()
        unet = prepare_policy(base, config, torch.device(DEVICE))
        kinds = [type(m) for m in unet.modules()]
        assert (kinds.count(FusedResnetBlock2D), kinds.count(FusedGEGLU)) == ((8, 8) if fused else (0, 0))
        facts.append(_kernels(config.model, config.tuning, config.training, torch.device(DEVICE)))
    assert "fused_kernels" not in facts[0]
    assert facts[1] == {**facts[0], "fused_kernels": kernels_by(DEVICE)}
