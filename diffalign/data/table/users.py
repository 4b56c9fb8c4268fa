"""The user whose preference a pair is: an embedding beside each pair, or an id that names one in a file.

    pairs    a column `user_embed` (a list of numbers), or `user` / `user_id` (an id) and a file of embeddings
    file     .json {"anna": [0.1, …], …};  .parquet with columns user and user_embed;  .safetensors, a tensor per id

Every embedding of a run has the same length. Where they come from is the user's choice: PPD (arXiv 2501.06655) takes a
vision-language model's reading of a few of the person's pairs.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.formats.text_files import parse_json, read_text
from diffalign.data.row import DataError
from diffalign.data.table.pairs import PairTable
from diffalign.errors import DiffalignError
from diffalign.io.weight_files import check_weights

NAMED = 3  # pairs without a user that a message names
SUFFIXES = (".json", ".parquet", ".safetensors")


@dataclass(frozen=True)
class Users:
    """A file of embeddings: float32 [dim] by id, all of one length."""

    path: str
    embeddings: Mapping[str, Tensor]

    @property
    def dim(self) -> int:
        """Length of the embeddings."""
        return len(next(iter(self.embeddings.values())))

    def of(self, name: str, what: str = "user") -> Tensor:
        """One user's embedding. Raises DataError with the nearest id; `what` names the setting in it."""
        if name not in self.embeddings:
            near = difflib.get_close_matches(name, self.embeddings, n=1)
            some = ", ".join(list(self.embeddings)[:8])
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {len(self.embeddings)}, e.g. {some}"
            raise DataError(f"{what}: {self.path} has no user {name!r}{hint}")
        return self.embeddings[name]

    def mixed(self, weights: Mapping[str, float]) -> Tensor:
        """The weighted average [dim] of some users. Raises DataError for an unknown id, or weights that sum to 0."""
        total = sum(weights.values())
        if any(w < 0 for w in weights.values()) or not 0 < total < math.inf:  # a NaN is in no range
            raise DataError(
                f"users are mixed with finite weights of at least 0 that are not all 0; these are {dict(weights)}"
            )
        return sum((w / total * self.of(name) for name, w in weights.items()), torch.zeros(self.dim))


def open_users(path: str | Path) -> Users:
    """The embeddings in a file. Raises DataError for a file of another form, or embeddings of several lengths."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file of users {path}; it contains an embedding per id, as {', '.join(SUFFIXES)}")
    try:
        found = _read(path)
    except DiffalignError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise DataError(f"{path} is not a file of users ({error!r}): write {{id: [numbers]}} as .json") from error
    if not found:
        raise DataError(f"{path} contains no user")
    embeddings = {name: embedding(values, f"{path}: user {name!r}") for name, values in found.items()}
    _one_length([(name, len(x)) for name, x in embeddings.items()], str(path))
    return Users(str(path), embeddings)


def use_users(table: PairTable, users: Users | None, *, where: str) -> None:
    """Gives a table the user of each pair: from its ids and `users`, or without these from its embeddings.

    Raises DataError when the pairs have no such column, naming pairs without a user or with an unknown one.
    """
    layout = table.layout
    column = layout.user if users is not None else layout.user_embed
    if column is None:
        part = "user" if users is not None else "user_embed"
        raise DataError(
            f"this tuning method needs pairs with a user, and these have no column {part}. "
            f"Name it (data.columns={{{part}: MY_COLUMN}})"
            + (", or give data.users, a file of embeddings by id" if users is None and layout.user is not None else "")
        )
    values = table.column(column)
    missing = [i for i, value in enumerate(values) if _absent(value) or (users and str(value) not in users.embeddings)]
    if missing:
        named = ", ".join(f"{table.where(i)}: {values[i]!r}"[:120] for i in missing[:NAMED])
        there = "" if users is None else f" that is in {where}"
        raise DataError(
            f"{len(missing)} of {len(table)} pairs have no user{there} ({named}); add them, or remove these rows"
        )
    if users is not None:
        rows = {name: row for row, name in enumerate(users.embeddings)}
        table.take_users(torch.stack(list(users.embeddings.values())), [rows[str(value)] for value in values])
        return
    vectors = [embedding(value, f"{table.where(i)}: {column}") for i, value in enumerate(values)]
    _one_length([(table.where(i), len(x)) for i, x in enumerate(vectors)], column)
    table.take_users(torch.stack(vectors), range(len(vectors)))


def parse_mixture(words: Sequence[str]) -> dict[str, float]:
    """Weights by id from words ID or ID=WEIGHT; raises DataError for a weight that is no number, or an id twice."""
    weights: dict[str, float] = {}
    for word in words:
        name, _, weight = word.rpartition("=") if "=" in word else (word, "", "1")
        try:
            value = float(weight)
        except ValueError:
            raise DataError(f"--user {word}: write ID or ID=WEIGHT, e.g. --user anna=0.7 --user ben=0.3") from None
        if name in weights:
            raise DataError(f"--user {word}: {name} is given twice; give each user once")
        weights[name] = value
    return weights


def embedding(values: Any, where: str) -> Tensor:
    """Numbers as float32 [dim]. Raises DataError when they are none, not in one row, or not finite."""
    try:
        vector = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{where}: {values!r:.60} is not a list of numbers") from error
    if vector.ndim != 1 or not len(vector) or not bool(vector.isfinite().all()):
        raise DataError(f"{where}: an embedding is a list of finite numbers, this one has shape {tuple(vector.shape)}")
    return vector


def _read(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".json":
        return dict(parse_json(read_text(path)).items())
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(path, columns=["user", "user_embed"]).to_pydict()
        names = [str(name) for name in rows["user"]]
        if len(set(names)) < len(names):
            raise DataError(f"{path} has {len(names)} rows of {len(set(names))} users; give each user one row")
        return dict(zip(names, rows["user_embed"], strict=True))
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        check_weights(path)
        return load_file(path)
    raise DataError(f"{path}: users are read from {', '.join(SUFFIXES)} files")


def _one_length(lengths: list[tuple[str, int]], where: str) -> None:
    name, first = lengths[0]
    for other, length in lengths:
        if length != first:
            raise DataError(f"{where}: the embedding of {name} has {first} numbers and that of {other} {length}")


def _absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and value != value)
