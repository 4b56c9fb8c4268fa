"""The processes of a run: those that a launcher started are those that train together, or nothing begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from diffalign.errors import DiffalignError

PATIENCE = timedelta(hours=12)  # others wait while one process examines the data or writes a checkpoint
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun's, and MPI's
_ON_A_CPU = "torchrun --nproc-per-node 2 -m diffalign train my.yaml"

T = TypeVar("T")


def launched_processes() -> int:
    """How many processes the launcher says there are; 1 without one."""
    sizes = [os.environ[name] for name in _SIZES if os.environ.get(name)]
    if not sizes:
        return 1
    if not sizes[0].isdecimal() or int(sizes[0]) < 1:
        raise DiffalignError(
            f"the environment says WORLD_SIZE={sizes[0]}: a launcher sets the number of processes there"
        )
    return int(sizes[0])


def one_process(command: str) -> None:
    """Raises DiffalignError under a launcher of several processes, each of which would do all the work."""
    if (size := launched_processes()) > 1:
        raise DiffalignError(
            f"{size} processes were launched (WORLD_SIZE={size}), and `diffalign {command}` works in one: each would "
            "do all of it, into the same files. Start it without a launcher, or unset WORLD_SIZE"
        )


def before_accelerate() -> None:
    """Sees to it that accelerate will take all launched processes; called before its state is made.

    Raises DiffalignError where processes were asked for and not started, and where they are more than the GPUs.
    """
    import torch

    size = launched_processes()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    _devices_that_are_there(gpus)
    if size == 1:
        # `accelerate launch --num_processes 2` without several GPUs starts one process and leaves but this trace
        asked = "ACCELERATE_MIXED_PRECISION" in os.environ and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        if asked and not any(os.environ.get(name) for name in _SIZES):
            raise DiffalignError(
                f"accelerate launch was asked for several processes and started one, as this machine has {gpus} GPUs. "
                f"On a CPU: `{_ON_A_CPU}`. For one process: --num_processes 1 --num_machines 1 (and unset "
                "MASTER_ADDR and MASTER_PORT if you set them)"
            )
        return
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it, accelerate takes each of them for a run of its own
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if gpus and not _uses_cpu() and local.isdecimal() and int(local) > gpus:
        raise DiffalignError(
            f"{local} processes were launched on this machine, which has {gpus} CUDA devices: launch at most {gpus} "
            "(--nproc-per-node or --num_processes), or set ACCELERATE_USE_CPU=true to train on the CPU"
        )


def _devices_that_are_there(gpus: int) -> None:
    """Raises DiffalignError for a CUDA device that the environment names and the machine has not."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if torch.version.cuda and not gpus and not _uses_cpu() and visible.strip() not in ("", "-1", "NoDevFiles"):
        raise DiffalignError(
            f"CUDA_VISIBLE_DEVICES={visible} names no CUDA device of this machine (`nvidia-smi -L` lists them): name "
            "one of them, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
        )
    named = os.environ.get("ACCELERATE_TORCH_DEVICE", "")
    if named.startswith("cuda") and int(named.partition(":")[2] or 0) >= gpus:
        raise DiffalignError(
            f"ACCELERATE_TORCH_DEVICE={named}: this machine has {gpus} CUDA devices; name another or cpu"
        )


def _uses_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y", "on", "t")


def all_in_use(state: Any) -> None:
    """Raises DiffalignError when accelerate's state does not have the processes that were launched."""
    size = launched_processes()
    if state.num_processes != size:
        raise DiffalignError(
            f"{size} processes were launched (WORLD_SIZE={size}) and accelerate uses {state.num_processes} on "
            f"{state.device}: each would train alone into one folder. Set ACCELERATE_USE_CPU=true to train on the CPU, "
            "start as many as there are GPUs, or start one process without a launcher"
        )


def make_state() -> Any:
    """Devices and processes for work that is no training."""
    from accelerate import PartialState

    before_accelerate()
    state = PartialState(cpu=_uses_cpu(), timeout=PATIENCE)  # Accelerator reads the environment, this does not
    all_in_use(state)
    return state


def on_main(accelerator: Any, do: Callable[[], T]) -> T:
    """What `do` returns in the main process, in all of them; a DiffalignError of it is raised in all of them."""
    if accelerator.num_processes == 1:
        return do()
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [do()]
        except DiffalignError as error:
            found = [error]
    (result,) = broadcast_object_list(found)
    if isinstance(result, DiffalignError):
        raise result
    return result
