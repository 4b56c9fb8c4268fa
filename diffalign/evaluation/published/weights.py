"""The files of a released checkpoint on this machine: its configs first, then the weights of the folder that fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from diffalign.errors import DiffalignError
from diffalign.evaluation.published.catalogue import PublishedBase, Release
from diffalign.io.hub import why_not_fetched


def release_path(release: Release, base: PublishedBase) -> Path:
    """The UNet folder or LoRA file of a release, fetched where it is not in the Hub's cache.

    Its repository may also be a local folder. Raises DiffalignError where it cannot be had, where no or several files
    fit the base, and for pickled weights.
    """
    if release.layout == "pickle":
        raise DiffalignError(
            f"{release.name} ({release.repository}) is released as a pickle, {release.path}, which is not loaded; "
            f"convert it with `diffalign convert {release.repository}::FILE --base {base.model} --out PATH` and give "
            f"--tuned {release.name}=PATH"
        )
    if release.layout == "lora":
        found = sorted(_snapshot(release, [release.path]).glob(release.path))
        return _only(release, found, f"a file {release.path}")
    folder = _snapshot(release, ["*config.json"])
    fitting = [place for place in _unets(folder, release.path) if _dimension(place) == base.cross_attention_dim]
    inside = _only(release, fitting, f"a UNet for {base.title} in {release.path}").relative_to(folder).as_posix()
    start = "" if inside == "." else f"{inside}/"
    return _snapshot(release, [f"{start}config.json", f"{start}diffusion_pytorch_model*"]) / inside


def _snapshot(release: Release, patterns: Sequence[str]) -> Path:
    """The repository's folder with the files of these patterns."""
    if Path(release.repository).is_dir():
        return Path(release.repository)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(release.repository, allow_patterns=list(patterns)))
    except Exception as error:  # of the connection or of the Hub's library
        raise DiffalignError(
            f"{release.name}: {release.repository} cannot be read: {why_not_fetched(release.repository, error)}. "
            f"A local copy is given as --tuned {release.name}=PATH; --only leaves a release out"
        ) from error


def _unets(folder: Path, pattern: str) -> list[Path]:
    """The folders that match and hold a UNet's config."""
    places = [config.parent for config in sorted(folder.rglob("config.json"))]
    return [
        place
        for place in places
        if fnmatch(place.relative_to(folder).as_posix(), pattern)
        and _config(place).get("_class_name") == "UNet2DConditionModel"
    ]


def _config(place: Path) -> dict[str, Any]:
    file = place / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DiffalignError(f"{file} is not JSON ({error}); delete it from the Hub's cache and fetch again") from None
    return found if isinstance(found, dict) else {}


def _dimension(place: Path) -> Any:
    return _config(place).get("cross_attention_dim")


def _only(release: Release, found: Sequence[Path], what: str) -> Path:
    if len(found) != 1:
        has = f"has {len(found)}: {', '.join(str(path) for path in found)}" if found else "has none"
        raise DiffalignError(
            f"{release.name}: {release.repository} should have {what} and {has}; give --tuned {release.name}=PATH"
        )
    return found[0]
