"""The processes of a run: all that a launcher started train together, or none starts."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from diffalign.errors import DiffalignError, MissingPackageError, explain
from diffalign.training.distributed.launcher_settings import is_true, refuse_launcher_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from diffalign.config.schema import AnyConfig

log = logging.getLogger(__name__)

# A process that hangs or is gone is found in minutes by `distributed/watch.py`, which knows of long work that one does
# alone (writing a checkpoint); a collective itself cannot, so its own limit is above the longest of that.
PATIENCE = timedelta(hours=12)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun's, and MPI's
_ON_A_CPU = "torchrun --nproc-per-node 2 -m diffalign train my.yaml"

T = TypeVar("T")


def launched_processes() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    sizes = [os.environ[name] for name in _SIZES if os.environ.get(name)]
    if not sizes:
        return 1
    if not sizes[0].isdecimal() or int(sizes[0]) < 1:
        raise DiffalignError(
            f"WORLD_SIZE={sizes[0]} in the environment is no number of processes: unset it, or let a launcher set it"
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
    """Prepares the environment so that accelerate uses all launched processes; called before its state is made.

    Raises DiffalignError where processes were asked for and not started, where they are more than the GPUs, and for
    a device that is not there, and what accelerate's own config asks for and is not done here.
    """
    import torch

    refuse_launcher_settings()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    _check_devices(gpus)
    if launched_processes() == 1:
        _check_one_process(gpus)
    else:
        _check_several_processes(gpus)


def _check_one_process(gpus: int) -> None:
    """`accelerate launch --num_processes 2` without several GPUs starts one process and leaves only this trace."""
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if asked and not any(os.environ.get(name) for name in _SIZES):
        raise DiffalignError(
            f"accelerate launch was asked for several processes and started one, as this machine has {gpus} GPUs. "
            f"On a CPU: `{_ON_A_CPU}`. For one process: --num_processes 1 --num_machines 1 (and unset "
            "MASTER_ADDR and MASTER_PORT if you set them)"
        )


def _check_several_processes(gpus: int) -> None:
    """Sets what accelerate needs on a CPU. Raises DiffalignError for more processes than GPUs."""
    import torch

    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it, each process would be a run of its own to accelerate
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if gpus and not _uses_cpu() and local.isdecimal() and int(local) > gpus:
        raise DiffalignError(
            f"{local} processes were launched on this machine, which has {gpus} CUDA devices: launch at most {gpus} "
            "(--nproc-per-node or --num_processes), or set ACCELERATE_USE_CPU=true to train on the CPU"
        )


def _check_devices(gpus: int) -> None:
    """Raises DiffalignError for a CUDA device that the environment names and the machine does not have."""
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
    return is_true(os.environ.get("ACCELERATE_USE_CPU"))


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
    """Devices and processes for work other than training."""
    from accelerate import PartialState

    before_accelerate()
    state = PartialState(cpu=_uses_cpu(), timeout=PATIENCE)  # Accelerator reads the environment, this does not
    all_in_use(state)
    return state


def make_accelerator(config: AnyConfig) -> Accelerator:
    """Devices and processes as the launcher set them up.

    accelerate has neither autocast nor accumulation to do: `Networks` casts, `training/step.py` accumulates. Raises
    DiffalignError where launched processes are not all in use, for a device that is not there and for strategies or
    settings of FSDP that are not supported; MissingPackageError for a tracker that is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    from diffalign.training.distributed.sharding import check_sharding
    from diffalign.training.settle import with_precision

    trackers = None if config.training.report_to == "none" else config.training.report_to
    if trackers == "wandb" and importlib.util.find_spec("wandb") is None:
        raise MissingPackageError(
            "training.report_to: wandb is not installed; pip install wandb, or use tensorboard or none"
        )
    before_accelerate()
    check_sharding(config)
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=trackers,
        project_dir=config.output_dir,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        ],
    )
    all_in_use(accelerator)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch sets "no" by default
    ours = with_precision(config, accelerator.device).training.mixed_precision
    if launched not in ("no", ours) and accelerator.is_main_process:
        log.warning("mixed precision: accelerate's %s is not used; training.mixed_precision is %s", launched, ours)
    kind = accelerator.distributed_type.value
    if kind == "XLA":
        raise DiffalignError("accelerate's XLA is not supported; launch with plain data parallelism (--multi_gpu)")
    return accelerator


def on_main(accelerator: Any, do: Callable[[], T]) -> T:
    """Calls `do` in the main process; every process gets its result, or the error that it raised.

    Where that is no DiffalignError, the other processes raise a DiffalignError that says what it was.
    """
    return do() if accelerator.num_processes == 1 else _from_main(accelerator, do)


def _from_main(accelerator: Any, do: Callable[[], T]) -> T:
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    failed: Exception | None = None
    if accelerator.is_main_process:
        try:
            found = [do()]
        except Exception as error:  # the others wait for it, whatever it is
            failed, found = error, [_for_others(error)]
    (result,) = broadcast_object_list(found)
    if failed is not None:
        raise failed
    if isinstance(result, DiffalignError):
        raise result
    return result


def _for_others(error: Exception) -> DiffalignError:
    if isinstance(error, DiffalignError):
        return error
    return DiffalignError(f"the main process ended: {explain(error) or f'{type(error).__name__}: {error}'}")
