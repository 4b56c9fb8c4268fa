"""diffalign: preference tuning of text-to-image diffusion models, with evidence.

    from diffalign import DiffusionDPO, LoRA, Trainer, TrainingArguments

Every public name is imported when it is first used: `import diffalign` imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffalign.engine.schedule import NoiseSchedule as NoiseSchedule
    from diffalign.errors import DiffalignError as DiffalignError
    from diffalign.evaluation.compare import compare as compare
    from diffalign.evaluation.evaluate import evaluate as evaluate
    from diffalign.evaluation.generate import generate as generate
    from diffalign.evaluation.recipe import Tuned as Tuned
    from diffalign.evaluation.sampling import Sampling as Sampling
    from diffalign.evaluation.scoring import Scoring as Scoring
    from diffalign.io.progress import disable_progress_bars as disable_progress_bars
    from diffalign.objectives import DMPO as DMPO
    from diffalign.objectives import DSODRO as DSODRO
    from diffalign.objectives import DSPO as DSPO
    from diffalign.objectives import FDPO as FDPO
    from diffalign.objectives import IPO as IPO
    from diffalign.objectives import KTO as KTO
    from diffalign.objectives import SFT as SFT
    from diffalign.objectives import SPO as SPO
    from diffalign.objectives import ConservativeDPO as ConservativeDPO
    from diffalign.objectives import DiffusionDPO as DiffusionDPO
    from diffalign.objectives import DiffusionDRO as DiffusionDRO
    from diffalign.objectives import DiffusionNFT as DiffusionNFT
    from diffalign.objectives import InPO as InPO
    from diffalign.objectives import InversionDPO as InversionDPO
    from diffalign.objectives import LinearDPO as LinearDPO
    from diffalign.objectives import MaPO as MaPO
    from diffalign.objectives import PolyDPO as PolyDPO
    from diffalign.objectives import RobustDPO as RobustDPO
    from diffalign.objectives import SePPO as SePPO
    from diffalign.objectives import SmPO as SmPO
    from diffalign.objectives.modified import modified as modified
    from diffalign.training.callbacks.base import Callback as Callback
    from diffalign.training.callbacks.base import TrainingState as TrainingState
    from diffalign.training.trainer import FullFineTuning as FullFineTuning
    from diffalign.training.trainer import LoRA as LoRA
    from diffalign.training.trainer import Trainer as Trainer
    from diffalign.training.trainer import TrainingArguments as TrainingArguments
    from diffalign.training.trainer import load_pairs as load_pairs
    from diffalign.types import Conditioning as Conditioning
    from diffalign.types import Evidence as Evidence
    from diffalign.types import PairBatch as PairBatch
    from diffalign.types import Probe as Probe
    from diffalign.types import Score as Score

_OBJECTIVES = (
    "ConservativeDPO DiffusionDPO DiffusionDRO DiffusionNFT DMPO DSODRO DSPO FDPO InPO InversionDPO IPO KTO "
    "LinearDPO MaPO PolyDPO RobustDPO SePPO SFT SmPO SPO"
)
_HOME = {
    "NoiseSchedule": "diffalign.engine.schedule",
    "DiffalignError": "diffalign.errors",
    "compare": "diffalign.evaluation.compare",
    "evaluate": "diffalign.evaluation.evaluate",
    "generate": "diffalign.evaluation.generate",
    "Sampling": "diffalign.evaluation.sampling",
    "Scoring": "diffalign.evaluation.scoring",
    "Tuned": "diffalign.evaluation.recipe",
    "disable_progress_bars": "diffalign.io.progress",
    **dict.fromkeys(("Callback", "TrainingState"), "diffalign.training.callbacks.base"),
    **dict.fromkeys(_OBJECTIVES.split(), "diffalign.objectives"),
    "modified": "diffalign.objectives.modified",
    **dict.fromkeys(("Conditioning", "Evidence", "PairBatch", "Probe", "Score"), "diffalign.types"),
    **dict.fromkeys(
        ("FullFineTuning", "LoRA", "Trainer", "TrainingArguments", "load_pairs"), "diffalign.training.trainer"
    ),
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
