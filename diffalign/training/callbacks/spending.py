"""The end of a run by images through the UNets, `training.max_unet_forwards`, so that methods can be compared."""

from __future__ import annotations

from diffalign.training.callbacks.base import Callback, TrainingState


class SpendingLimit(Callback):
    """Stops before the step that would exceed the limit if it cost as much as the last one."""

    def __init__(self, limit: int) -> None:
        self.limit, self.before = limit, 0

    def on_train_begin(self, state: TrainingState) -> None:
        """Counts from here."""
        self.before = state.run.unet_forwards()

    def on_step_end(self, state: TrainingState) -> None:
        """Counts over all processes, so that they end at the same step."""
        if not state.should_stop:
            total = state.run.unet_forwards()
            cost, self.before = total - self.before, total
            state.should_stop = total + cost > self.limit
