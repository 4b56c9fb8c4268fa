"""Sources that make their pairs while training, and the table that finds them by name. Nothing heavy is imported."""

from __future__ import annotations

from diffalign.sources.base import Context, Settings, Source, SourceError
from diffalign.sources.best_of import BestOf
from diffalign.sources.groups import GradedGroups, WeightedGroups
from diffalign.sources.online_pairs import OnlinePairs
from diffalign.sources.rollout import BranchingRollout
from diffalign.sources.selfplay import SelfPlay

SOURCES: dict[str, type[Settings]] = {
    cls.name: cls for cls in (BestOf, OnlinePairs, SelfPlay, BranchingRollout, GradedGroups, WeightedGroups)
}

__all__ = [
    "SOURCES",
    "BestOf",
    "BranchingRollout",
    "Context",
    "GradedGroups",
    "OnlinePairs",
    "SelfPlay",
    "Settings",
    "Source",
    "SourceError",
    "WeightedGroups",
]
