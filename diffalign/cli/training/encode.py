"""`diffalign encode`: fill the latent cache of a config; launched processes share the work."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast

from diffalign.cli.next_steps import print_next
from diffalign.cli.training.options import config_arguments
from diffalign.errors import DiffalignError

if TYPE_CHECKING:
    from diffalign.data.table.pairs import PairTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and its overrides."""
    config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Encodes what is missing. Raises DiffalignError where the config has no latent cache."""
    from diffalign.config.schema import PreferenceModelConfig, load_config
    from diffalign.models.loading.encoder import Encoder
    from diffalign.training.build import load_run_base, resolution_of
    from diffalign.training.build_source import encode_run, processes_of
    from diffalign.training.distributed.shared_folder import require_shared
    from diffalign.training.distributed.vital_signs import long_work
    from diffalign.training.distributed.watch import Watch
    from diffalign.training.heldout.build import encoded_as
    from diffalign.training.open_data import open_table, refuse_weights
    from diffalign.training.processes import make_state
    from diffalign.training.remedies import with_remedies

    config = load_config(args.config, args.overrides)
    if isinstance(config, PreferenceModelConfig):
        raise DiffalignError(
            "the run of a preference model has no latent cache: it encodes its pairs at every visit. Train without one"
        )
    if config.data.cache_dir is None:
        raise DiffalignError("data.cache_dir is not set: name the folder of the cache, e.g. data.cache_dir=cache/pairs")
    state = make_state()
    require_shared(Path(config.data.cache_dir), state, "data.cache_dir", copies=True)
    with with_remedies(config), Watch(state), long_work("encoding"):
        table = cast("PairTable", open_table(config, state))  # a run with a source has no cache
        refuse_weights(config, table)
        base = load_run_base(config.model)
        encoder = Encoder(base, state.device)
        resolution = resolution_of(config.data, base)
        encode_run(config.data, config.seed, table, encoder, resolution, processes_of(state))
        if (heldout := table.heldout) is not None:
            data = encoded_as(config.data, heldout)
            encode_run(data, config.validation.pairs_seed, heldout, encoder, resolution, processes_of(state))
        state.wait_for_everyone()
    if state.is_main_process:
        measured = "" if table.heldout is None else f" and {len(table.heldout)} held-out ones"
        print(f"{config.data.cache_dir} holds {len(table)} pairs{measured} at {resolution} pixels")
        print_next(["train", str(args.config), *args.overrides])
