"""The pairs of one round on disk, so that they can be read again after a stop, by other processes, or made elsewhere.

    round-00003/share-00001-of-00002.safetensors      what the second of two processes made in round 3

    prompt    int64 [pair]               row of the run's table of prompts
    place     int64 [pair]               position in the run's line of prompts, unique over the run
    index     int64 [pair]               which of the pairs made at that place
    latents   float32 "pair side c h w"  scaled VAE latents; side 0 chosen, 1 rejected, or the chosen one alone
    geometry  int64 "pair side 6"        SDXL's geometry of both images, pixels; a side axis of 1 is shared by both
    seeds     int64 "pair side"          seed of the starting noise; -1 for an image that was not sampled
    scores    float32 "pair side"        a scorer's values                                              (optional)
    noisy, clean   float32 "pair side [point] c h w"     transitions; a side axis of 1 is shared by both      (optional)
    t, t_prev      int64 "pair [point]"                  their timesteps; below 0: the clean image            (optional)

The header says `format`, `round`, `policy_version` (optimiser steps taken when the pairs were made), `key` (what
they were made with), `pairs`, `sha256` of the file, and cost and metrics of making it, which a run that finds it counts
and logs as one that makes it: `forwards` (images through the networks) and `metrics` (JSON, values by name). A share
without pairs has no tensors. Pairs are read in the order of (place, index),
whatever the number of shares. Files are written under another name and renamed: a file with its own name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.data.sampler import Processes
from diffalign.engine.random import pair_key
from diffalign.io.files import room_for, sync, temporary
from diffalign.io.mapped_tensors import MappedTensors
from diffalign.io.weight_files import EMPTY_STAMP, stamp, stamp_fault
from diffalign.sources.base import SourceError
from diffalign.types import Record, Transitions, axes, cat

FORMAT = "1"
NO_SEED = -1  # of an image that was not sampled
_MOVES = ("noisy", "clean", "t", "t_prev")
_WITH_SIDES = ("latents", "geometry", "seeds", "scores", "noisy", "clean")
_SHARE = re.compile(r"share-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Place:
    """One position in the run's line of prompts: every prompt once, in a seeded order, then again in another."""

    number: int  # unique over the run
    row: int  # of the table
    id: str
    prompt: str

    def seed(self, run_seed: int, candidate: int) -> int:
        """Seed of the starting noise of an image sampled at this place: 32 bits, short enough to type."""
        return pair_key(run_seed, f"{self.id}\x1f{candidate}", self.number) >> 31


@dataclass(frozen=True)
class Records(Record):
    """The pairs of a round; see the head of this file for each field. In a file, the pair axis comes first."""

    prompt: Tensor = field(metadata=axes("pair"))
    place: Tensor = field(metadata=axes("pair"))
    index: Tensor = field(metadata=axes("pair"))
    latents: Tensor = field(metadata=axes("side pair c h w"))
    geometry: Tensor = field(metadata=axes("side pair 6"))
    seeds: Tensor = field(metadata=axes("side pair"))
    scores: Tensor | None = field(default=None, metadata=axes("side pair"))
    transitions: Transitions | None = None

    def __len__(self) -> int:
        return len(self.place)


@dataclass(frozen=True)
class Rollout:
    """One process's part of a round."""

    records: Records | None  # None: no valid pair
    metrics: dict[str, Tensor]  # of all that was made, valid or not; averaged over entries and processes


def fingerprint(settings: Any, table_identity: str, run_seed: int, resolution: int) -> str:
    """Hash of what the pairs of a round depend on besides policy and round."""
    text = f"{settings!r}\x1f{table_identity}\x1f{run_seed}\x1f{resolution}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class About:
    """The policy and the settings that made the pairs of a round."""

    round: int
    policy_version: int  # optimiser steps that the policy had taken
    key: str  # hash of settings, prompts and seed

    def header(self, pairs: int) -> dict[str, str]:
        """As a file's metadata."""
        own = {f.name: str(getattr(self, f.name)) for f in fields(self)}
        return {"format": FORMAT, **own, "pairs": str(pairs)}


def round_folder(folder: Path, number: int) -> Path:
    """The folder of a round's files."""
    return folder / f"round-{number:05d}"


def rounds_there(folder: Path) -> list[int]:
    """Numbers of the rounds that have a folder."""
    found = (re.fullmatch(r"round-(\d{5,})", path.name) for path in folder.glob("round-*"))
    return sorted(int(match[1]) for match in found if match)


@dataclass(frozen=True)
class Made:
    """Cost and metrics of making a share."""

    forwards: int  # images through the networks
    metrics: Mapping[str, Tensor]


