"""The held-out pairs of a run with their encoded images."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from diffalign.config.schema import Config
from diffalign.config.sections import DataSection
from diffalign.data.loader.offline_pairs import OfflinePairs
from diffalign.data.loader.spec import LoaderSpec
from diffalign.data.table.pairs import PairTable
from diffalign.models.loading.encoder import Encoder
from diffalign.objectives.base import require_terms
from diffalign.training.build_source import open_content, processes_of
from diffalign.training.heldout.measure import FixedPoints


def build_points(
    config: Config, accelerator: Accelerator, table: PairTable, encoder: Encoder, resolution: int
) -> FixedPoints:
    """The points at which a run with this config measures the pairs of a table; their latent cache is filled.

    Raises DiffalignError for margins and masks that the objective does not support.
    """
    objective, validation = config.objective, config.validation
    require_terms(objective, margin="margin" in table.terms, signs=table.negative_masks)
    data = encoded_as(config.data, table)
    content = open_content(data, validation.pairs_seed, accelerator, table, encoder, resolution)
    spec = LoaderSpec(
        run_seed=validation.pairs_seed,
        train_batch_size=1,  # its stream of batches is not used
        with_uncond=objective.needs_uncond,
        signed_masks=objective.takes_signs,
    )
    return FixedPoints(
        OfflinePairs(table, content, spec, time_ids=encoder.time_ids),
        points=validation.points_per_pair,
        batch_size=validation.pairs_batch_size or config.training.train_batch_size,
        processes=processes_of(accelerator),
    )


def encoded_as(data: DataSection, table: PairTable) -> DataSection:
    """How the images of held-out pairs are encoded: without random crops and flips, in a cache of their own."""
    fixed: dict[str, Any] = {
        "center_crop": True,
        "random_flip": False,
        "cache_variants": 1,
        "dataloader_num_workers": 0,
    }
    if data.cache_dir is not None:
        fixed["cache_dir"] = f"{data.cache_dir}/heldout-{table.identity[:8]}"
    return data.model_copy(update=fixed)
