"""diffalign: preference tuning of text-to-image diffusion models, with evidence."""

from diffalign.engine.schedule import NoiseSchedule
from diffalign.records import Conditioning, Evidence, PairBatch, Probe, Score

__version__ = "0.1.0"

__all__ = ["Conditioning", "Evidence", "NoiseSchedule", "PairBatch", "Probe", "Score", "__version__"]
