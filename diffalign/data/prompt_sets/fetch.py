"""The prompts of a named set: from the package, from a file that an earlier call wrote, or from where it is published.

What is fetched is written to `$HF_HOME/diffalign/prompts/`, so that it is fetched once. The number of rows is checked
when a set is fetched, the hash of the text, where it is known, at every reading.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from diffalign.data.prompt_sets.known import SETS, GitHubFile, HubFiles, Packaged, PromptSet, PromptSetError
from diffalign.io.files import written_whole

SECONDS = 60  # until a host that does not answer is an error
PACKAGE = Path(__file__).resolve().parents[2]


def set_prompts(chosen: PromptSet, part: str = "") -> list[str]:
    """The prompts of a set or of one of its parts, each once, in the set's order.

    Raises PromptSetError where they are not on this machine and cannot be fetched, and where the text is not the set's.
    """
    file = stored_at(chosen, part)
    if file.is_file():
        return _checked(chosen, part, _stored(file), file)
    rows = _fetched(chosen, part)
    expected = chosen.part_rows[part] if part else chosen.rows
    if len(rows) != expected:
        raise PromptSetError(f"prompt set {label(chosen, part)}: {chosen.origin} has {len(rows)} rows, not {expected}")
    empty = next((i for i, row in enumerate(rows) if not isinstance(row, str) or not row.strip()), None)
    if empty is not None:
        raise PromptSetError(
            f"prompt set {label(chosen, part)}: row {empty} of {chosen.origin} is {rows[empty]!r:.60}, not a prompt; "
            "report it to us"
        )
    prompts = _checked(chosen, part, list(dict.fromkeys(row.strip() for row in rows)), chosen.origin)
    with written_whole(file, what=f"prompt set {chosen.name}") as partial:
        partial.write_text(as_listing(prompts), encoding="utf-8")
    return prompts


def label(chosen: PromptSet, part: str) -> str:
    """The set as it is typed."""
    return f"{chosen.name}:{part}" if part else chosen.name


def stored_at(chosen: PromptSet, part: str = "") -> Path:
    """The file of a set: a .txt in the package, or the .jsonl that a fetched set is written to."""
    if isinstance(chosen.origin, Packaged):
        inside = chosen.origin.path.removeprefix("assets/")
        places = (PACKAGE.parent / "assets" / inside, PACKAGE / "_assets" / inside)
        return next((place for place in places if place.is_file()), places[0])
    return cache_folder() / f"{label(chosen, part).replace(':', '-')}.jsonl"


def cache_folder() -> Path:
    """Where fetched sets are written."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "diffalign" / "prompts"


def as_listing(prompts: Sequence[str]) -> str:
    """Prompts as a .jsonl file with a column `prompt`; unlike a .txt, it can hold a prompt of several lines."""
    return "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)


def text_hash(prompts: Sequence[str]) -> str:
    """SHA-256 of prompts, each followed by a line end, in UTF-8."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode()).hexdigest()


def _stored(file: Path) -> list[str]:
    """The prompts in a file of the package or one that `set_prompts` wrote. Raises PromptSetError for a damaged one."""
    try:
        *lines, rest = file.read_text(encoding="utf-8").split("\n")
        prompts = lines if file.suffix == ".txt" else [json.loads(line)["prompt"] for line in lines]
        if rest or not prompts:
            raise ValueError("its end is missing")
        if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise ValueError("a line of it is no prompt")
        return prompts
    except (ValueError, KeyError, TypeError) as error:
        raise PromptSetError(f"{file} is damaged ({error}); delete it and give the set's name again") from None


def which_set(prompts: Sequence[str]) -> dict[str, Any]:
    """What is recorded of the prompts of an evaluation: their number, their hash, and the set that they are of.

    A set is recognised by its text, also from a copy in another file: by its hash, or where it is on this machine.
    `set` is null for other prompts. `of`: how many prompts the set has, where only its first ones are used.
    """
    found: dict[str, Any] = {"count": len(prompts), "sha256": text_hash(prompts), "set": None, "verified": False}
    for chosen in SETS.values():
        for part in ("", *chosen.part_rows):
            known = chosen.sha256 if not part else None
            file = stored_at(chosen, part)
            own: list[str] = []
            with suppress(PromptSetError):
                own = _stored(file) if file.is_file() else []
            if found["sha256"] == known or (own and own[: len(prompts)] == list(prompts)):
                more = {"of": len(own)} if len(own) > len(prompts) else {}
                verified = known is not None or chosen.packaged
                return found | {"set": label(chosen, part), "verified": verified} | more
    return found


def _checked(chosen: PromptSet, part: str, prompts: list[str], where: object) -> list[str]:
    known = chosen.sha256 if not part else None
    if known is not None and text_hash(prompts) != known:
        remedy = f"delete {where} and give the name again" if isinstance(where, Path) else "report it to us"
        raise PromptSetError(
            f"prompt set {chosen.name}: the text in {where} is not the set's ({len(prompts)} prompts with SHA-256 "
            f"{text_hash(prompts)}, and the set has {known}); {remedy}"
        )
    return prompts


def _fetched(chosen: PromptSet, part: str) -> list[str]:
    """The rows of a set or part, repeated ones included. Raises PromptSetError without a connection."""
    origin, name = chosen.origin, label(chosen, part)
    if isinstance(origin, Packaged):
        raise PromptSetError(f"prompt set {name}: {origin.path} is missing in this installation; install it again")
    try:
        return _from_github(origin) if isinstance(origin, GitHubFile) else _from_hub(origin, part)
    except PromptSetError:
        raise
    except Exception as error:  # of the connection, of the Hub's library, or a file of another form
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        file = f"{name.replace(':', '-')}.jsonl"
        raise PromptSetError(
            f"prompt set {name} is not on this machine and could not be fetched from {origin} ({why}). Where there is "
            f"a connection, run `diffalign data prompts {name} --out {file}`; copy that file here and give it in place "
            "of the name"
        ) from error


def _from_github(origin: GitHubFile) -> list[str]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError("HF_HUB_OFFLINE is set")
    with urlopen(origin.url, timeout=SECONDS) as answer:
        lines = answer.read().decode("utf-8").splitlines()
    return [json.loads(line)[origin.column] for line in lines if line.strip()]


def _from_hub(origin: HubFiles, part: str) -> list[str]:
    from huggingface_hub import snapshot_download

    patterns = [path for name, path in origin.files.items() if part in ("", name)]
    folder = Path(
        snapshot_download(origin.repository, repo_type="dataset", revision=origin.revision, allow_patterns=patterns)
    )
    rows: list[str] = []
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if not files:
            raise FileNotFoundError(f"it has no {pattern}")
        for file in files:
            rows += _rows(file, origin.column)
    return rows


def _rows(file: Path, column: str | None) -> list[str]:
    """The prompts in a file: a JSON list, or the column of a parquet or tab-separated table."""
    if column is None:
        found: list[str] = json.loads(file.read_text(encoding="utf-8"))
        return found
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file, columns=[column])[column].to_pylist()
    with file.open(encoding="utf-8", newline="") as opened:  # quotes are part of P2's prompts
        return [row[column] for row in csv.DictReader(opened, delimiter="\t", quoting=csv.QUOTE_NONE)]