def write_share(
    folder: Path, records: Records | None, about: About, processes: Processes, made: Made | None = None
) -> Path:
    """Writes what one process made of a round; None: it made no pair. Raises NoSpaceError."""
    place = round_folder(folder, about.round)
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"share-{processes.process_index:05d}-of-{processes.num_processes:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    if records is not None and len(records):
        tensors = {name: value.contiguous() for name, value in records.pair_first().items()}
    header = {**about.header(0 if records is None else len(records)), "sha256": EMPTY_STAMP}
    if made is not None:
        values = {name: [str(x.dtype).removeprefix("torch."), x.tolist()] for name, x in made.metrics.items()}
        header |= {"forwards": str(made.forwards), "metrics": json.dumps(values)}
    partial = temporary(file)
    try:
        with room_for(file, sum(x.numel() * x.element_size() for x in tensors.values()), f"round {about.round}"):
            save_file(tensors, partial, header)
            stamp(partial)
            sync(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def made_of(file: Path) -> Made | None:
    """Cost and metrics of making a share; None in one of an older version."""
    with safe_open(file, "pt") as share:
        header = share.metadata() or {}
    if "forwards" not in header:
        return None
    values = json.loads(header["metrics"])
    metrics = {name: torch.tensor(numbers, dtype=getattr(torch, kind)) for name, (kind, numbers) in values.items()}
    return Made(int(header["forwards"]), metrics)


def damaged(files: list[Path]) -> str | None:
    """The first of some shares that is damaged, and how; None: none is."""
    faults = ((file, stamp_fault(file, required=False)) for file in files)
    return next((f"{file}: {fault}" for file, fault in faults if fault is not None), None)


def remove_round(folder: Path, number: int) -> None:
    """Removes the files of a round, if there are any."""
    shutil.rmtree(round_folder(folder, number), ignore_errors=True)


def shares(folder: Path, number: int) -> list[Path]:
    """The files of a round in order, if all that belong together are there; else none. Raises SourceError on a mixture.

    A mixture is what two producers with different numbers of processes leave: each set complete.
    """
    sets: dict[int, list[Path]] = {}
    for file in sorted(round_folder(folder, number).glob("share-*.safetensors")):
        if found := _SHARE.fullmatch(file.name):
            sets.setdefault(int(found[2]), []).append(file)
    complete = [files for count, files in sets.items() if len(files) == count]
    if len(complete) > 1:
        raise SourceError(f"{round_folder(folder, number)} contains the files of two producers; remove one set")
    return complete[0] if complete else []


class Round:
    """The pairs of a round, opened by memory map: a pair costs its own bytes, when it is asked for."""

    def __init__(self, folder: Path, about: About) -> None:
        """Raises SourceError when files are missing or are not of this run at this point."""
        files = shares(folder, about.round)
        if not files:
            raise SourceError(
                f"the files of round {about.round} are not in {round_folder(folder, about.round)}, and its pairs "
                "cannot be made again: the policy has moved on. Put them back, or resume from a checkpoint whose "
                "rounds are there"
            )
        if fault := damaged(files):
            raise SourceError(
                f"round {about.round} is damaged, and cannot be made again: the policy is another by now. {fault}. "
                "Put the file back from a copy, or resume from a checkpoint of before this round"
            )
        self.number = about.round
        self._shares = [_opened(file, about) for file in files]
        rows = []
        for number, share in enumerate(self._shares):
            if int(share.metadata["pairs"]):
                pairs = zip(share.read("place").tolist(), share.read("index").tolist(), strict=True)
                rows += [(place, index, number, row) for row, (place, index) in enumerate(pairs)]
        self._rows = sorted(rows)
        if len({row[:2] for row in rows}) < len(rows):
            raise SourceError(f"{round_folder(folder, about.round)}: two pairs have one place and index; make it again")

    def __len__(self) -> int:
        return len(self._rows)

    def images(self) -> tuple[Tensor, Tensor]:
        """Place int64 and score float32 of the chosen side of every pair, in order; the shares must have scores."""
        places = torch.tensor([place for place, *_ in self._rows], dtype=torch.int64)
        scores = {number: self._shares[number].read("scores")[:, 0] for number in {row[2] for row in self._rows}}
        return places, torch.stack([scores[number][row] for _, _, number, row in self._rows])

    def __getitem__(self, position: int) -> Records:
        """One pair."""
        _, _, number, row = self._rows[position]
        share = self._shares[number]
        found = {name: share.read(name, slice(row, row + 1)) for name in share.names}
        found |= {name: value.transpose(0, 1) for name, value in found.items() if name in _WITH_SIDES}
        moves = {name: found.pop(name) for name in _MOVES if name in found}
        return Records(**found, transitions=Transitions(**moves) if moves else None)


def _opened(file: Path, about: About) -> MappedTensors:
    try:
        share = MappedTensors(file)
    except Exception as error:  # safetensors has one exception for everything, and it is not public everywhere
        raise SourceError(f"{file} does not open ({error}); remove {file.parent} and resume") from error
    header = share.metadata
    for name, wanted in {"format": FORMAT, **about.header(0)}.items():
        if name != "pairs" and header.get(name) != wanted:
            raise SourceError(
                f"{file} has {name} {header.get(name)}, and {wanted} is needed here: it was made by another run, with "
                f"other settings or by another policy. Remove {file.parent}, or use its run's folder"
            )
    return share


def join(parts: list[Records]) -> Records | None:
    """Records one after the other; None where there is none. All have the same fields."""
    parts = [part for part in parts if len(part)]
    return cat(parts) if parts else None
