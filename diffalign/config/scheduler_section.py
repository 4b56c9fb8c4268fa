"""The section `model.scheduler`: settings in place of the scheduler config's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from diffalign.config.value_types import Number, Section, Skipped, Switch

Beta = Annotated[Number, Field(gt=0, lt=1)]


class SchedulerSection(Section):
    """What a base was trained on, and where samplers step, whatever its scheduler config says; null: as it says."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None  # what the network predicts
    rescale_betas_zero_snr: Switch | None = None  # zero terminal SNR (arXiv 2305.08891)
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = None  # of a sampler's steps
    steps_offset: Skipped | None = None  # added to the steps of `leading`
    set_alpha_to_one: Switch | None = None  # a sampler's last step goes to the clean image, or to the first timestep
    beta_start: Beta | None = None
    beta_end: Beta | None = None
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are set."""
        return self.model_dump(exclude_none=True)
