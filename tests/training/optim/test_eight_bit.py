"""8-bit moments: the table, what is stored, and updates against AdamW with float32 moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.peak import Peak
from diffalign.config.schema import Config
from diffalign.training.inspect.memory_plan import OPTIMIZER_BYTES
from diffalign.training.optim import eight_bit
from diffalign.training.optim.eight_bit import BLOCK, SMALL, EightBitAdamW, decode, dynamic_map, encode
from diffalign.training.optim.stochastic_rounding import StochasticAdamW
from diffalign.training.run import run_training
from tests.training.optim.test_stochastic_rounding import seeded
from tests.training.test_run import weights

CPU = torch.device("cpu")
# code -> value in create_dynamic_map of torchao 0.18.0 (torchao/optim/quant_utils.py), which is bitsandbytes'
TORCHAO = {
    True: {0: -0.9929687, 1: -0.9789062, 64: -0.09859375, 126: -5.5e-7, 127: 0.0, 129: 3.25e-6, 200: 0.23359375},
    False: {0: 0.0, 1: 3.25e-7, 64: 0.012109375, 126: 0.09929687, 127: 0.103515625, 200: 0.61679685, 254: 0.9964844},
}
TORCHAO_SUM = {True: 1.0, False: 75.1052632}  # of all 256 values


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_the_papers(signed: bool) -> None:
    table = dynamic_map(signed, CPU)
    assert (len(table), float(table[-1])) == (256, 1.0)
    assert bool((table.diff() > 0).all())
    for code, value in TORCHAO[signed].items():
        assert float(table[code]) == pytest.approx(value, rel=1e-6)
    assert float(table.double().sum()) == pytest.approx(TORCHAO_SUM[signed], rel=1e-6)
    for decade in range(7):  # section 2.2: a decade further from 1 has half as many values
        inside = int(((table > 10.0 ** (decade - 7)) & (table < 10.0 ** (decade - 6))).sum())
        assert inside == 2**decade * (1 if signed else 2)


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_stored_is_off_by_less_than_the_distance_of_neighbours(signed: bool) -> None:
    """Blocks of sizes from 1e-12 to 1e12, one of zeros, and a short one at the end."""
    x = torch.randn(40 * BLOCK + 17, generator=seeded()) ** 3
    x = (x if signed else x.square()) * torch.logspace(-12, 12, 41).repeat_interleave(BLOCK)[: len(x)]
    x[BLOCK : 2 * BLOCK] = 0
    codes, scales = encode(x, signed, seeded())
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, x.shape, (41,))
    found, table = decode(codes, scales, signed), dynamic_map(signed, CPU)
    assert torch.equal(found[BLOCK : 2 * BLOCK], torch.zeros(BLOCK))
    gaps = torch.nn.functional.pad(table.diff(), (1, 1))
    widest = torch.maximum(gaps[:-1], gaps[1:])[codes.int()] * scales.repeat_interleave(BLOCK)[: len(x)]
    off = (found - x).abs()
    if signed:
        share = x / scales.clamp_min(1e-30).repeat_interleave(BLOCK)[: len(x)]
        assert bool((off <= 0.5001 * widest)[share > table[0]].all())
        assert bool((off <= 0.0071 * x.abs()).logical_or(share > table[0]).all())  # no code for -1: the nearest
    else:
        assert bool((off <= 1.0001 * widest).all())
        assert bool((found > 0)[x > 0].all())
    largest = torch.nn.functional.pad(x, (0, BLOCK - 17)).view(-1, BLOCK).abs().amax(1)
    assert torch.equal(scales, largest)


def test_the_second_moment_is_kept_in_the_mean() -> None:
    values = torch.tensor([0.02, 0.3, 3e-6, 0.51])
    x = torch.cat([torch.ones(1), values.repeat(500_000 // 4)[:-1]])
    x = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    x[:, 0] = 1.0
    found = decode(*encode(x.flatten(), False, seeded()), False)
    for value in values:
        there = x.flatten() == value
        mean, deviation = found[there].double().mean(), found[there].double().std()
        assert float(mean) == pytest.approx(float(value), abs=5 * float(deviation) / int(there.sum()) ** 0.5)
        assert len(found[there].unique()) == 2


def test_a_fault_stays_visible() -> None:
    for fault in (float("nan"), float("inf")):
        x = torch.ones(2 * BLOCK)
        x[3] = fault
        for signed in (True, False):
            found = decode(*encode(x, signed, seeded()), signed)
            assert not bool(found[3].isfinite())
            assert torch.equal(found[BLOCK:], torch.ones(BLOCK))


def quadratic(make: type[StochasticAdamW], steps: int, noise: float = 0.0) -> tuple[list[float], Tensor]:
    """Losses of 1/2 sum h (p - goal)^2 with curvatures from 0.01 to 1, mixed within each block, and the way gone."""
    n = 16 * SMALL
    goal, h = torch.randn(n, generator=seeded(1)), 10 ** (-2 * torch.rand(n, generator=seeded(2)))
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))
    optimizer = make([p], lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        off = p.detach().float() - goal
        losses.append(float((h * off.square()).sum() / 2))
        p.grad = (h * off + noise * torch.randn(n, generator=seeded(100 + step))).bfloat16()
        optimizer.step()
    return losses, p.detach().float()


def test_close_to_float32_moments_on_a_quadratic() -> None:
    (ours, way), (theirs, other) = (quadratic(make, 200, 0.1) for make in (EightBitAdamW, StochasticAdamW))
    assert theirs[-1] < 0.1 * theirs[0]
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.05)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.01 * theirs[0]
    assert float((way - other).norm() / other.norm()) < 0.06
    assert float(torch.cosine_similarity(way, other, dim=0)) > 0.998


def test_steps_follow_when_sizes_of_gradients_change_within_a_block() -> None:
    """Codes without a random part never move here: the mean ratio is then 0.89, and it does not come back."""
    n = 4 * SMALL
    sizes = [torch.randn(n, generator=seeded(k)).exp() for k in (1, 2)]
    moved = {}
    for make in (EightBitAdamW, StochasticAdamW):
        p = torch.nn.Parameter(torch.zeros(n))
        optimizer, squares = make([p], lr=1.0, weight_decay=0.0, betas=(0.9, 0.99)), torch.zeros(n)
        for step in range(700):
            p.grad = sizes[step >= 200] * torch.randn(n, generator=seeded(step))
            before = p.detach().clone()
            optimizer.step()
            if step >= 600:
                squares += (p.detach() - before).square()
        moved[make] = squares.sqrt()
    ratio = moved[EightBitAdamW] / moved[StochasticAdamW]
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(ratio.std()) < 0.15


def test_small_gradients_beside_large_ones_make_no_leap() -> None:
    """The second moment of a gradient 1e-4 of its block's largest is below the table; as 0 it gives a step of 2127."""
    p = torch.nn.Parameter(torch.zeros(SMALL))
    sizes = torch.full((SMALL,), 1e-4)
    sizes[::BLOCK] = 1.0
    optimizer = EightBitAdamW([p], lr=1.0, weight_decay=0.0)
    for step in range(50):
        p.grad = sizes * torch.randn(SMALL, generator=seeded(step))
        before = p.detach().clone()
        optimizer.step()
        assert float((p.detach() - before).abs().max()) < 2  # AdamW's own are near 1


