"""How docstrings of this package become Markdown: a block of "name: meaning" lines is shown as a list.

Docstrings name each argument on a line of its own, with continued lines indented:

    model: Hub id, folder, or an open pipeline, whose UNet is
        then tuned in place.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): (?=\S)")


def as_markdown(text: str) -> str:
    """The docstring with its "name: meaning" lines as a list; code and other text stay."""
    out: list[str] = []
    listed = False
    for line in text.splitlines():
        found = ARGUMENT.match(line)
        if found:
            if not listed and out and out[-1].strip():
                out.append("")
            out.append(ARGUMENT.sub(r"- **\1**: ", line))
            listed = True
        else:
            listed = listed and line.startswith("    ")
            out.append(line)
    return "\n".join(out)


class Docstrings(griffe.Extension):
    """Applies `as_markdown` to every docstring that griffe reads."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
