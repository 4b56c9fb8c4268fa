"""From a config to the run's source of batches: offline pairs, online or cached, or a source that makes its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from diffalign.config.schema import Config
from diffalign.config.sections import DataSection, ModelSection, TrainingSection
from diffalign.data.buckets.sizes import Shapes, in_buckets
from diffalign.data.cache.latents import CacheKey, CacheSpec, PairCache, open_cache
from diffalign.data.cache.reference_errors import ReferenceErrors
from diffalign.data.cache.trajectories import Trajectories
from diffalign.data.loader.offline_pairs import LatentSource, OfflinePairs
from diffalign.data.loader.online import Online
from diffalign.data.loader.spec import SHUFFLE_BUFFER, LoaderSpec
from diffalign.data.precompute.latents import encode_cache
from diffalign.data.precompute.recording import Work, cache_of
from diffalign.data.precompute.reference_errors import record_reference, reference_key
from diffalign.data.precompute.trajectories import record_trajectories, trajectory_key
from diffalign.data.row import DataError
from diffalign.data.sampler import CurriculumOrder, Processes
from diffalign.data.table.lists import by_length
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.prompts import Table
from diffalign.engine.measure import errors
from diffalign.experimental.kernels import kernels_by
from diffalign.models.adapters.methods import TuningMethod
from diffalign.models.loading.base import vae_factor
from diffalign.models.loading.encoder import Encoder
from diffalign.models.loading.fingerprint import network_fingerprint
from diffalign.models.loading.modules import UNet
from diffalign.models.policy.networks import Networks
from diffalign.models.policy.snapshot_reference import Former
from diffalign.objectives.base import Objective, Recordable, ask
from diffalign.sources import Context, Source
from diffalign.training.checkpoints.checkpoint import source_states
from diffalign.training.optim.optimizers import effective_batch
from diffalign.types import PairBatch

log = logging.getLogger(__name__)

SOURCE_FOLDER = "source"  # in a run's folder: files of a source that makes its pairs

BuildSource = Callable[[Networks, UNet, Former | None], Source]


def processes_of(launched: Accelerator | PartialState) -> Processes:
    """Which process this is, as accelerate counts them."""
    return Processes(launched.process_index, launched.num_processes)


def source_builder(
    config: Config, accelerator: Accelerator, table: Table, encoder: Encoder, resolution: int
) -> BuildSource:
    """A function that makes the run's source once its networks are there.

    What needs no UNet is done here, before that takes its memory: filling a latent cache, and the fingerprint of the
    base's weights while they are still as they were loaded.
    """
    if config.source is not None:
        return _own_source(config, accelerator, table, encoder, resolution)
    data, pairs = config.data, cast("PairTable", table)
    spec = _loader_spec(config, accelerator)
    if data.curriculum is not None:
        steps = data.curriculum.steps or config.training.max_train_steps
        positions = steps * effective_batch(config.training, accelerator.num_processes)
        spec = replace(spec, order=curriculum(pairs, config.seed, data.curriculum.chunks, positions))
    make = partial(OfflinePairs, pairs, spec=spec, time_ids=encoder.time_ids)
    content = open_content(data, config.seed, accelerator, pairs, encoder, resolution)
    if not (data.cache_trajectories or data.cache_reference_errors):
        return lambda networks, unet, former: make(content)
    return _with_results(
        config, accelerator, make, content, network_fingerprint(encoder.base.unet, encoder.base.schedule)
    )


def _with_results(
    config: Config,
    accelerator: Accelerator,
    make: Callable[[LatentSource], OfflinePairs],
    content: LatentSource,
    fingerprint: str,
) -> BuildSource:
    """Builds the source of a run that reads precomputed results of the base, whose weights have this fingerprint."""
    training, objective = config.training, config.objective

    def with_networks(networks: Networks, unet: UNet, former: Former | None) -> Source:
        source = make(content)
        work = Work(training.train_batch_size, processes=processes_of(accelerator), counts=networks)
        found: LatentSource
        facts: dict[str, Any]
        if config.data.cache_trajectories:
            codes = getattr(config.tuning, "quantize_base", None)
            facts = {
                "network": fingerprint,
                "precision": training.mixed_precision,
                **({"codes": codes} if codes else {}),
            }
            found = _trajectories(objective, source, networks, facts, work)
        else:
            kernels = _kernels(config.model, config.tuning, training, accelerator.device)
            facts = {"network": fingerprint, "kernels": kernels}
            found = _reference_errors(objective, source, networks, facts, work)
        accelerator.wait_for_everyone()
        return make(found)

    return with_networks


def buckets_of(data: DataSection, table: PairTable, resolution: int) -> Shapes | None:
    """The sizes that the table's pairs come to, or squares of lists of several lengths; None where all are alike.

    Raises DataError.
    """
    section = data.aspect_buckets
    if section is None:
        return by_length(table, resolution)
    return in_buckets(table, section.name(), section.sizes(resolution))


def encode_run(
    data: DataSection, run_seed: int, table: PairTable, encoder: Encoder, resolution: int, processes: Processes
) -> tuple[CacheKey, Shapes | None]:
    """Fills the run's latent cache as far as it is not there yet; this process writes its share of the shards.

    Returns the key of that cache, and the buckets of the pairs, if they have any.
    """
    buckets = buckets_of(data, table, resolution)
    spec = CacheSpec(
        resolution=resolution,
        center_crop=data.center_crop,
        random_flip=data.random_flip,
        run_seed=run_seed,
        variants=data.cache_variants,
        dtype=data.cache_dtype,
        buckets=buckets,
    )
    work = Work(num_workers=data.dataloader_num_workers, processes=processes)
    done = encode_cache(table, encoder, str(data.cache_dir), spec, work)
    if done.shards_written:
        log.info("encoded %d shards into %s", done.shards_written, done.folder)
    for problem in done.problems:
        log.warning("pair left out of the cache: %s", problem)
    return done.key, buckets


def _own_source(
    config: Config, accelerator: Accelerator, table: Table, encoder: Encoder, resolution: int
) -> BuildSource:
    """Builds the source of a run that makes its pairs, and all that it may use."""
    assert config.source is not None, "only such a run has none of these pairs"
    assert encoder.base.vae is not None, "only a run with a cache unloads its encoder"
    build, side = config.source.build, resolution // vae_factor(encoder.base.vae)
    output_dir = Path(config.output_dir)

    def with_networks(networks: Networks, unet: UNet, former: Former | None) -> Source:
        return build(
            Context(
                networks=networks,
                unet=unet,
                former=former,
                family=networks.family,
                encoder=encoder,
                table=table,
                spec=_loader_spec(config, accelerator),
                wait=accelerator.wait_for_everyone,
                folder=output_dir / SOURCE_FOLDER,
                saved=lambda: source_states(output_dir),
                latent_shape=(unet.config.in_channels, side, side),
                resolution=resolution,
                device=accelerator.device,
                center_crop=config.data.center_crop,
                random_flip=config.data.random_flip,
            )
        )

    return with_networks


def _loader_spec(config: Config, accelerator: Accelerator) -> LoaderSpec:
    """How the run draws, groups and reads its pairs."""
    data, training = config.data, config.training
    return LoaderSpec(
        run_seed=config.seed,
        train_batch_size=training.train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        processes=processes_of(accelerator),
        shuffle_buffer=data.shuffle_buffer or SHUFFLE_BUFFER,
        draws=data.draws_per_pair,
        prompt_dropout=data.proportion_empty_prompts,
        with_uncond=config.objective.needs_uncond,
        signed_masks=config.objective.takes_signs,
        num_workers=data.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def curriculum(table: PairTable, seed: int, chunks: int, positions: int) -> CurriculumOrder:
    """Easy pairs first, by the table's scores. Raises DataError when it has none."""
    scores = [table.scores(index) for index in range(len(table))]
    if any(pair is None for pair in scores):
        raise DataError(
            "data.curriculum sorts pairs by the gap between their scores, and these data have none; make some with "
            "`diffalign data score` and name the file in data.scores"
        )
    gaps = [one - two for one, two in cast("list[tuple[float, float]]", scores)]
    return CurriculumOrder(gaps, seed, chunks, positions)


