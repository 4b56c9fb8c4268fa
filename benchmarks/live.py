"""The peer's own script, unmodified, one optimiser step a call.

    LiveScript(path, folder, parquet, settings).step()

The script's `main` runs in a thread of this process. It logs once at the end of every step, after it has read the loss
from the device. In that call the thread waits until the next step is requested. The script itself is unchanged.
`wandb`, which it imports and does not need here, is an empty module. If torchvision is installed beside a CPU-only
torch, the two operators that its import needs are declared.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peer import PeerSettings

STEPS = 1_000_000  # more than are taken


class _Stop(BaseException):
    """Ends the script's thread."""


def load_script(path: Path) -> types.ModuleType:
    """The script as a module. Raises FileNotFoundError, and ImportError where torchvision is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"--peer {path}: no such file; give diffusers' train_diffusion_dpo_sdxl.py")
    if importlib.util.find_spec("wandb") is None:
        stub = types.ModuleType("wandb")
        stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        sys.modules["wandb"] = _STUBS["wandb"] = stub
    let_torchvision_in()
    spec = importlib.util.spec_from_file_location("peer_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"--peer: the script needs {error.name}; leave --peer out to measure its replica") from error
    return module


_STUBS: dict[str, types.ModuleType] = {}  # modules that stand in for what is not installed, while a script runs
_LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as the library that declared it


def let_torchvision_in() -> None:
    """Declares the two operators that torchvision's import asks for and a CPU-only torch does not have.

    To be called before anything imports torchvision; transformers and diffusers do where it is there.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("torchvision") is None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, arguments in (
        ("nms", "Tensor dets, Tensor scores, float iou"),
        ("qnms", "Tensor dets, Tensor s, float i"),
    ):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}({arguments}) -> Tensor")
    _LIBRARIES.append(library)


def arguments(folder: Path, data: Path, out: Path, settings: PeerSettings) -> list[str]:
    """The script's command line for a pipeline folder and a folder with a parquet file."""
    named = {
        "pretrained_model_name_or_path": folder,
        "dataset_name": data,
        "dataset_split_name": "train",
        "output_dir": out,
        "resolution": settings.resolution,
        "train_batch_size": settings.train_batch_size,
        "vae_encode_batch_size": settings.vae_encode_batch_size,
        "beta_dpo": int(settings.beta_dpo),
        "rank": settings.rank,
        "learning_rate": settings.learning_rate,
        "lr_warmup_steps": 0,
        "mixed_precision": settings.mixed_precision,
        "max_train_steps": STEPS,
        "checkpointing_steps": STEPS,
        "seed": settings.seed,
    }
    flags = ["--no_hflip", *(["--gradient_checkpointing"] if settings.gradient_checkpointing else [])]
    return [*(f"--{name}={value}" for name, value in named.items()), *flags]


class LiveScript:
    """The running script. `close` ends it."""

    def __init__(self, path: Path, folder: Path, parquet: Path, out: Path, settings: PeerSettings) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=False)
        script = load_script(path)
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping, self._error = False, None
        self.logged: list[dict[str, float]] = []
        self._log: Callable[..., Any] = Accelerator.log
        original = self._log

        def log(accelerator: Any, values: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            result = original(accelerator, values, *args, **kwargs)
            if threading.current_thread() is self._thread:
                self.logged.append(dict(values))
                self._done.release()
                self._go.acquire()
                if self._stopping:
                    raise _Stop
            return result

        def run() -> None:
            self._go.acquire()
            try:
                script.main(script.parse_args(arguments(folder, parquet.parent, out, settings)))
            except _Stop:
                pass
            except BaseException as error:  # handed to whoever asked for the step
                self._error = error
            self._done.release()

        Accelerator.log = log
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """One optimiser step of the script; raises what the script raised."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the script where it stands, and gives back what it needed of this process."""
        from accelerate import Accelerator

        self._stopping = True
        self._go.release()
        self._thread.join()
        Accelerator.log = self._log
        for name, stub in _STUBS.items():
            if sys.modules.get(name) is stub:
                del sys.modules[name]
