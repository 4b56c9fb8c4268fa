"""The prompt sets that have a name, with origin, number of prompts, licence and, where it is known, the text's hash.

A hash is that of the set's text: its prompts in the order of the origin, without white space around them, each once,
each followed by a line end, in UTF-8. `sha256=None`: no public copy of the text could be read when this table was
written, so nothing but the number of rows is checked, and `diffalign list prompts` says "not verified".
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffalign.data.row import DataError

HPDV2, HPDV2_COMMIT = "zhwang/HPDv2", "260dbde75ab1c68e86d32a8e7739f1b49b100578"
STYLES = ("anime", "concept-art", "paintings", "photo")


class PromptSetError(DataError):
    """A prompt set is unknown, cannot be had here, or has another text than it should."""


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set on the Hugging Face Hub; `*` stands for any characters."""

    repository: str
    files: Mapping[str, str]  # part of the set -> path, in the order of the set
    column: str | None = None  # of a table; None: the files are JSON lists of strings
    revision: str | None = None  # None: the newest

    def __str__(self) -> str:
        return f"Hub data set {self.repository}"


@dataclass(frozen=True)
class GitHubFile:
    """One file of a GitHub repository at a commit."""

    repository: str
    commit: str
    path: str
    column: str

    @property
    def url(self) -> str:
        """Where the file's text is."""
        return f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{self.path}"

    def __str__(self) -> str:
        return f"github.com/{self.repository}"


@dataclass(frozen=True)
class Packaged:
    """A text file that comes with diffalign."""

    path: str  # as in a config: assets/…

    def __str__(self) -> str:
        return f"in the package ({self.path})"


@dataclass(frozen=True)
class PromptSet:
    """A named list of prompts."""

    name: str
    about: str
    origin: HubFiles | GitHubFile | Packaged
    rows: int  # in the origin, repeated prompts counted
    licence: str
    sha256: str | None = None  # of the whole set's text; None: not known, or the text is in the package
    part_rows: Mapping[str, int] = field(default_factory=dict)  # parts that NAME:PART selects

    @property
    def packaged(self) -> bool:
        """Whether it needs no network."""
        return isinstance(self.origin, Packaged)


def _pickapic(version: int, split: str) -> HubFiles:
    return HubFiles(f"yuvalkirstain/pickapic_v{version}_no_images", {"": f"data/{split}-*.parquet"}, "caption")


SETS: dict[str, PromptSet] = {
    each.name: each
    for each in (
        PromptSet(
            "pickapic-500",
            "Pick-a-Pic v2, test_unique: prompts of users, one pair each (arXiv 2305.01569)",
            _pickapic(2, "test_unique"),
            rows=500,
            licence="see the data card of yuvalkirstain/pickapic_v2",
        ),
        PromptSet(
            "pickapic-v1-validation",
            "Pick-a-Pic v1, validation_unique: the prompts of SPO's and LPO's tables",
            _pickapic(1, "validation_unique"),
            rows=500,
            licence="see the data card of yuvalkirstain/pickapic_v1",
        ),
        PromptSet(
            "hpdv2",
            "HPSv2's benchmark in four styles (arXiv 2306.09341)",
            HubFiles(HPDV2, {style: f"benchmark/{style}.json" for style in STYLES}, revision=HPDV2_COMMIT),
            rows=3200,
            licence="Apache-2.0",
            part_rows=dict.fromkeys(STYLES, 800),
        ),
        PromptSet(
            "partiprompts",
            "PartiPrompts (P2) of twelve categories (arXiv 2206.10789)",
            HubFiles(
                "nateraw/parti-prompts",
                {"": "PartiPrompts.tsv"},
                "Prompt",
                revision="944b156abfdad7627c3221b5ec4f6a6fb060a197",
            ),
            rows=1632,
            licence="Apache-2.0",
            sha256="db0c2ddb1c8b2f7638acf694eb20ba6622d4cd2bddb2a5b66c92beddfbcde284",
        ),
        PromptSet(
            "geneval",
            "GenEval: objects, counts, colours, positions (arXiv 2310.11513); `geneval=DETECTOR` scores it",
            GitHubFile(
                "djghosh13/geneval",
                "af4902f24d3ca90ebbb446dd9891a59e0f82725f",
                "prompts/evaluation_metadata.jsonl",
                "prompt",
            ),
            rows=553,
            licence="MIT",
            sha256="55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680",
        ),
        PromptSet(
            "drawbench",
            "DrawBench of Imagen (arXiv 2205.11487), as HPSv2's benchmark has it",
            HubFiles(HPDV2, {"": "benchmark/drawbench.json"}, revision=HPDV2_COMMIT),
            rows=200,
            licence="not stated by its authors",
        ),
        PromptSet(
            "world-heldout",
            "held-out captions of the embedded world",
            Packaged("assets/world/heldout.txt"),
            rows=24,
            licence="Apache-2.0",
        ),
        PromptSet(
            "emoji-heldout",
            "held-out captions of the emoji world",
            Packaged("assets/emoji/heldout.txt"),
            rows=24,
            licence="Apache-2.0",
        ),
    )
}


def named(text: str) -> tuple[PromptSet, str] | None:
    """The set that a text names, and the part of it (`hpdv2:photo`; "": all of it); None for any other text.

    Raises PromptSetError for a part that the set does not have, and for one word that is nearly a set's name: it is
    more likely a slip than a prompt.
    """
    name, colon, part = text.partition(":")
    if name in SETS:
        parts = SETS[name].part_rows
        if colon and part not in parts:
            has = f"its parts are {', '.join(parts)}" if parts else "it has no parts"
            raise PromptSetError(f"prompt set {text!r}: {has}; write {name}{':PART' if parts else ''}")
        return SETS[name], part
    close = [] if any(c.isspace() or c in "/\\." for c in name) else difflib.get_close_matches(name, SETS, 1, 0.8)
    if close:
        raise PromptSetError(
            f"no prompt set is called {name!r}; did you mean {close[0]}? `diffalign list prompts` shows them. If it is "
            "a prompt, write it into a .txt file and name that"
        )
    return None
