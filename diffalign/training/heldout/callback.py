"""The callback that measures held-out pairs and adds their metrics to the log."""

from __future__ import annotations

import logging

from accelerate.utils import gather_object

from diffalign.data.row import DataError
from diffalign.training.callbacks.base import Callback, TrainingState
from diffalign.training.heldout.estimates import Measurement, estimates
from diffalign.training.heldout.measure import FixedPoints, PointValues
from diffalign.training.processes import on_main
from diffalign.training.trainable import Run

log = logging.getLogger(__name__)


class HeldOut(Callback):
    """Measures every `validation.pairs_every` steps and at the last one, with the EMA weights if there are any."""

    def __init__(self, run: Run, points: FixedPoints) -> None:
        self.run, self.points = run, points
        self.every = run.config.validation.pairs_every
        self.of_pairs: dict[str, dict[int, float]] = {}  # of the last measurement, as in Measurement

    def on_log(self, state: TrainingState) -> None:
        """Adds `heldout/…` to the metrics of a step at which a measurement is due."""
        if self.due(state):
            measured = self.measure()
            state.metrics |= measured.metrics
            self.of_pairs = measured.of_pairs

    def due(self, state: TrainingState) -> bool:
        """Whether this step is measured."""
        return state.should_stop or state.step % self.every == 0

    def measure(self) -> Measurement:
        """The policy as it is now, the same in all processes, each of which calls this."""
        run = self.run
        with run.averaged_weights(), run.networks.gathered():  # the shares of processes differ
            own = self.points.values(run.objective, run.networks)
        found: list[PointValues] = gather_object(own) if run.accelerator.num_processes > 1 else own
        if not found:
            raise DataError("validation.pairs: no held-out pair can be read; `diffalign data check` says why")
        table, timesteps = self.points.source.table, run.networks.schedule.num_train_timesteps
        return on_main(run.accelerator, lambda: estimates(found, table.prompts, timesteps))
