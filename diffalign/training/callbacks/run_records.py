"""What a log leaves besides the metrics: how many pairs had which logit, and how long training took.

Two files of their own, one line a log. Times differ between runs that are otherwise equal, so `metrics.jsonl` has none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object

from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.metrics import MARGIN_WIDTH, MARGINS_FILE, TIMING_FILE, JsonLines


class RunRecords(Callback):
    """Writes `margins.jsonl` and `timing.jsonl`; a resumed run continues both.

    Seconds are those of training (validation images, checkpoints and generated pairs in it), over all sessions of the
    run; steps that a killed run took after its last checkpoint are not in them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began: float | None = None
        self.files: tuple[JsonLines, JsonLines] | None = None  # in the main process

    def on_train_begin(self, state: TrainingState) -> None:
        """Opens the files without the lines of steps that the run will take again."""
        if state.run.accelerator.is_main_process:
            folder = state.run.output_dir
            self.files = JsonLines(folder / MARGINS_FILE, state.step), JsonLines(folder / TIMING_FILE, state.step)
            if self.began is None:  # a return to an earlier checkpoint costs time too
                before = _seconds_before(folder / TIMING_FILE)
                self.began = self.clock() - (before or 0.0)
                if before is None and state.step == 0:  # a run killed before its first checkpoint has this line
                    self._time(state, 0)

    def on_log(self, state: TrainingState) -> None:
        """Writes a line of each; every process joins the counts."""
        counts = state.meter.margins(gather_object if state.run.accelerator.num_processes > 1 else None)
        if self.files is not None:
            if counts:
                self.files[0].write(state.step, {"width": MARGIN_WIDTH, "counts": counts})
            self._time(state, int(state.metrics.get("unet_forwards", 0)))

    def _time(self, state: TrainingState, forwards: int) -> None:
        assert self.files is not None
        assert self.began is not None
        line = {
            "seconds": round(self.clock() - self.began, 3),
            "pairs": state.step * state.run.pairs_per_step,
            "unet_forwards": forwards,
        }
        if state.run.accelerator.device.type == "cuda":
            line["peak_memory"] = torch.cuda.max_memory_allocated(state.run.accelerator.device)
        self.files[1].write(state.step, line)


def _seconds_before(path: Path) -> float | None:
    """Seconds of the run's earlier sessions, at the step that it resumes from; None where there are none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return float(json.loads(lines[-1])["seconds"]) if lines else None
