"""Words of the command line that several commands take."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.errors import DiffalignError


def named(texts: Sequence[str], option: str) -> dict[str, list[str]]:
    """NAME=PATH words as names with their paths; raises ValueError for a word of another form."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign:
            words = f"{option} {text}".strip()
            raise DiffalignError(f"{words}: write NAME=PATH, e.g. {f'{option} dpo={text}'.strip()}")
        found.setdefault(name, []).append(path)
    return found


def device_of(given: str | None) -> str:
    """The device that was named, or cuda where there is one, or cpu."""
    import torch

    return given or ("cuda" if torch.cuda.is_available() else "cpu")
