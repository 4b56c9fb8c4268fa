"""Sources that make their pairs while training, and the table that finds them by name. Nothing heavy is imported."""

from __future__ import annotations

from typing import Any

from diffalign.sources.base import Context, Settings, Source, SourceError
from diffalign.sources.best_of import BestOf
from diffalign.sources.online_pairs import OnlinePairs
from diffalign.sources.rollout import BranchingRollout

SOURCES: dict[str, type[Any]] = {cls.name: cls for cls in (BestOf, OnlinePairs, BranchingRollout)}

__all__ = ["SOURCES", "BestOf", "BranchingRollout", "Context", "OnlinePairs", "Settings", "Source", "SourceError"]
