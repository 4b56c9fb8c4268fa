"""`TextSpec`: how prompts become embeddings, where that differs from the base's own pipeline."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from diffalign.errors import DiffalignError

LAYOUTS = ("kohya", "webui")
WEIGHTS = ("literal", "refuse")


@dataclass(frozen=True)
class TextSpec:
    """How prompts become embeddings; fields as in a config's `model` section. `TextSpec()` is diffusers' own way.

    Raises DiffalignError for a value that does not exist.
    """

    max_token_length: int | None = None  # tokens of a prompt without BOS and EOS: 75, 150, 225, …; None: one chunk
    chunk_layout: str = "kohya"  # of several chunks: BOS and EOS once around all (kohya), or around each (webui)
    clip_skip: int = 0  # last layers of the text encoders that are left out, counted as diffusers counts
    prompt_weights: str | None = None  # `(word:1.2)` is plain text: literal; an error: refuse; None: with a warning

    def __post_init__(self) -> None:
        for name, value, known in (
            ("chunk_layout", self.chunk_layout, LAYOUTS),
            ("prompt_weights", self.prompt_weights, (None, *WEIGHTS)),
        ):
            if value not in known:
                raise DiffalignError(f"{name} '{value}' is unknown; allowed: {', '.join(filter(None, known))}")
        if self.clip_skip < 0:
            raise DiffalignError(f"clip_skip is {self.clip_skip}; 0 skips no layer (1 in A1111 and kohya)")
        if self.max_token_length is not None and self.max_token_length < 1:
            raise DiffalignError(f"max_token_length is {self.max_token_length}; give 75, 150, 225, …")

    @property
    def recorded(self) -> dict[str, Any]:
        """The fields that change an embedding and differ from their defaults."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "prompt_weights"}
        changed = {name: value for name, value in given.items() if value != getattr(TextSpec(), name)}
        if "max_token_length" not in changed:
            changed.pop("chunk_layout", None)  # of one chunk both are the same
        return changed


def text_spec_of(settings: Any) -> TextSpec:
    """The spec in an object that has its fields: a config's `model` section, or `Sampling`."""
    return TextSpec(**{field.name: getattr(settings, field.name) for field in fields(TextSpec)})
