"""SIGINT, SIGTERM and SIGUSR1 while training: the step is finished, a checkpoint is written, and the run ends with the
command that continues it. SIGUSR1 is what SLURM sends before the time limit (`--signal=USR1@300`).

All processes stop after the same step, whichever of them the signal reached. On a CPU they exchange it after every
step; on GPUs the result of one step is read after the next, so that no host waits for its device. A second signal ends
the run at once. After the last step the final weights are written first; then a signal ends the run at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from diffalign.config.schema import Config
from diffalign.errors import Interrupted
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.distributed.resume_command import resume_command

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
SAME = 0.5  # seconds within which signals count as one: `timeout` sends to the process and to its group
SAME_BY_LAUNCHER = 3.0  # Ctrl-C reaches a launcher too, which passes it on to its processes


class Stopping(Callback):
    """Catches the signals within its block; as a callback, while the run trains, and ends it with a checkpoint."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.received, self.at = 0, 0.0
        self.pid = os.getpid()
        self.before: dict[signal.Signals, Any] = {}
        self.asked: tuple[torch.Tensor, torch.cuda.Event] | None = None  # the last step's answer, still on its way
        self.signum = 0  # to stop for, the same in all processes
        self.after_the_end = ""  # what to say of a signal once the final weights are written

    def on_train_begin(self, state: TrainingState) -> None:
        """Installs the handlers."""
        if not self.before:
            self.__enter__()

    def on_step_end(self, state: TrainingState) -> None:
        """Asks for a checkpoint where a signal came; a run that is at its end needs none."""
        self.signum = 0 if state.should_stop else self.now()
        state.should_save = state.should_save or bool(self.signum)

    def on_checkpoint(self, state: TrainingState, folder: Path) -> None:
        """Raises Interrupted where a signal came and this is the checkpoint of it, not one that is completed late."""
        if self.signum and folder.name == f"checkpoint-{state.step}":
            steps, command = state.run.config.training.max_train_steps, resume_command()
            how = command or "the same command with training.resume_from_checkpoint=latest"
            if self._several and self.before:  # a launcher sends it to the others when the first has ended
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                self.before.pop(signal.SIGTERM, None)
            name = signal.Signals(self.signum).name
            raise Interrupted(
                self.signum,
                f"stopped by {name} after step {state.step} of {steps}; {folder} is written. To continue: {how}",
            )

    def on_train_end(self, state: TrainingState) -> None:
        """Raises Interrupted where a signal came since the last step and images of the result are still to be drawn."""
        if not _draws_images(state):
            return
        self.after_the_end = (
            f"stopped after the last step; the final weights are in {state.run.output_dir}, and the validation images "
            "at the end are left out"
        )
        if signum := self.now(wait=True):
            raise Interrupted(signum, self.after_the_end)

    def close(self) -> None:
        """Restores the handlers that were there before."""
        self.__exit__()

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.before = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}

    def _receive(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a loader's worker: its parent ends it
            return
        if self.received and time.monotonic() - self.at > (SAME_BY_LAUNCHER if self._several else SAME):
            self.__exit__()
            os.kill(self.pid, signum)  # to the handler that was there before
            return
        if self.received:
            return
        self.received, self.at = signum, time.monotonic()
        if self.after_the_end:
            raise Interrupted(signum, self.after_the_end)
        if self.accelerator.is_main_process:
            name = signal.Signals(signum).name
            text = f"\n{name}: this step is finished and a checkpoint written; a second signal ends the run at once\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())  # print may be interrupted itself

    @property
    def _several(self) -> bool:
        return bool(self.accelerator.num_processes > 1)

    def now(self, wait: bool = False) -> int:
        """The signal to stop for after this step, the same in all processes; 0 for none. Each calls it every step.

        wait: for the device, so that the answer is of now and not of a step ago.
        """
        return self._of_any_process(self.accelerator.device, wait) if self._several else self.received

    def _of_any_process(self, device: torch.device, wait: bool) -> int:
        flag = torch.full((1,), self.received, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if device.type != "cuda" or wait:
            return int(flag)
        before, here = self.asked, torch.empty(1, dtype=torch.int32, pin_memory=True)
        here.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.asked = (here, event)
        if before is None:
            return 0
        before[1].synchronize()  # of a step ago
        return int(before[0])


def _draws_images(state: TrainingState) -> bool:
    return isinstance(state.run.config, Config) and bool(state.run.config.validation.prompts)
