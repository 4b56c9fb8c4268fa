"""The data of a run, opened before any model is loaded: pairs with their scores and users, prompts, or winners."""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import replace

from accelerate import Accelerator

from diffalign.config.schema import AnyConfig, Config, PreferenceModelConfig
from diffalign.data.formats.rankings import RankedColumns
from diffalign.data.heldout import overlap, prompt_key, split_by_prompt
from diffalign.data.row import DataError
from diffalign.data.table.lists import ListTable, counted_lengths, lengths
from diffalign.data.table.open import open_pairs
from diffalign.data.table.pairs import PairTable
from diffalign.data.table.prompts import Table, open_prompts
from diffalign.data.table.score_aggregation import use_axes
from diffalign.data.table.users import open_users, use_users
from diffalign.data.table.winners import open_winners
from diffalign.models.adapters.methods import known_methods
from diffalign.models.text.weights import weighted
from diffalign.training.inspect.score_units import check_units
from diffalign.training.processes import on_main

log = logging.getLogger(__name__)


def open_table(config: AnyConfig, accelerator: Accelerator | None = None) -> Table:
    """The usable pairs of the run's data, or the prompts of a source that generates its images; needs no model.

    Ties are usable where a preference model is trained. `.heldout` are the pairs that the run measures, if any.
    Of several processes the first reads the files and sends its table to the others. Raises DataError in all of them.
    """
    return _open_table(config) if accelerator is None else on_main(accelerator, lambda: _open_table(config))


def _open_table(config: AnyConfig) -> Table:
    data, source = config.data, config.source if isinstance(config, Config) else None
    if source is None or not isinstance(config, Config):
        keep_ties = isinstance(config, PreferenceModelConfig)
        table = open_pairs(data.path, replace(data.spec, keep_ties=keep_ties, lists=compares_lists(config)))
        table.require_usable()
        return prepared(config, table)
    check_units(config.objective, source, [], None)
    found: Table
    if source.data == "prompts":
        found = open_prompts(data.path, limit=data.max_pairs)
    else:
        found = open_winners(data.path, data.spec)
        if isinstance(found, PairTable):
            no_terms(found, f"source {source.name} generates its pairs")
    enough_prompts(config, len(found))
    found.heldout = open_heldout(config)
    return found


def prepared(config: AnyConfig, table: PairTable) -> PairTable:
    """The pairs that a run trains on, with scores and users of its `data` section; the held-out ones are `.heldout`.

    A table whose `.heldout` is set has its held-out pairs already. Raises DataError.
    """
    data, heldout = config.data, table.heldout
    fit_objective(config, table)
    if data.cache_reference_errors and "mask" in table.terms:
        raise DataError(
            "data.cache_reference_errors: errors under a mask depend on the mask and are not cached; remove one of them"
        )
    if data.axes:
        use_axes(table, data.axes, data.aggregate, relabel=data.relabel)
    if isinstance(config, Config):
        check_units(config.objective, config.source, data.axes, table)
    if isinstance(config, Config) and config.validation.pairs is not None:
        share = config.validation.pairs
        if isinstance(share, float):
            validation = config.validation
            train, rest = split_by_prompt(table.prompts, share, validation.pairs_seed, validation.max_pairs)
            table, heldout = table.part(train), table.part(rest)
        else:
            table, heldout = copy(table), open_heldout(config) if heldout is None else heldout
        assert heldout is not None, "validation.pairs is a path"
        _report_heldout(table, heldout)
        table.heldout = heldout
    if config.training.train_batch_size > len(table):
        raise DataError(
            f"training.train_batch_size: {config.training.train_batch_size} pairs, and {data.path} has {len(table)} "
            f"usable ones (data.max_pairs: {data.max_pairs}); set it to {len(table)} or less, or give more pairs"
        )
    for each in (table,) if heldout is None else (table, heldout):
        _use_users(config, each)
        if data.cache_dir is not None:
            _ = each.identity  # may read every image once: done here, before other processes get the table
    return table


def compares_lists(config: AnyConfig) -> bool:
    """Whether the run's objective compares whole ranked lists."""
    return isinstance(config, Config) and config.objective.compares == "lists"


