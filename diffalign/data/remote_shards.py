"""Parquet shards on the Hub or any other store that fsspec knows (`hf://`, `s3://`, `gs://`, `https://`, …), streamed.

Small columns are read where they are, without the images. A shard is fetched when a pair of it is first visited, into
the user's cache folder, which has the last SHARDS of them; all processes of a machine share it. `sampler.BlockOrder`
visits the pairs of few shards at a time.

Left out: tar shards and listings, shards without uid columns (an id would be a hash of images that are not here).
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.formats.parquet import UNREADABLE, ParquetColumns
from diffalign.data.formats.splits import of_split
from diffalign.data.row import DataError
from diffalign.data.table.file_hash import remembered
from diffalign.io.files import room_for, sync, temporary
from diffalign.io.folder_lock import FolderInUseError, folder_lock

log = logging.getLogger(__name__)

SHARDS = 8  # of a data set in the cache folder
READERS = 8  # footers read at a time
ATTEMPTS = 3
PATIENCE = 3600.0  # seconds that another process may take for a shard
PAUSE = 0.05  # seconds between two looks at whether another process has fetched a shard


def open_remote(url: str, split: str) -> RemoteParquet:
    """The rows of a parquet file, of a folder of them, or of a pattern. Raises DataError."""
    store, root = _store(url)
    try:
        if any(sign in root for sign in "*?["):
            found = [str(name) for name in store.glob(root)]
        elif store.isfile(root) and not root.endswith("/"):  # http calls the page of a folder a file
            return RemoteParquet(url, [root])
        else:
            found = [str(name) for name in store.find(root)]
    except Exception as error:  # of any store: no network, no rights, no such bucket
        raise DataError(f"{url} cannot be listed ({_said(error)}); check the address and your access to it") from error
    shards = sorted(name for name in found if name.endswith(".parquet"))
    if not shards:
        raise DataError(
            f"{url} has no .parquet files, and only these are streamed ({len(found)} others); copy the data here and "
            "name the folder"
        )
    folder = Path(os.path.commonpath([str(PurePosixPath(name).parent) for name in shards]))
    names = {Path(name): name for name in shards}  # a path has one slash where an address has two
    return RemoteParquet(url, [names[file] for file in of_split(list(names), folder, split)])


VERSION = ("size", "ETag", "LastModified", "last-modified", "mtime", "sha256")  # what stores state about a file


class RemoteParquet(ParquetColumns):
    """Rows of remote parquet files of one schema, in the order of their names."""

    def __init__(self, url: str, names: Sequence[str]) -> None:
        self.url, self.remote = url, list(names)
        store, _ = _store(url)
        try:
            with ThreadPoolExecutor(READERS) as readers:
                self._keys = list(readers.map(lambda name: _key(store, name), self.remote))
                self._remote_footers = list(readers.map(self._remote_footer, range(len(self.remote))))
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{url} cannot be read ({_said(error)}); check your access to it, and try again") from error
        self.folder = remembered("shards") / hashlib.blake2b("\0".join(self._keys).encode(), digest_size=16).hexdigest()
        super().__init__([self.folder / f"{key}-{Path(name).name}" for key, name in zip(self._keys, self.remote)])
        self.storage = f"{len(names)} remote parquet file" + "s" * (len(names) > 1)
        self.state = self.folder.name  # changes with names, sizes and versions of the shards
        self._remote_footers = []
        self._used = -1  # the shard that was read last

    def _state(self) -> None:
        """Nothing is noted: the footers were read to know the shards' versions."""

    def read_footer(self, number: int) -> pq.FileMetaData:
        """Of a shard that need not be here."""
        return self._remote_footers[number]

    def column(self, name: str) -> list[Any]:
        """All values of a small column; images are not read."""
        from diffalign.data.formats.arrow_values import plain

        def values(shard: str) -> list[Any]:
            try:
                with _store(self.url)[0].open(shard, "rb") as stream, pq.ParquetFile(stream) as opened:
                    return plain(opened.read(columns=[name], use_threads=False)[name])
            except UNREADABLE as error:
                raise DataError(f"{shard}: column {name} cannot be read ({_said(error)}); try again") from error

        with ThreadPoolExecutor(READERS) as readers:
            return [value for some in readers.map(values, self.remote) for value in some]

    def local(self, number: int) -> Path:
        """A shard on this machine, fetched if it is not here. Raises DataError, and NoSpaceError."""
        file, began = Path(self.files[number]), time.monotonic()
        while not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with folder_lock(file.parent, "a process that fetches a shard", f".{file.name}.lock"):
                    if not file.exists():
                        self._fetch(number, file)
            except FolderInUseError:
                if time.monotonic() - began > PATIENCE:  # its owner may have ended on another machine
                    raise
                time.sleep(PAUSE)
        if number != self._used:
            with suppress(OSError):  # removed meanwhile: a file that is open stays readable
                now = time.time_ns()  # the system's own clock of files is too coarse to tell two uses apart
                os.utime(file, ns=(now, now))
            self._used = number
        return file

    def _table(self, group: int, names: tuple[str, ...]) -> pa.Table:
        for _ in range(ATTEMPTS):
            with suppress(FileNotFoundError):  # another process has removed the shard just now
                return super()._table(group, names)
        return super()._table(group, names)

    def where(self, row: int) -> str:
        number, at = self.place(row)
        return f"{Path(self.remote[number]).name} row {at}"

    def base(self, row: int) -> Path | None:
        return self.folder  # rows have their images' bytes: paths in them lead nowhere

    def _remote_footer(self, number: int) -> pq.FileMetaData:
        shard = self.remote[number]
        try:
            with _store(self.url)[0].open(shard, "rb") as stream, pq.ParquetFile(stream) as opened:
                opened.schema_arrow  # noqa: B018 - names that are not UTF-8 raise here
                return opened.metadata
        except UNREADABLE as error:
            raise DataError(f"{shard} is not a readable parquet file ({_said(error)})") from error

    def _fetch(self, number: int, file: Path) -> None:
        store, shard = _store(self.url)[0], self.remote[number]
        size = int(store.info(shard)["size"])
        partial = temporary(file)
        log.info("fetching %s", shard)
        try:
            with room_for(file, size, f"the shard {shard}", "free some, or set XDG_CACHE_HOME to another folder"):
                store.get_file(shard, str(partial))
                sync(partial)
            if partial.stat().st_size != size:
                raise DataError(f"{shard}: {partial.stat().st_size} of {size} bytes arrived; try again")
            os.replace(partial, file)
        except DataError:
            raise
        except Exception as error:
            if _key(store, shard) != self._keys[number]:
                raise DataError(f"{shard} has changed since the run began; start again") from error
            raise
        finally:
            partial.unlink(missing_ok=True)
        self._sweep(file)

    def _sweep(self, newest: Path) -> None:
        """Removes the shards that were used longest ago."""
        there = [file for file in self.folder.glob("*.parquet") if file != newest]
        times = {}
        for file in there:
            with suppress(FileNotFoundError):
                times[file] = file.stat().st_mtime_ns
        for file in sorted(times, key=lambda each: times[each])[: max(0, len(times) + 1 - SHARDS)]:
            file.unlink(missing_ok=True)


def _store(url: str) -> tuple[Any, str]:
    """The file system of a URL, in this process (fsspec has one for each), and the path in it. Raises DataError."""
    try:
        store, root = fsspec.core.url_to_fs(url)
    except ImportError as error:  # of a package that the store needs
        raise DataError(f"{url}: {_said(error)}; `pip install` that here, or copy the data to a local path") from error
    except ValueError as error:
        raise DataError(f"{url}: {_said(error)}; local data are given by their path without `://`") from error
    return store, str(root)


def _key(store: Any, name: str) -> str:
    """A name for a shard's content as the store knows it: another size or version is another key."""
    facts = [str(store.ukey(name)), *(str(store.info(name).get(fact)) for fact in VERSION)]  # http's ukey is its URL's
    return hashlib.blake2b("\0".join(facts).encode(), digest_size=8).hexdigest()


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
