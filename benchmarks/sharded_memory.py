"""Bytes that each process holds of a fully tuned UNet under FSDP2, over 1, 2, 4 and 8 processes.

    python -m benchmarks.sharded_memory --out benchmarks/results/sharded_memory

counted    SDXL's UNet in its real sizes on the meta device, in a group of processes that is not there: the parts of
           the process that has most. Gathered, on top during a forward: the block that needs most with those around it
           and what belongs to no block, in bfloat16, and the norms.
measured   a small UNet in SDXL's structure, processes joined by gloo, after a step in bf16: the storage of every tensor
           that Python can reach in the process that has most, with and without weights, gradients and states.

Activations are left out: they do not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.models import SMALL_UNET, unet_config
from diffalign.models.kernels.checkpointing import AUTOCAST_LAYERS
from diffalign.models.policy.sharding import UNITS, parts, shard

PROCESSES = (1, 2, 4, 8)
PARTS = ("weights", "gradients", "states")


def held(unet: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of this process's parts."""
    states = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    return {
        "weights": _bytes(parts(unet.parameters())),
        "gradients": _bytes(parts(p.grad for p in unet.parameters() if p.grad is not None)),
        "states": _bytes(parts(states)),
    }


def counted(config: dict[str, Any], processes: int) -> dict[str, int]:
    """A UNet on the meta device, cut for the first of so many processes: it has the largest parts."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    together = gathered(unet)
    torch.distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        shard(unet, init_device_mesh("cpu", (processes,)), torch.bfloat16)
        optimizer = torch.optim.AdamW(unet.parameters())
        for parameter in unet.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return {**held(unet, optimizer), "gathered": together}
    finally:
        torch.distributed.destroy_process_group()
        _clear_sharding_prop_cache()


def gathered(unet: nn.Module) -> int:
    """Bytes of whole weights in the block that needs most: its own, those around it, and those of no block."""
    units = {name: module for name, module in unet.named_modules() if type(module).__name__ in UNITS}
    precise = {id(p) for m in unet.modules() if not isinstance(m, AUTOCAST_LAYERS) for p in m.parameters(recurse=False)}
    own: dict[str, int] = dict.fromkeys(["", *units], 0)
    for name, parameter in unet.named_parameters():
        around = [unit for unit in units if name.startswith(f"{unit}.")]
        if id(parameter) not in precise:
            own[max(around, key=len, default="")] += 2 * parameter.numel()
    norms = 4 * sum(p.numel() for p in unet.parameters() if id(p) in precise)
    nested = (sum(own[name] for name in own if f"{unit}.".startswith(f"{name}.")) for unit in units)
    return max(nested) + own[""] + norms


def step(processes: int) -> dict[str, int]:
    """Two steps of the small UNet in this process; what it holds after the second backward, and in all."""
    unet = UNet2DConditionModel(**SMALL_UNET)
    shard(unet, init_device_mesh("cpu", (processes,)), torch.bfloat16)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    width = SMALL_UNET["projection_class_embeddings_input_dim"] - 6 * SMALL_UNET["addition_time_embed_dim"]
    added = {"text_embeds": torch.randn(2, width), "time_ids": torch.ones(2, 6)}
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 7, SMALL_UNET["cross_attention_dim"])
    for last in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(*inputs, added_cond_kwargs=added)[0]
        out.float().square().mean().backward()
        del out
        if not last:
            optimizer.step()
            optimizer.zero_grad()
    gc.collect()
    alive = _bytes(x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu")
    return {**held(unet, optimizer), "alive": alive}


def measured(processes: int, folder: Path) -> dict[str, int]:
    """The largest of all processes, part by part."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    files = [folder / f"{processes}-{rank}.json" for rank in range(processes)]
    fork = multiprocessing.get_context("fork")  # torch is imported once
    started = [fork.Process(target=_rank, args=(rank, processes, port, file)) for rank, file in enumerate(files)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process of {processes} ended with {process.exitcode}")
    found = [json.loads(file.read_text()) for file in files]
    return {name: max(each[name] for each in found) for name in found[0]}


def _rank(rank: int, processes: int, port: str, file: Path) -> None:
    """One of the processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "RANK": str(rank)}
    torch.distributed.init_process_group("gloo")
    file.write_text(json.dumps(step(processes)))
    torch.distributed.destroy_process_group()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, in MiB."""
    lines = [
        "| UNet | processes | weights | gradients | states | their sum | × processes, of one process | besides |",
        "|---|---|---|---|---|---|---|---|",
    ]
    one = {row["unet"]: total(row) for row in rows if row["processes"] == 1}
    for row in rows:
        own = " | ".join(f"{row[name] / 2**20:.2f}" for name in PARTS)
        share = row["processes"] * total(row) / one[row["unet"]]
        besides = (
            f"gathered {row['gathered'] / 2**20:.0f}" if "gathered" in row else f"all alive {row['alive'] / 2**20:.2f}"
        )
        lines.append(
            f"| {row['unet']} | {row['processes']} | {own} | {total(row) / 2**20:.2f} | {share:.4f} | {besides} |"
        )
    return "\n".join(lines)


def total(row: dict[str, Any]) -> int:
    """Weights, gradients and states."""
    return sum(row[name] for name in PARTS)


def main() -> None:
    """Counts and measures, and writes OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sharded_memory"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"unet": "SDXL, counted", "processes": n, **counted(unet_config("sdxl"), n)} for n in PROCESSES]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows += [{"unet": "small, measured", "processes": n, **measured(n, Path(folder))} for n in PROCESSES]
    args.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    summary = (__doc__ or "").split("\n\n", 2)[2]
    head = f"# Bytes of each process under FSDP2\n\ntorch {torch.__version__}, MiB\n\n{summary}"
    args.out.with_suffix(".md").write_text(f"{head}\n{table(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
