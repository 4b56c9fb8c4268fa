"""Argument types of the command line: bounded numbers, paths, seeds, names; argparse adds the option's name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from diffalign.errors import DiffalignError, ExistingFileError, printable
from diffalign.io.paths import expanded

T = TypeVar("T")

LAST_SEED = 2**63 - 1  # torch's generators take 64 bits, its tensors 63
MOST_SEEDS = 1_000_000  # a longer range is a slip
MOST = 10**9  # of anything that is counted
DEVICES = re.compile(r"cpu|mps|cuda(:\d{1,3})?")


class Parser(argparse.ArgumentParser):
    """argparse whose messages escape control characters of the arguments."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "'--' is not a value")  # argparse makes an empty list of it
        return super()._get_values(action, arg_strings)


def whole(least: int, most: int = MOST, *, multiple: int = 1) -> Callable[[str], int]:
    """A parser of integers from `least` to `most`, both included."""
    allowed = f"an integer from {least} to {most}" + (f", a multiple of {multiple}" if multiple > 1 else "")

    def parse(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,20}", text) or not least <= (value := int(text)) <= most or value % multiple:
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not allowed; give {allowed}")
        return value

    return parse


def number(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers from `least` (or, with `above`, from the first one above it) to `most`."""
    allowed = f"a number {'above' if above else 'from'} {least:g}{', at most' if above else ' to'} {most:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not allowed; give {allowed}")
        return value

    return parse


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` for argparse, which shows only messages of its own exception type."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except DiffalignError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


count = whole(1)
pixels = whole(8, 16384, multiple=8)
steps = whole(1, 10_000)
guidance = number(0, 1000)
tie = number(0, 1e6)
strength = number(-10, 10)
path_text = argument(expanded)
path = argument(lambda text: Path(expanded(text)))


@argument
def seeds(text: str) -> list[int]:
    """Seeds from "7", "0-11" (both ends) or "0,3,5", each once, in order. Raises DiffalignError for anything else."""
    found: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", part.strip())
        if match is None:
            raise DiffalignError(f"{text[:60]!r}: {part.strip()[:60]!r} is not a seed; write 7, 0-11 or 0,3,5")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise DiffalignError(f"{text[:60]!r}: the range {part.strip()} is empty; write {last}-{first}")
        if last > LAST_SEED:
            raise DiffalignError(f"{text[:60]!r}: the largest seed is {LAST_SEED}")
        if len(found) + last - first >= MOST_SEEDS:
            raise DiffalignError(f"{text[:60]!r}: more than {MOST_SEEDS} seeds; give fewer")
        found |= dict.fromkeys(range(first, last + 1))
    return list(found)


@argument
def strengths(text: str) -> list[float]:
    """Ascending strengths of tuned weights, each once, from "0,0.5,1". Raises DiffalignError for anything else."""
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(-10 <= one <= 10 for one in found):
        raise DiffalignError(f"{text[:60]!r}: give numbers from -10 to 10 such as 0,0.5,1,1.5")
    return found


@argument
def device(text: str) -> str:
    """cpu, mps, cuda or cuda:N; `device_of` checks that it exists."""
    if not DEVICES.fullmatch(text):
        raise DiffalignError(f"{text[:60]!r} is not a device; give cpu, cuda, cuda:N or mps")
    return text


@argument
def scorer(text: str) -> str:
    """A scorer's name, with `~` in NAME=PATH expanded to the home folder."""
    name, sign, place = text.partition("=")
    return f"{name}={expanded(place)}" if sign else name


def device_of(given: str | None) -> str:
    """The given device, or cuda if there is one, or cpu. Raises DiffalignError where it does not exist."""
    import torch

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = given.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= there:
        has = f"{there} of them (counted from 0)" if there else "none"
        raise DiffalignError(f"--device {given}: this machine has {has}, as far as PyTorch sees; use --device cpu")
    return given


def named_paths(texts: Sequence[str], option: str) -> dict[str, list[str]]:
    """NAME=PATH arguments as a dict; raises DiffalignError for any other form."""
    from diffalign.evaluation.report import check_name

    found: dict[str, list[str]] = {}
    for text in texts:
        name, sign, place = text.partition("=")
        words = f"{option} {text}".strip()
        if not sign:
            raise DiffalignError(f"{words}: write NAME=PATH, e.g. {f'{option} dpo={text}'.strip()}")
        try:
            check_name(name)
            found.setdefault(name, []).append(expanded(place))
        except DiffalignError as error:
            raise DiffalignError(f"{words}: {error}") from None
    return found


def weighted_paths(texts: Sequence[str]) -> list[tuple[str, float]]:
    """PATH=WEIGHT arguments; raises DiffalignError for any other form."""
    found = []
    for text in texts:
        place, _, weight = text.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            raise DiffalignError(f"{text}: write PATH=WEIGHT, e.g. {text}=0.5") from None
        found.append((expanded(place), value))
    return found


def column_names(parts: Sequence[str]) -> dict[str, str]:
    """PART=COLUMN words as a mapping; raises DiffalignError for a word of another form."""
    for part in parts:
        if not part.partition("=")[2]:
            raise DiffalignError(f"--columns {part}: write PART=COLUMN, e.g. prompt=text")
    return dict(part.split("=", 1) for part in parts)


def overwrite_argument(parser: argparse.ArgumentParser) -> None:
    """`--overwrite`, for commands whose files may exist already."""
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def writable(files: Sequence[tuple[str, Path | None]], overwrite: bool) -> None:
    """Raises ExistingFileError, before any work, for output files (option, path) that exist or cannot be written.

    Raises DiffalignError for two options that name one file: the second would replace what the first has written.
    """
    taken: dict[Path, str] = {}
    for option, file in files:
        if file is None:
            continue
        if (other := taken.setdefault(file.resolve(), option)) != option:
            raise DiffalignError(f"{other} and {option} are both {file}; name two files")
        if file.is_dir():
            raise ExistingFileError(f"{option} {file} is a folder; name a file in it")
        if file.exists() and not overwrite:
            raise ExistingFileError(f"{option} {file} exists; name another file, or give --overwrite to replace it")
        parent = next(folder for folder in file.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise ExistingFileError(f"{option} {file}: {parent} is a file, not a folder; name another place")
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