def open_content(
    data: DataSection, run_seed: int, accelerator: Accelerator, table: PairTable, encoder: Encoder, resolution: int
) -> Online | PairCache:
    """The images themselves, or the latent cache, which is filled as far as it is not yet."""
    if data.cache_dir is None:
        buckets = buckets_of(data, table, resolution)
        return Online(encoder, resolution, data.center_crop, data.random_flip, buckets)
    key, buckets = encode_run(data, run_seed, table, encoder, resolution, processes_of(accelerator))
    accelerator.wait_for_everyone()
    return open_cache(data.cache_dir, key, buckets)


def _trajectories(
    objective: Recordable, source: OfflinePairs, networks: Networks, facts: Mapping[str, Any], work: Work
) -> Trajectories:
    """The trajectories of all pairs, made as far as they are not there yet; each process makes its share."""
    cache, levels = cache_of(source), objective.levels(networks.schedule)
    key = trajectory_key(cache, {**facts, "objective": objective.name, "recording": objective.recording})

    def record(batch: PairBatch) -> Tensor:
        return objective.record(batch.to(networks.device), networks)

    with networks.gathered():
        folder, per_shard = record_trajectories(source, key, record, len(levels), work)
    return Trajectories(cache, folder, per_shard, levels, objective.visited)


def _reference_errors(
    objective: Objective, source: OfflinePairs, networks: Networks, facts: Mapping[str, Any], work: Work
) -> ReferenceErrors:
    """The reference's errors at all draws, asked as far as they are not there yet; then the reference can go."""
    assert source.spec.draws is not None, "a config without it is refused"

    def asked(batch: PairBatch) -> Tensor:
        with torch.no_grad():
            return errors(networks.reference, ask(objective, batch.to(networks.device), networks))

    key = reference_key(source, {**facts, "drawn": objective.drawn})
    with networks.gathered():
        folder, per_shard = record_reference(source, key, asked, source.spec.draws, work)
    networks.forget_reference()
    return ReferenceErrors(cache_of(source), folder, per_shard)


def _kernels(
    model: ModelSection, tuning: TuningMethod, training: TrainingSection, device: torch.device
) -> dict[str, Any]:
    """What decides how a forward rounds: stored errors must be those that the reference would give now."""
    fused = kernels_by(device) if model.fused_kernels else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "tuning": tuning.method,  # matmul looks at requires_grad to choose between kernels
        "precision": training.mixed_precision,
        "allow_tf32": training.allow_tf32,
        "attention": model.attention,
        "compile": model.compile,
        "channels_last": model.channels_last,
        "text": "once for both sides",  # matmuls of other sizes may round otherwise
        **({} if fused is None else {"fused_kernels": fused}),
        **_codes(tuning),
    }


def _codes(tuning: TuningMethod) -> dict[str, str]:
    """How the base is stored where it is not as it was loaded, which its fingerprint does not tell."""
    kind = getattr(tuning, "quantize_base", None)
    return {} if kind is None else {"codes": kind}
