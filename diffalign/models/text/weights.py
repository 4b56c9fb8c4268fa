"""Weights that A1111's syntax writes into a prompt, `(word:1.2)`: found, so that they are never plain text unnoticed.

Other parentheses are ordinary text everywhere here, also `(word)` and `[word]`, which A1111 weights by 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from diffalign.errors import ModelError

_WEIGHT = re.compile(r"(?<!\\)\([^()]+:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)")


def weights_in(prompt: str) -> list[str]:
    """The parts of a prompt of the form `(text:number)`; of nested ones the innermost."""
    return _WEIGHT.findall(prompt)


def weighted(prompts: Iterable[str], treatment: str | None) -> dict[str, list[str]]:
    """Prompts with weights, and these weights; none where they are to be plain text (treatment "literal").

    Raises ModelError where they are to be refused.
    """
    if treatment == "literal":
        return {}
    found = {prompt: weights for prompt in prompts if (weights := weights_in(prompt))}
    if found and treatment == "refuse":
        prompt, weights = next(iter(found.items()))
        raise ModelError(
            f"the prompt {prompt[:200]!r} has the weight {weights[0]}, and prompt_weights is refuse: weights are not "
            "applied here. Remove it from the prompt, or set literal to encode it as plain text"
        )
    return found
