"""The errors that a user can correct: each message names the thing, its value and the remedy.

An error of any other class is a bug, and the command line calls it one. `DiffalignError` is a ValueError, so code that
catches ValueError still works. A package may derive its own classes, so that callers can tell errors apart.
"""

from __future__ import annotations

import errno
import unicodedata

BUG = (
    "this is a bug in diffalign, not a mistake of yours. Please report it with the lines above and your config: "
    "https://github.com/diffalign/diffalign/issues"
)
# what the machine says of its files and disks; other OSErrors are bugs
_MACHINE = {
    errno.ENOENT: "it is not there; check the path",
    errno.EACCES: "access is denied; check its permissions",
    errno.EPERM: "the operation is not permitted; check its permissions",
    errno.EROFS: "the file system is read-only; name another folder",
    errno.ENOSPC: "no space is left on the device; free some, or name a folder on another one",
    errno.EDQUOT: "your disk quota is used up; free some space, or name a folder elsewhere",
    errno.EIO: "the disk reports an input/output error; check the device",
    errno.ENOTDIR: "a part of this path is a file, not a folder; check the path",
    errno.EEXIST: "a file of this name is there where a folder is needed; name another",
    errno.EISDIR: "it is a folder and a file is needed; check the path",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n 4096`",
}


class DiffalignError(ValueError):
    """An input (config, file, row, weights, command line) that cannot be used as it is.

    The message names the file, row or key, the value, what is allowed and the next thing to do.
    """


class ModelError(DiffalignError):
    """A model or a file of weights that cannot be loaded or tuned; the message says what was found and what to do."""


class MissingFileError(DiffalignError, FileNotFoundError):
    """A file or folder that is needed is not there."""


class ExistingFileError(DiffalignError, FileExistsError):
    """A file or folder would be overwritten."""


class MissingPackageError(DiffalignError, ImportError):
    """An optional package is needed and is not installed."""


class Interrupted(KeyboardInterrupt):
    """A run that a signal ended, after it did what it had to; `signum` is the signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(signum, message)  # both, so that it can be sent between processes
        self.signum, self.message = signum, message

    def __str__(self) -> str:
        return self.message


def out_of_memory(error: BaseException) -> str | None:
    """What to say first of memory that ran out, on a GPU or a CPU; None for any other error."""
    text = " ".join(str(error).split())
    cpu = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text)
    if type(error).__name__ != "OutOfMemoryError" and not cpu:
        return None
    return f"{'the machine' if cpu else 'the device'} is out of memory ({text[:200] or type(error).__name__})"


def lost_worker(error: BaseException) -> str | None:
    """What to say first of a loader worker that the system ended; None for any other error."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader worker (pid"):
        return None
    return f"a process that loads data was ended, mostly because memory or shared memory ran out ({text[:200]})"


def explain(error: BaseException) -> str | None:
    """The message for the user, or None if `error` is a bug.

    A DiffalignError has its own message. Errors of the operating system that name a file and a state of the machine (no
    space, no permission, ...) get a remedy. For a device out of memory the message names settings to change.
    """
    if isinstance(error, DiffalignError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _MACHINE and (error.filename or error.errno != errno.ENOENT):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{_MACHINE[error.errno]} ({error.strerror})"
    if (said := out_of_memory(error)) is not None:
        return (
            f"{said}. In training, lower training.train_batch_size or data.resolution, or set "
            "model.gradient_checkpointing: full; for images, lower --batch or --resolution"
        )
    if (said := lost_worker(error)) is not None:
        return f"{said}. Lower data.dataloader_num_workers (0 loads in the main process), or free some memory"
    return None


def printable(text: str) -> str:
    """`text` without what a terminal would obey: control and format characters are written as escapes.

    Line ends and tabs stay. Names, prompts and paths of others reach the terminal through this.
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else c.encode("unicode_escape").decode()
        for c in text
    )
