"""`LoaderSpec`: how offline pairs are drawn, grouped into micro-batches and read."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.data.sampler import ALONE, Order, Processes

SHUFFLE_BUFFER = 1024


@dataclass(frozen=True)
class LoaderSpec:
    """How `OfflinePairs` draws and reads the pairs of a table."""

    run_seed: int
    train_batch_size: int  # pairs of this process in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches of an optimiser step
    processes: Processes = ALONE
    order: Order | None = None  # which pair is visited when; None: one permutation of the table per epoch
    shuffle_buffer: int = SHUFFLE_BUFFER  # of remote shards: pairs that are mixed, `sampler.BlockOrder`
    draws: int | None = None  # a pair's visits repeat after so many: visit n draws what n % draws did; None: never
    prompt_dropout: float = 0.0  # share of visits that see the null prompt, both sides alike
    with_uncond: bool = False  # add the null prompt's conditioning, for objectives that guide
    signed_masks: bool = True  # whether masks may go below 0; if not, one that does stops the run with DataError
    # share of the pairs that may turn out unreadable (and be substituted) before the run stops; one pair always may
    max_unreadable: float = 0.05
    num_workers: int = 0
    pin_memory: bool = False
