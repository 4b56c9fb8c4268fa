"""Which weights made a picture: a short hash of a model's files, so that stale pictures are never reused."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffalign.errors import MissingFileError

WEIGHTS = (".safetensors", ".bin", ".json", ".txt")
BIG = 1 << 30  # bytes; larger files count by size and time of change, because reading them takes seconds


def fingerprint(model: str | Path) -> str:
    """16 hex digits that change when the weights do.

    `model` is a pipeline folder, a folder of one network, a single file, or a Hub id (which counts by its name:
    nothing is downloaded to find out).
    """
    path = Path(model)
    digest = hashlib.blake2b(digest_size=8)
    if not path.exists():
        digest.update(str(model).encode())
        return digest.hexdigest()
    for file in model_files(path):
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        status = file.stat()
        digest.update(f"{name} {status.st_size}\n".encode())
        if status.st_size > BIG:
            digest.update(str(status.st_mtime_ns).encode())
        else:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def model_files(path: Path) -> list[Path]:
    """The files that make up the model at `path`, sorted: of a pipeline those of its components, one level down."""
    if path.is_file():
        beside = path.with_name("adapter_config.json")  # a peft file's alpha
        return [path, beside] if path.name == "adapter_model.safetensors" and beside.is_file() else [path]
    files = list(path.iterdir())
    if (path / "model_index.json").is_file():
        files = [path / "model_index.json", *path.glob("*/*")]
    files = sorted(file for file in files if file.is_file() and file.suffix in WEIGHTS)
    if not files:
        raise MissingFileError(f"{path} holds no weights ({', '.join(WEIGHTS)}) and no model_index.json")
    return files
