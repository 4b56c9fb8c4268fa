"""The mean of each metric since the last log: to `metrics.jsonl` and to the tracker of `training.report_to`."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import gather_object

from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.metrics import METRICS_FILE, JsonLines


class MetricsLog(Callback):
    """Calls `on_log` every `every` steps and at the last one, and writes what the callbacks before it leave."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.lines: JsonLines | None = None  # in the main process
        self.logged = 0  # the step of the last log, the same in all processes

    def on_train_begin(self, state: TrainingState) -> None:
        """Opens the file without the lines of steps that the run will take again."""
        self.logged = state.step
        if state.run.accelerator.is_main_process:
            self.lines = JsonLines(state.run.output_dir / METRICS_FILE, state.step)

    def on_step_end(self, state: TrainingState) -> None:
        """Reads the meter where a log is due."""
        if state.should_stop or state.step % self.every == 0:
            self._log(state)

    def on_checkpoint(self, state: TrainingState, folder: Path) -> None:
        """Logs the last step where a callback ends the run at its checkpoint, which is written after the step's log."""
        if state.should_stop and self.logged != state.step:
            self._log(state)

    def on_log(self, state: TrainingState) -> None:
        """Writes one line."""
        if self.lines is not None:
            self.lines.write(state.step, state.metrics)
        state.run.accelerator.log(state.metrics, step=state.step)

    def _log(self, state: TrainingState) -> None:
        """Joins the metrics of all processes, each of which calls this."""
        self.logged = state.step
        state.metrics = state.meter.means(gather_object if state.run.accelerator.num_processes > 1 else None)
        state.metrics["unet_forwards"] = state.run.unet_forwards()
        state.call("on_log")
