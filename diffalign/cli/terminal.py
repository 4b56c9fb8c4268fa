"""What reaches the terminal: the one border where text of others loses its escape codes.

Prompts, names and paths may come from anybody. `guarded` puts every write of this process's stdout and stderr, and
every log line, through `errors.printable`; only a progress bar's own moves (to the line's start, up a line) pass.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffalign.errors import printable

MOVES = re.compile("(\r|\x1b\\[A)")  # tqdm's
STYLES = {"error": "\x1b[31m", "heading": "\x1b[1m"}  # red, bold


def write_styled(text: str, style: str, stream: Any) -> None:
    """Writes `text` to a stream, in a style where it is a `Terminal` that shows one."""
    if isinstance(stream, Terminal):
        stream.write_styled(text, style)
    else:
        stream.write(text)


class Terminal:
    """A text stream without escape codes; all else is the stream's own."""

    def __init__(self, stream: Any, moves: bool) -> None:
        self._stream = stream
        self._moves = moves

    def write(self, text: str) -> int:
        """Writes `text`, its control characters as escapes."""
        if not self._moves:
            self._stream.write(printable(text))
        else:
            self._stream.write("".join(p if MOVES.fullmatch(p) else printable(p) for p in MOVES.split(text)))
        return len(text)

    def write_styled(self, text: str, style: str) -> None:
        """Writes `text` in a style of `STYLES` where this is a terminal that shows one (NO_COLOR: no-color.org)."""
        plain = not self._stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._stream.write(printable(text) if plain else f"{STYLES[style]}{printable(text)}\x1b[0m")

    def writelines(self, lines: Any) -> None:
        """Writes each of them."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PrintableFormatter(logging.Formatter):
    """A log line, with its message's control characters (line ends and tabs apart) as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(super().format(record))


@contextmanager
def guarded() -> Iterator[None]:
    """stdout, stderr and the log without escape codes, and able to write any character; as before afterwards."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 cannot end a command
    sys.stdout, sys.stderr = Terminal(before[0], moves=False), Terminal(before[1], moves=True)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if isinstance(handler.stream, Terminal):
            handler.setStream(before[1])


def quiet_libraries() -> None:
    """Silences what libraries print on import and for every load; our own messages and warnings stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("httpx", "accelerate", "datasets", "urllib3", "filelock", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not sys.warnoptions:  # python -W and PYTHONWARNINGS show them
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", kind)
        warnings.filterwarnings("ignore", message="(?is).*(deprecated|use the new API settings to control TF32)")
    # Pillow's, of images that are refused with a reason of their own
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
