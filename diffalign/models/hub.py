"""Tuned weights by their id on the Hugging Face Hub, fetched into its cache where they are not there yet.

    OWNER/NAME                    a UNet in the repository's root or in unet/, or one file with the name of a run's LoRA
    OWNER/NAME::FOLDER            the same in a folder of it
    OWNER/NAME::FILE.safetensors  one LoRA file
    OWNER/NAME@REVISION[::…]      of a branch, tag or commit

Configs are fetched first, and then the weights of the one UNet that they describe. Pickles are fetched by `diffalign
convert` alone, and the settings of a run, which may name classes to import, never.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from diffalign.errors import ModelError
from diffalign.io.hub import is_hub_id, why_not_fetched
from diffalign.io.weight_files import refuse_pickle
from diffalign.models.loading.stored import UNET_STEM, weight_sets

_PEFT = ("adapter_model.safetensors", "adapter_config.json")
_FORMS = "OWNER/NAME, OWNER/NAME::FOLDER or OWNER/NAME::FILE.safetensors"


def local_weights(name: str | Path, files: Sequence[str]) -> Path:
    """The path on this machine of weights that are named by a path or a Hub id.

    `files` are the names of files of adapters that a repository may have. What is no path and cannot be an id comes
    back as it is. Raises ModelError for a repository that cannot be read, or without such weights.
    """
    repository, separator, inside = str(name).partition("::")
    repository, _, revision = repository.partition("@")
    if Path(name).exists() or not is_hub_id(repository):
        return Path(name)
    if separator and not inside.strip("/"):
        raise ModelError(f"{name!r} ends in '::'; write {_FORMS}")
    return _fetched(repository, revision or None, inside.strip("/"), tuple(files))


def local_file(name: str, revision: str | None) -> Path:
    """The path on this machine of a base in one file, which may be OWNER/NAME::FILE.safetensors. Raises ModelError."""
    repository, _, inside = name.partition("::")
    return local_weights(f"{repository}@{revision}::{inside}" if inside and revision else name, ())


def pickled_file(name: str) -> Path:
    """The path on this machine of a pickle to convert, which may be OWNER/NAME::FILE. Raises ModelError.

    For `diffalign convert` alone: nothing else fetches a pickle.
    """
    repository, _, inside = name.partition("::")
    repository, _, revision = repository.partition("@")
    if not inside or Path(name).exists():
        return Path(name)
    found = _snapshot(name, repository, revision or None, [inside]) / inside
    if not found.is_file():
        raise ModelError(_nothing(name, repository, revision or None, f"has no {inside}"))
    return found


@lru_cache
def _fetched(repository: str, revision: str | None, inside: str, files: tuple[str, ...]) -> Path:
    """The UNet folder or adapter file in the Hub's cache."""
    shown = repository + (f"@{revision}" if revision else "") + (f"::{inside}" if inside else "")
    refuse_pickle(inside)
    if inside.endswith(".safetensors"):
        beside = str(PurePosixPath(inside).with_name(_PEFT[1]))
        found = _snapshot(shown, repository, revision, [inside, beside]) / inside
        if not found.is_file():
            raise ModelError(_nothing(shown, repository, revision, f"has no {inside}"))
        return found
    start = f"{inside}/" if inside else ""
    folders = [start, f"{start}unet/"]
    adapters = [f"{start}{file}" for file in (*files, *_PEFT)]
    root = _snapshot(shown, repository, revision, [f"{each}config.json" for each in folders] + adapters)
    unets = [each for each in folders if _is_unet(root / each / "config.json")]
    kept = [root / each for each in adapters if each.endswith(".safetensors") and (root / each).is_file()]
    if len(unets) + len(set(kept)) > 1:
        names = [f"{repository}::{place}" for place in (*(u.rstrip("/") for u in unets if u), *_below(root, kept))]
        raise ModelError(f"{shown} contains several tuned models: name one of {', '.join(names)}")
    if kept:
        return kept[0]
    if not unets:
        what = f"has neither the config.json of a UNet2DConditionModel nor {' or '.join(dict.fromkeys(files))}"
        raise ModelError(_nothing(shown, repository, revision, f"{what} in {inside or 'its root or unet/'}"))
    for weights in (("", "-?????-of-?????"), (".*",)):  # a variant only where there are no plain weights
        patterns = [f"{unets[0]}{UNET_STEM}{middle}.safetensors" for middle in weights]
        commit = root.name if root.parent.name == "snapshots" else revision  # what the configs are of
        root = _snapshot(shown, repository, commit, patterns)
        if weight_sets(root / unets[0], UNET_STEM):
            return root / unets[0]
    raise ModelError(
        _nothing(shown, repository, revision, f"has no {UNET_STEM}.safetensors in {unets[0] or 'its root'}")
    )


def _snapshot(shown: str, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The repository's folder in the cache, with the files of these patterns as far as it has them."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the Hub's, the connection's and the disk's
        raise ModelError(
            f"{shown!r} is not a path on this machine, and {why_not_fetched(repository, error)}"
        ) from error


def _is_unet(config: Path) -> bool:
    try:
        found = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("_class_name") == "UNet2DConditionModel"


def _below(root: Path, files: Sequence[Path]) -> list[str]:
    return [file.relative_to(root).as_posix() for file in dict.fromkeys(files)]


def _nothing(shown: str, repository: str, revision: str | None, why: str) -> str:
    """The message for a repository without the weights that were asked for, with the files that it has."""
    from huggingface_hub import list_repo_files

    try:
        listed = list_repo_files(repository, revision=revision)
    except Exception:  # without a connection nothing more is known
        return f"{shown} {why}, or they were not fetched into the Hub's cache; write {_FORMS}"
    named = [file for file in listed if file.endswith((".safetensors", ".bin", ".ckpt", ".pt", ".pth"))]
    has = f"its files of weights are {', '.join(named[:12])}" if named else "it has no files of weights"
    pickled = any(not file.endswith(".safetensors") for file in named)
    return f"{shown} {why}; {has}. Write {_FORMS}" + ("; `diffalign convert` reads pickles" if pickled else "")
