"""Prompts that are not encoded as they are written: the log names the first few of each kind, once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffalign.models.loading.family import TextEncoders

log = logging.getLogger(__name__)

LOGGED = 5  # prompts of each kind that the log names
EXAMINED = 10_000  # prompts of a run's data that are counted when it begins, spread over all of them


@dataclass
class PromptNotices:
    """The prompts so far that were cut, with the number of tokens lost, or whose weights were encoded as text."""

    truncated: dict[str, int] = field(default_factory=dict)
    weighted: dict[str, list[str]] = field(default_factory=dict)

    def check(self, text: TextEncoders, prompts: Sequence[str]) -> None:
        """Adds and logs what is new among some prompts. Raises ModelError for weights that the spec refuses."""
        for prompt, lost in text.overlong(prompts).items():
            if prompt not in self.truncated:
                self.truncated[prompt] = lost
                what = f"truncated by {lost} tokens (at most {text.limit} fit; see max_token_length)"
                _log(len(self.truncated), "truncated", what, prompt)
        for prompt, weights in text.weighted(prompts).items():
            if prompt not in self.weighted:
                self.weighted[prompt] = weights
                what = f"has the weight {weights[0][:40]}, encoded as plain text (prompt_weights: literal accepts that)"
                _log(len(self.weighted), "weighted", what, prompt)


def counted(text: TextEncoders, prompts: Sequence[str]) -> str:
    """How many prompts are not encoded as they are written, in one sentence; empty where all of them are.

    Raises ModelError for weights that the spec refuses.
    """
    if not (unique := list(dict.fromkeys(prompts))):
        return ""
    some = unique[:: -(-len(unique) // EXAMINED)]
    cut, weighted = text.overlong(some), text.weighted(some)
    found = []
    if cut:
        most = max(cut.values())
        found.append(
            f"{len(cut)} are longer than {text.limit} tokens and lose up to {most} of them (model.max_token_length)"
        )
    if weighted:
        found.append(f"{len(weighted)} have weights such as (word:1.2), which are plain text (model.prompt_weights)")
    return f"of {len(some)} prompts examined, {' and '.join(found)}" if found else ""


def _log(number: int, kind: str, what: str, prompt: str) -> None:
    if number <= LOGGED:
        log.warning("prompt %s: %.60r…", what, prompt)
    if number == LOGGED:
        log.warning("further %s prompts are not logged", kind)