def test_updates_far_below_the_resolution_arrive() -> None:
    """As for float32 moments: weights of size 0.02, 100 steps of 1e-8."""
    start = 0.02 * torch.randn(500_000, generator=seeded()).bfloat16()
    p = torch.nn.Parameter(start.clone())
    optimizer = EightBitAdamW([p], lr=1e-8, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    arrived = float((p.detach().double() - start.double()).mean()) / (-1e-8 * 100)
    assert arrived == pytest.approx(1.0, abs=0.05)


def size(state: dict[str, object]) -> int:
    return sum(x.nbytes for x in state.values() if isinstance(x, Tensor))


def test_the_bytes_of_the_state() -> None:
    large, small = (torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (64 * BLOCK, SMALL - 1))
    optimizer = EightBitAdamW([large, small], lr=1e-3)
    large.grad, small.grad = torch.ones_like(large), torch.ones_like(small)
    optimizer.step()
    assert size(optimizer.state[large]) == 64 * (2 * BLOCK + 2 * 4) == OPTIMIZER_BYTES["adamw_8bit_bf16"] * 64 * BLOCK
    assert size(optimizer.state[small]) == 8 * (SMALL - 1)


def test_a_step_holds_a_few_copies_of_a_piece_however_large_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 32 * BLOCK
    monkeypatch.setattr(eight_bit, "PIECE", piece)
    peaks = []
    for pieces in (2, 16):
        p = torch.nn.Parameter(torch.ones(pieces * piece, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        optimizer = EightBitAdamW([p], lr=1e-3)
        optimizer.step()
        with Peak() as peak:
            optimizer.step()
        peaks.append(peak.bytes)
    assert peaks[0] == peaks[1] < 10 * 4 * piece


def test_small_weights_are_updated_as_with_float32_moments() -> None:
    found = []
    for make in (EightBitAdamW, StochasticAdamW):
        p = torch.nn.Parameter(torch.ones(SMALL - 1, dtype=torch.bfloat16))
        optimizer = make([p], lr=1e-3, seed=3)
        for step in range(3):
            p.grad = torch.randn(SMALL - 1, generator=seeded(step)).bfloat16()
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


def convolution(seed: int, stop: int | None = None, switch: int | None = None) -> Tensor:
    """Four steps of a 3x3 convolution's weight, in pieces; saved and loaded before one, laid out anew before one."""
    p = torch.nn.Parameter(torch.ones(24, 32, 3, 3, dtype=torch.bfloat16))
    optimizer = EightBitAdamW([p], lr=1e-3, seed=seed)
    for step in range(4):
        if step == stop:
            state, p = optimizer.state_dict(), torch.nn.Parameter(p.detach().clone())
            optimizer = EightBitAdamW([p], lr=1e-3, seed=seed)
            optimizer.load_state_dict(state)
            assert optimizer.state[p]["exp_avg"].dtype == torch.uint8
            assert optimizer.state[p]["exp_avg_scale"].dtype == torch.float32
        if step == switch:
            p.data = p.data.to(memory_format=torch.channels_last)
        torch.rand(step)  # the global generator has no part in it
        p.grad = (
            torch.randn(p.shape, generator=seeded(step))
            .to(p.dtype)
            .contiguous(
                memory_format=torch.channels_last if switch is not None and step >= switch else torch.contiguous_format
            )
        )
        optimizer.step()
    return p.detach()


def test_the_rounding_follows_from_seed_step_and_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "PIECE", 8 * BLOCK)
    whole = convolution(7)
    assert torch.equal(convolution(7), whole)
    assert torch.equal(convolution(7, stop=2), whole)
    assert torch.equal(convolution(7, switch=2), whole)
    assert not torch.equal(convolution(8), whole)


@pytest.mark.gpu
def test_on_cuda_it_waits_for_nothing_and_agrees_with_the_cpu() -> None:
    moved = {}
    for device in ("cpu", "cuda"):
        p = torch.nn.Parameter(torch.zeros(300, 400, dtype=torch.bfloat16, device=device))
        optimizer = EightBitAdamW([p], lr=1e-3, weight_decay=0.0)
        for step in range(20):
            p.grad = torch.randn(p.shape, generator=seeded(step)).to(device, torch.bfloat16)
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        moved[device] = p.detach().float().cpu().flatten()
    assert float(torch.cosine_similarity(moved["cpu"], moved["cuda"], dim=0)) > 0.99  # other random bits


def test_a_run_is_close_to_one_with_float32_moments(
    make_config: Callable[..., Config], tiny_sdxl: Path, tmp_path: Path
) -> None:
    found = {}
    for optimizer in ("adamw_8bit_bf16", "adamw_bf16"):
        settings = {
            "output_dir": str(tmp_path / optimizer),
            "tuning.method": "full",
            "training.optimizer": optimizer,
            "training.mixed_precision": "bf16",
            "training.learning_rate": 1e-4,
            "training.max_train_steps": 5,
        }
        run_training(make_config(tiny_sdxl, settings))
        found[optimizer] = weights(tmp_path / optimizer)
    from diffusers import UNet2DConditionModel

    start = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet").state_dict()
    ways = [torch.cat([(run[k].float() - start[k].float()).flatten() for k in start]) for run in found.values()]
    assert float(torch.cosine_similarity(*ways, dim=0)) > 0.95
    assert float(ways[0].norm() / ways[1].norm()) == pytest.approx(1.0, abs=0.05)
