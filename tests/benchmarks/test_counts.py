"""What a step computes and calls, to the exact number: speed checks that do not depend on a machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.counts import (
    Flops,
    NetworkFlops,
    Operators,
    flops_of,
    forward_equivalents,
    kept_bytes,
    meta_unet,
    objective_rows,
    unet_inputs,
    useful_flops,
)
from diffalign.config.schema import Config
from diffalign.models.kernels.checkpointing import set_checkpointing
from diffalign.objectives import OBJECTIVES, DiffusionDPO, InPO, InversionDPO, MaPO, SmPO
from diffalign.training.build import build
from diffalign.training.metrics import Meter
from diffalign.training.processes import make_accelerator
from diffalign.training.step import optimizer_step
from tests.gpu_models import SDXL_UNET

TERA = 1e12

# objective -> rows of a pair: (policy with grad, policy without, reference) at the defaults
ROWS = {
    "dpo": (2, 0, 2),
    "ipo": (2, 0, 2),
    "cdpo": (2, 0, 2),
    "robust_dpo": (2, 0, 2),
    "poly_dpo": (2, 0, 2),
    "linear_dpo": (2, 0, 2),
    "dmpo": (2, 0, 2),
    "listwise_dpo": (2, 0, 2),  # on pairs; of a list, the number of its images
    "dspo": (2, 0, 2),
    "f_dpo": (2, 0, 2),
    "kto": (2, 0, 2),
    "dso_dro": (2, 0, 2),
    "diffusion_dro": (2, 0, 2),
    "seppo": (2, 0, 2),
    "mapo": (2, 0, 0),
    "sft": (1, 0, 0),
    "diffusion_nft": (1, 0, 1),  # without the samples
    "inpo": (2, 42, 2),  # an inversion of 40 steps to T - 1, of 21 to the t that these pairs draw
    "smpo": (2, 42, 2),
    "inversion_dpo": (20, 0, 180),  # 10 points; 8 inversion steps to each
    "spo": (4, 0, 4),  # both sides' moves start at one x_t: asked once, with guidance; of two x_t twice
}


# (tuning, full checkpointing) -> bytes that one row of the tiny network at 64 px keeps in float32
KEPT = {("full", "none"): 7008640, ("full", "full"): 933888, ("lora", "none"): 5943104, ("lora", "full"): 746432}
OPERATORS_LORA, OPERATORS_FULL = 3710, 4000


def test_flops_are_those_of_a_matmul_and_a_convolution() -> None:
    """The counter against numbers by hand: 2·m·n·k, and 2·(out places)·(channels out)·(channels in)·(window)."""
    with Flops() as counter:
        torch.randn(3, 4, device="meta") @ torch.randn(4, 5, device="meta")
    assert counter.total == 2 * 3 * 4 * 5
    with Flops() as counter:
        nn.Conv2d(4, 6, 3, padding=1, device="meta")(torch.randn(2, 4, 8, 8, device="meta"))
    assert counter.total == 2 * (2 * 8 * 8) * 6 * 4 * 9
    a = torch.randn(3, 5, device="meta")
    with Flops() as counter:
        a.addmm_(torch.randn(3, 4, device="meta"), torch.randn(4, 5, device="meta"))
    assert counter.total == 2 * 3 * 4 * 5


@pytest.mark.slow
def test_flops_of_sdxl() -> None:
    """SDXL's real config, full tuning and LoRA of rank 16, at 1024 and 512 px, to the FLOP.

    At 512 px only rows that share a prompt are counted; the other rows differ by what the next test counts by hand.
    """
    unets = {rank: meta_unet(SDXL_UNET, rank) for rank in (None, 16)}
    counted = {(rank, 128): flops_of(unet, 128) for rank, unet in unets.items()}
    of_pairs = {(rank, side): flops_of(unet, side, sharing=2) for rank, unet in unets.items() for side in (128, 64)}
    assert counted[None, 128] == NetworkFlops(6761236398080, 6761236398080, 13469606051840)
    assert counted[16, 128] == NetworkFlops(6761236398080, 6802618204160, 7385305088000)
    assert of_pairs[None, 64] == NetworkFlops(1562538147840, 1562538147840, 3098733281280)
    assert of_pairs[16, 64] == NetworkFlops(1562538147840, 1573162721280, 1564850667520)

    def pair(name: str, rank: int | None, side: int) -> float:
        rows = objective_rows(OBJECTIVES[name](), transitions=name == "spo")
        return useful_flops(rows, (of_pairs if rows.shared_text else counted)[rank, side]) / TERA

    assert pair("dpo", None, 128) == pytest.approx(53.83, abs=0.01)
    assert pair("dpo", 16, 128) == pytest.approx(41.79, abs=0.01)
    assert pair("dpo", None, 64) == pytest.approx(12.45, abs=0.01)
    assert pair("dpo", 16, 64) == pytest.approx(9.40, abs=0.01)
    assert pair("mapo", None, 128) == pytest.approx(40.36, abs=0.01)
    assert pair("sft", None, 128) == pytest.approx(20.23, abs=0.01)


def test_flops_of_a_shared_prompt(tiny_sdxl: Path) -> None:
    """By hand: with two rows on one prompt, to_k and to_v of every cross-attention have half the tokens to multiply."""
    from diffusers import UNet2DConditionModel

    unet = meta_unet(dict(UNet2DConditionModel.load_config(tiny_sdxl / "unet")), None)
    apart, together = flops_of(unet, 8), flops_of(unet, 8, sharing=2)
    text = sum(2 * 77 * p.numel() for n, p in unet.named_parameters() if ".attn2.to_k." in n or ".attn2.to_v." in n)
    assert text > 0
    assert together.forward == apart.forward - text // 2
    assert together.backward == apart.backward - text // 2  # of the weights' gradient; text itself needs none


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_of_a_pair(name: str) -> None:
    """What each objective asks of policy and reference; whoever adds an objective says what it costs."""
    rows = objective_rows(OBJECTIVES[name](), transitions=name == "spo")
    assert name in ROWS, f"count the rows of {name} and add them to ROWS"
    assert (rows.policy, rows.policy_no_grad, rows.reference) == ROWS[name]


def test_forward_equivalents_of_published_settings() -> None:
    """A backward counts as two forwards of full tuning."""
    assert forward_equivalents(objective_rows(DiffusionDPO())) == 8
    assert forward_equivalents(objective_rows(MaPO())) == 6
    published = InversionDPO(form="released", steps=80, substeps=1, guidance=2.0, weighting="inverse_alpha")
    assert forward_equivalents(objective_rows(published)) == 3 * 320 + 320
    assert forward_equivalents(objective_rows(InPO(steps=10))) == 19  # for the t that these pairs draw
    assert forward_equivalents(objective_rows(SmPO(steps=10))) == 30


def test_the_second_pass_of_a_chunked_objective_is_not_useful_work() -> None:
    chunked = InversionDPO(points_per_forward=1)
    useful, done = objective_rows(chunked), objective_rows(chunked, recompute=True)
    assert useful.policy == done.policy
    assert (useful.policy_no_grad, done.policy_no_grad) == (0, done.policy)


def test_bytes_kept_by_checkpointing_mode(tiny_sdxl: Path) -> None:
    """Exactly what a forward of one row keeps for its backward; more means that something holds on to activations."""
    from diffusers import UNet2DConditionModel

    config = dict(UNet2DConditionModel.load_config(tiny_sdxl / "unet"))
    kept = {}
    for rank in (None, 4):
        unet = meta_unet(config, rank)
        inputs = unet_inputs(unet, 1, 16)
        for mode in ("none", "full"):
            set_checkpointing(unet, mode)
            kept["full" if rank is None else "lora", mode] = kept_bytes(unet, inputs)
    assert kept == KEPT


def test_operators_of_a_step(make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path) -> None:
    """Operators below autograd of one cached step, the backward's included: a ceiling 5 % above what they are.

    They are what a small or launch-bound step pays for. torch and diffusers move them a little between versions.
    """
    for method, ceiling in (("lora", OPERATORS_LORA), ("full", OPERATORS_FULL)):
        settings = {
            "tuning.method": method,
            "data.cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / method),
        }
        config = make_config(tiny_sdxl, settings)
        run = build(config, make_accelerator(config))
        batches = run.source.batches()
        optimizer_step(run, batches, Meter())  # Adam makes its state in the first
        with Operators() as operators:
            optimizer_step(run, batches, Meter())
        assert 0.8 * ceiling < operators.count <= ceiling, (method, operators.count)
