"""Users of the world, who disagree: from `bold`, who likes shapes large and vivid, to `quiet`, small and muted.

A user is a taste in [-1, 1] (`oracle.taste_reward`) and an embedding. The two ends have fixed random unit vectors;
whoever is between them is their mixture, in taste and in embedding. So an embedding says what its user likes, and a
mixture that no pair was labelled by is an unseen user whose taste is known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffalign.errors import DiffalignError

DIM = 8  # numbers per user
BOLD, QUIET = "bold", "quiet"


@dataclass(frozen=True)
class User:
    """Somebody whose preferences are known."""

    name: str
    taste: float  # 1 large and vivid, -1 small and muted
    embedding: tuple[float, ...]


def world_users(n: int = 2) -> tuple[User, ...]:
    """`n` users evenly between `bold` and `quiet`, both ends included. Raises ValueError for fewer than two."""
    if n < 2:
        raise DiffalignError(f"{n} users: there are at least two, {BOLD} and {QUIET}; 0 means no users")
    return tuple(world_user(1 - 2 * k / (n - 1)) for k in range(n))


def world_user(taste: float) -> User:
    """The user of a taste in [-1, 1]: (1 + taste)/2 of bold's embedding and the rest of quiet's."""
    ends = np.random.default_rng(0).normal(size=(2, DIM))
    ends /= np.linalg.norm(ends, axis=1, keepdims=True)
    share = (1 + taste) / 2
    mixed = share * ends[0] + (1 - share) * ends[1]
    name = {1.0: BOLD, -1.0: QUIET}.get(taste, f"taste{taste:+.2f}")
    return User(name, taste, tuple(round(float(x), 6) for x in mixed))


def write_users(path: Path, users: Sequence[User]) -> None:
    """Their embeddings by name, as `data.users` and `--users` read them."""
    lines = (f"  {json.dumps(user.name)}: {json.dumps(user.embedding)}" for user in users)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
