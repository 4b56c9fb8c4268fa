"""Our 8-bit moments beside torchao's AdamW8bit with stochastic rounding, both on bfloat16 weights, on a CPU.

    python -m benchmarks.eight_bit --out benchmarks/results/eight_bit     # needs torchao and a C++ compiler

Measured are the bytes of state, how closely each follows AdamW with float32 weights and moments on the same gradients,
what a resumed run and a second process give, and the time of a step in turns. The embedded world is trained with both
by `benchmarks/optimizers_world.py`.

The problem: weights [64, 256] move towards a target along noisy gradients. The columns of a row, which share one scale
of the second moment, take turns: in each phase of 50 steps one in eight of them has gradients 30 times as large.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.timing import ratio, take_turns
from diffalign.training.optim.eight_bit import EightBitAdamW
from diffalign.training.run import environment

SHAPE = (64, 256)
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
Make = Callable[[list[Parameter]], torch.optim.Optimizer]


def ours(parameters: list[Parameter]) -> torch.optim.Optimizer:
    """diffalign's."""
    return EightBitAdamW(parameters, **SETTINGS, seed=0)


def theirs(parameters: list[Parameter]) -> torch.optim.Optimizer:
    """torchao's."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, **SETTINGS, bf16_stochastic_round=True)


def weights(dtype: torch.dtype, shape: tuple[int, ...] = SHAPE) -> Parameter:
    """The same start in either precision."""
    return Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype))


def gradient(p: Tensor, step: int, seed: int) -> Tensor:
    """Of the quadratic distance to 0, with noise, in float32; one column in eight is 30 times as large for a while."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    scale = torch.full((p.shape[1],), 0.01)
    scale[(step // 50) % 8 :: 8] = 0.3
    return scale * (p.detach().float() + torch.randn(p.shape, generator=generator))


def closeness(make: Make, steps: int, seed: int) -> dict[str, float]:
    """Its updates of float32 weights beside AdamW's on the same gradients: nothing differs but the moments' storage."""
    exact, p = weights(torch.float32), weights(torch.float32)
    reference, optimizer = torch.optim.AdamW([exact], **SETTINGS), make([p])
    start, sizes, cosines = exact.detach().clone(), [], []
    for step in range(steps):
        exact.grad = gradient(exact, step, seed)
        p.grad = exact.grad.clone()
        before, before_exact = p.detach().clone(), exact.detach().clone()
        reference.step()
        optimizer.step()
        update, right = p.detach() - before, exact.detach() - before_exact
        if step >= steps // 10:
            sizes.append(float((update * right).sum() / right.square().sum()))
            cosines.append(float(torch.cosine_similarity(update.flatten(), right.flatten(), dim=0)))
    return {
        "update along AdamW's, times AdamW's": sum(sizes) / len(sizes),
        "cosine of an update with AdamW's": sum(cosines) / len(cosines),
        "distance from AdamW's weights, over the way these moved": float(
            (p.detach() - exact.detach()).norm() / (exact.detach() - start).norm()
        ),
    }


def alone(make: Make, steps: int, seed: int) -> float:
    """The squared distance of bfloat16 weights to the target after its own steps, over that of AdamW in float32."""
    found = []
    for dtype, how in ((torch.bfloat16, make), (torch.float32, lambda ps: torch.optim.AdamW(ps, **SETTINGS))):
        p = weights(dtype)
        optimizer = how([p])
        for step in range(steps):
            p.grad = gradient(p, step, seed).to(dtype)
            optimizer.step()
        found.append(float(p.detach().float().square().mean()))
    return found[0] / found[1]


def state_bytes(make: Make, shape: tuple[int, ...]) -> float:
    """Bytes of state for a weight, as a checkpoint holds them."""
    p = weights(torch.bfloat16, shape)
    optimizer = make([p])
    p.grad = torch.ones_like(p)
    optimizer.step()

    def size(value: Any) -> int:
        if hasattr(value, "tensor_attrs"):  # torchao's tensor of codes, scales and the table
            return sum(size(getattr(value, name)) for name in value.tensor_attrs)
        return int(value.numel() * value.element_size()) if isinstance(value, Tensor) else 0

    return sum(size(v) for state in optimizer.state.values() for v in state.values()) / math.prod(shape)


def run(make: Make, first: int, last: int, saved: bytes | None = None, rng: int = 0) -> tuple[Tensor, bytes]:
    """Weights and a checkpoint after the steps from `first` to `last`, gone on from a checkpoint."""
    torch.manual_seed(rng)  # as every run does when it starts
    p = weights(torch.bfloat16)
    optimizer = make([p])
    if saved is not None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        p.data.copy_(state["p"])
    for step in range(first, last):
        p.grad = gradient(weights(torch.float32), step, 0).bfloat16()
        optimizer.step()
    file = io.BytesIO()
    torch.save({"p": p.data, "optimizer": optimizer.state_dict()}, file)
    return p.detach().clone(), file.getvalue()


def same_share(a: Tensor, b: Tensor) -> float:
    """Share of the weights with the same bits."""
    return float((a.view(torch.int16) == b.view(torch.int16)).float().mean())


def compared(steps: int, seeds: int, rounds: int) -> dict[str, Any]:
    """Everything, by contender."""
    found: dict[str, Any] = {}
    steppers = {}
    for name, make in (("ours", ours), ("torchao", theirs)):
        whole, _ = run(make, 0, 20)
        _, half = run(make, 0, 10)
        near = [closeness(make, steps, seed) for seed in range(seeds)]
        apart = sum(alone(make, steps, seed) for seed in range(seeds))
        other, _ = run(make, 0, 20, rng=1)
        found[name] = {
            "state, bytes a weight, [1280, 1280]": state_bytes(make, (1280, 1280)),
            "state, bytes a weight, [4, 320, 3, 3] (11,520 numbers)": state_bytes(make, (4, 320, 3, 3)),
            "state, bytes a weight, [320, 29] (9,280 numbers)": state_bytes(make, (320, 29)),
            **{key: sum(each[key] for each in near) / seeds for key in near[0]},
            "bfloat16 weights: squared distance to the target, over AdamW's in float32": apart / seeds,
            "weights with equal bits: 10 + 10 steps against 20": same_share(whole, run(make, 10, 20, half)[0]),
            "weights with equal bits: two processes, other global generators": same_share(whole, other),
        }
        p = weights(torch.bfloat16, (512, 1024))
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        steppers[name] = make([p]).step
    timed = take_turns(steppers, warmup=3, steps=5, rounds=rounds, device=torch.device("cpu"))  # type: ignore[arg-type]
    for name in found:
        found[name]["ms a step of [512, 1024], median"] = timed[name].summary()["median_ms"]
    found["ours over torchao, median of turns"] = ratio(timed["ours"], timed["torchao"])
    return found


def uncompiled() -> str:
    """What torchao's step says where torch.compile is off, as it must be on a machine without a compiler."""
    code = "import torch; from benchmarks.eight_bit import theirs, weights; p = weights(torch.bfloat16)\n"
    code += "p.grad = torch.ones_like(p); theirs([p]).step()"
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if "Error: " in line]
    return "runs" if done.returncode == 0 else errors[-1].partition(". Skipped")[0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.json and OUT.md")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    a = parser.parse_args()
    torch.set_num_threads(1)
    import torchao

    found = compared(a.steps, a.seeds, a.rounds)
    turns = found.pop("ours over torchao, median of turns")
    facts = {
        "version of torchao": torchao.__version__,
        "without a compiler": uncompiled(),
        "steps": a.steps,
        "seeds": a.seeds,
    }
    content = {**facts, **found, "ours over torchao": turns, "environment": environment()}
    a.out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    rows = [f"| {key} | {found['ours'][key]:.4g} | {found['torchao'][key]:.4g} |" for key in found["ours"]]
    text = "\n".join(
        [
            "| bfloat16 weights, moments of 8 bits | ours | torchao |",
            "|---|---|---|",
            *rows,
            f"| without torch.compile | runs | {facts['without a compiler']} |",
            "",
            f"torchao {torchao.__version__}, one CPU thread; {a.steps} steps, {a.seeds} seeds. A step of ours takes "
            f"{turns['median']:.2f} times a compiled one of torchao's ({turns['min']:.2f} to {turns['max']:.2f} over "
            f"{a.rounds} turns).",
        ]
    )
    a.out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
