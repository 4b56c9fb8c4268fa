"""What a card says of weights, as far as their run records it, without a place on this machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffalign.config.schema import Config
from diffalign.export.tuned_run import TunedRun, shown
from diffalign.io.hub import is_hub_id

INPUTS = "inputs"  # in a run's run.json: what its base and its data were when it began
RUN_FILE = "run.json"


@dataclass(frozen=True)
class Source:
    """A base or a data set: its Hub id, or its last name on the machine where it was used."""

    name: str
    on_hub: bool

    @staticmethod
    def of(place: str, recorded: Any = None) -> Source:
        """The source at `place`; `recorded`: what the run noted of it when it began."""
        if isinstance(recorded, dict):
            return Source(str(recorded.get("name")), recorded.get("on_hub") is True)
        return Source(shown(place), is_hub_id(place) and not Path(place).exists())


def inputs_record(base: str, family: str, data: str, rows: dict[str, str]) -> dict[str, Any]:
    """What a run writes to its run.json when it begins: names without folders, the number and hashes of its rows."""
    sources = {"base": Source.of(base), "data": Source.of(data)}
    names = {name: {"name": one.name, "on_hub": one.on_hub} for name, one in sources.items()}
    return {**names, "family": family, "rows": rows}


@dataclass(frozen=True)
class Exported:
    """A file that was exported from a run."""

    file: Path
    layout: str  # kohya, diffusers or single-file
    dtype: str
    notes: str = ""  # of an extracted LoRA: what it misses


@dataclass(frozen=True)
class CardFacts:
    """Weights, their run and, for the card of an export, the exported file."""

    run: TunedRun
    exported: Exported | None = None

    @property
    def config(self) -> Config | None:
        """The run's settings; None where none are recorded."""
        return self.run.config

    @property
    def kind(self) -> str:
        """lora, unet or another method's layout; of an export lora or single-file."""
        if self.exported is None:
            return self.run.tuned.kind
        return "single-file" if self.exported.layout == "single-file" else "lora"

    @property
    def weights(self) -> Path:
        """The file or folder that the card is of."""
        return self.run.tuned.path if self.exported is None else self.exported.file

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """The run's run.json; empty where there is none that can be read."""
        try:
            found = json.loads((self.run.folder / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def base(self) -> Source:
        """The base."""
        return Source.of(self.run.base.pretrained_model_name_or_path, self._input("base"))

    @property
    def data(self) -> Source | None:
        """The pairs or prompts; None where no run is recorded."""
        return None if self.config is None else Source.of(self.config.data.path, self._input("data"))

    @property
    def rows(self) -> dict[str, str]:
        """The number of pairs (or prompts) as `pairs`, and hashes of them; empty where none were recorded."""
        found = self._input("rows")
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}

    @property
    def family(self) -> str | None:
        """sd or sdxl; None where the run did not record it."""
        found = self._input("family")
        return found if found in ("sd", "sdxl") else None

    @property
    def papers(self) -> list[str]:
        """The papers of the objective and of the source of pairs, as their classes cite them."""
        parts = [] if self.config is None else [self.config.objective, self.config.source]
        return list(dict.fromkeys(str(part.paper) for part in parts if getattr(part, "paper", None)))

    def _input(self, name: str) -> Any:
        inputs = self.recorded.get(INPUTS)
        return inputs.get(name) if isinstance(inputs, dict) else None
