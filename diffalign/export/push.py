"""Tuned weights and their card to a repository of the Hugging Face Hub.

Pushed are the weights, the card with its pictures, and the settings; nothing else of the run (no checkpoints, optimiser
states, logs, caches). Settings and configs are pushed without the folders of this machine. The token is the one of
HF_TOKEN or of `hf auth login`; it is never printed, not even where the Hub's answer repeats it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import safe_open

from diffalign.config.strict_yaml import dump_yaml, read_yaml
from diffalign.errors import DiffalignError
from diffalign.export.card.evaluation import STRIP
from diffalign.export.card.loading import on_the_hub
from diffalign.export.card.write import CARD, write_run_card
from diffalign.export.names import ExportError
from diffalign.export.tuned_run import find_tuned_run, recorded_run, shown

CONFIG = "config.yaml"
# what may be a path of this or another machine, also NAME=…: of Unix, a URL of a file, or of Windows
_PLACE = re.compile(r"(?:^|(?<==))(?:~|/|\.\.|file:/|[A-Za-z]:[\\/]|\\\\).*$")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


class PushError(ExportError):
    """What cannot be pushed; the message says why, without the token."""


@dataclass(frozen=True)
class PushFile:
    """A file as it is pushed."""

    name: str  # in the repository
    source: Path
    content: bytes | None = None  # in place of the file's own
    changed: tuple[str, ...] = ()  # settings whose folders were taken off

    @property
    def size(self) -> int:
        """Bytes."""
        return self.source.stat().st_size if self.content is None else len(self.content)


def push_files(run: str | Path, repo_id: str, base: str | None = None) -> list[PushFile]:
    """The files of a run that `push` uploads, the card first. A card is written where there is none.

    Raises PushError for a name that is none of the Hub's and for files that name places of this machine, ExportError
    and ModelError as `write_run_card`.
    """
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repo_id):
        raise PushError(f"{repo_id!r} is not a repository of the Hub: give OWNER/NAME, e.g. alice/sdxl-dpo")
    tuned = recorded_run(run, base)
    if not tuned.tuned.layout.adds_layers:
        tuned = find_tuned_run(run, base)  # which refuses the raw weights of a checkpoint with EMA
    card = tuned.folder / CARD
    if not card.is_file():
        write_run_card(run, base=base)
    text = on_the_hub(card.read_text(encoding="utf-8"), tuned.folder.absolute().name, repo_id)
    files = [PushFile(CARD, card, text.encode())]
    if STRIP in text and (tuned.folder / STRIP).is_file():
        files.append(PushFile(STRIP, tuned.folder / STRIP))
    if tuned.config is not None and (tuned.folder / CONFIG).is_file():
        files.append(_without_places(CONFIG, tuned.folder / CONFIG))
    path = tuned.tuned.path
    for part in [path] if path.is_file() else sorted(path.iterdir()):
        name = part.relative_to(tuned.folder).as_posix()
        if part.suffix == ".safetensors":
            _check_header(part)
            files.append(PushFile(name, part))
        elif part.suffix == ".json":
            files.append(_without_places(name, part))
    for file in files:
        _refuse_places(file, tuned.folder)
    return files


def push(files: list[PushFile], repo_id: str, *, private: bool = True) -> str:
    """Upload the files in one commit to a model repository, which is made where there is none; returns its address.

    private: of a new repository. Raises PushError where there is no token or no connection, where the repository is
    public and `private` asks for another, and for whatever the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    token = get_token()
    if constants.is_offline_mode():
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if token is None:
        raise PushError("no token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi(token=token)
    try:
        try:
            there = api.model_info(repo_id)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private)
        else:
            if private and not there.private:
                raise PushError(f"{repo_id} exists and is public: give --public, or the name of another repository")
        operations: list[Any] = [
            CommitOperationAdd(file.name, file.source if file.content is None else file.content) for file in files
        ]
        done = api.create_commit(repo_id, operations, commit_message="Weights and card by diffalign push")
    except DiffalignError:
        raise
    except Exception as error:  # of the client, of HTTP, of the network: all have their own classes
        words = " ".join(str(error).split()).replace(token, "(token)")[:600]
        raise PushError(f"the Hub did not take {repo_id}: {type(error).__name__}: {words}") from None
    return str(done.repo_url)


def _without_places(name: str, file: Path) -> PushFile:
    """A YAML or JSON file whose paths of this machine are cut to their last name."""
    yaml = file.suffix == ".yaml"
    tree = read_yaml(file) if yaml else json.loads(file.read_text(encoding="utf-8"))
    changed: list[str] = []
    cut = _cut(tree, "", changed)
    if not changed:
        return PushFile(name, file)
    content = dump_yaml(cut) if yaml else json.dumps(cut, indent=2) + "\n"
    return PushFile(name, file, content.encode(), tuple(changed))


def _cut(node: Any, key: str, changed: list[str]) -> Any:
    """The tree with each path's last name; `changed` gets the keys."""
    if isinstance(node, dict):
        return {name: _cut(value, f"{key}.{name}".lstrip("."), changed) for name, value in node.items()}
    if isinstance(node, list):
        return [_cut(value, key, changed) for value in node]
    if not isinstance(node, str) or (place := _place(node)) is None:
        return node
    changed.append(key)
    if _WINDOWS.match(place):
        last = PureWindowsPath(place).name
    else:
        last = shown(os.path.expanduser(place.removeprefix("file:")))
    return node.removesuffix(place) + (last or ".")


def _place(text: str) -> str | None:
    """The path of this machine that a text is, or ends in after NAME=; None for other texts, such as prompts.

    One with spaces is a path where its first folder exists.
    """
    found = _PLACE.search(text)
    if found is None or (" " in found[0] and not _WINDOWS.match(found[0]) and not _first_folder(found[0]).exists()):
        return None
    return found[0]


def _first_folder(text: str) -> Path:
    return Path(*Path(os.path.expanduser(text.removeprefix("file:"))).parts[:2])


def _check_header(file: Path) -> None:
    """Raises PushError for metadata that name a place of this machine."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    for key, value in metadata.items():
        if f"{Path.home()}/" in value or _place(value) is not None:
            raise PushError(
                f"{file}: its metadata {key!r} name a place of this machine ({value[:60]!r}): export it again"
            )


def _refuse_places(file: PushFile, folder: Path) -> None:
    """Raises PushError for a text that names this run's folder or the home folder, e.g. an edited card."""
    if file.source.suffix in (".safetensors", ".jpg"):
        return
    text = (file.content if file.content is not None else file.source.read_bytes()).decode("utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        for place in (folder.absolute(), Path.home()):
            if place != Path(place.anchor) and f"{place}" in line:
                raise PushError(f"{file.source}, line {number} names a folder of this machine: {line.strip()[:120]}")