def fit_objective(config: AnyConfig, table: PairTable) -> None:
    """Raises DataError for lists in a run that compares pairs, the pairs of lists in one that compares lists, and for
    settings that lists do not have."""
    lists = compares_lists(config)
    if not isinstance(table, ListTable):
        if lists and isinstance(table.columns, RankedColumns):
            raise DataError(
                f"{table.storage} has ranked lists, and its pairs were opened, while the objective compares whole "
                "lists; open it with lists=True"
            )
        return
    if not lists:
        raise DataError(
            f"{table.storage} was opened as ranked lists, and this run's objective compares pairs; open it without "
            "lists=True, or use an objective of lists"
        )
    data = config.data
    set_ = [name for name in ("scores", "relabel", "curriculum", "aspect_buckets") if getattr(data, name)]
    if set_:
        raise DataError(
            f"data.{', data.'.join(set_)}: {table.storage} has ranked lists, and this is a setting of pairs; remove it"
        )
    alike = data.cache_reference_errors or config.training.reference_batch_size is not None
    if alike and len(lengths(table)) > 1:
        name = "data.cache_reference_errors" if data.cache_reference_errors else "training.reference_batch_size"
        raise DataError(
            f"{name}: needs lists of one length, and {table.storage} has lists of several ({counted_lengths(table)}); "
            "remove it"
        )


def open_heldout(config: Config) -> PairTable | None:
    """The pairs of `validation.pairs` where that is a path, read as those of `data.path` are. Raises DataError."""
    validation, data = config.validation, config.data
    if not isinstance(validation.pairs, str):
        return None
    split = validation.pairs_split or data.split
    spec = replace(data.spec, split=split, max_pairs=validation.max_pairs, lists=compares_lists(config))
    try:
        table = open_pairs(validation.pairs, spec)
        table.require_usable()
    except DataError as error:
        raise DataError(f"validation.pairs: {error}") from error
    return table


def _report_heldout(train: PairTable, heldout: PairTable) -> None:
    """Logs how many pairs are held out. Raises DataError for held-out pairs that are trained on."""
    shared, prompts = overlap(train, heldout), len(set(map(prompt_key, heldout.prompts)))
    log.info("%d pairs of %d prompts are held out; %d are trained on", len(heldout), prompts, len(train))
    if shared:
        log.warning(
            "validation.pairs: %d of %d held-out pairs have a prompt that is trained on; numbers for new prompts may "
            "be lower",
            *(shared, len(heldout)),
        )


def _use_users(config: AnyConfig, table: PairTable) -> None:
    """Gives pairs their users' embeddings where the tuning method needs them. Raises DataError."""
    data = config.data
    if isinstance(config, Config) and config.tuning.needs_users:
        users = None if data.users is None else open_users(data.users)
        use_users(table, users, where=f"data.users: {data.users}")
        if users is not None and config.validation.user is not None:
            users.of(config.validation.user, "validation.user")  # an unknown id is refused now
    elif table.layout.user_embed is not None:
        needing = " or ".join(name for name, method in known_methods().items() if method.needs_users)
        log.info("the pairs have users (%s); only tuning.method: %s uses them", table.layout.user_embed, needing)


def refuse_weights(config: AnyConfig, table: Table) -> None:
    """Raises ModelError for prompts with weights such as (word:1.2) where the config refuses them."""
    for each in (table, table.heldout):
        if each is not None and config.model.prompt_weights == "refuse":
            weighted(each.prompts, "refuse")


def enough_prompts(config: Config, prompts: int) -> None:
    """Raises DataError for a source whose round would visit some of so many prompts twice."""
    source = config.source
    per_round = getattr(source, "prompts_per_round", 0)  # not of sources that count rounds in images
    if source is not None and per_round > prompts:
        raise DataError(
            f"source.prompts_per_round: {per_round}, and {config.data.path} has {prompts} different prompts "
            f"(data.max_pairs: {config.data.max_pairs}); set it to {prompts} or less, or give more prompts"
        )


def no_terms(table: PairTable, why: str) -> None:
    """Raises DataError for pairs with weights, margins or masks in a run that cannot use them."""
    if table.terms:
        left_out = ", ".join(f'{part}: ""' for part in table.terms)
        raise DataError(
            f"the data have {', '.join(table.terms)} of each pair, which this run cannot use, because {why}: leave "
            f"them out with data.columns: {{{left_out}}}"
        )
