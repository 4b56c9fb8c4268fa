"""Progress bars: one line that is redrawn on a terminal, plain lines in a pipe or log file, none when off.

`disable_progress_bars()` switches them off for this process, as the function of that name in `datasets` does.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 15.0  # at least this long between two lines of a bar whose output is no terminal
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_enabled = True


def disable_progress_bars() -> None:
    """No bar is shown from here on."""
    global _enabled
    _enabled = False


def enable_progress_bars() -> None:
    """Bars are shown again."""
    global _enabled
    _enabled = True


class Progress(tqdm):  # type: ignore[misc]
    """tqdm's bar, in lines where the output is no terminal."""

    def __init__(self, *args: Any, disable: bool | None = False, **settings: Any) -> None:
        self.in_lines = not (settings.get("file") or sys.stderr).isatty()
        self.disable: bool
        self._line_time = time.monotonic()
        if self.in_lines:
            settings |= {"mininterval": LINE_SECONDS, "maxinterval": 2 * LINE_SECONDS, "bar_format": LINE}
            settings["delay"] = max(settings.get("delay", 0.0), 1e-9)  # no line before the first result
        else:
            settings.setdefault("dynamic_ncols", True)
        super().__init__(*args, disable=disable if _enabled else True, **settings)

    @staticmethod
    def format_meter(*args: Any, **settings: Any) -> str:
        """The bar's text; tqdm writes slow rates as "2.00s/ steps" where the unit begins with a space."""
        return str(tqdm.format_meter(*args, **settings)).replace("s/ ", "s/")

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar, or writes a line where the last one is long enough ago."""
        if not self.in_lines:
            return bool(super().display(msg, pos))
        now = time.monotonic()
        finished = self.total is not None and self.n >= self.total  # `close` writes that line
        if now - self._line_time >= LINE_SECONDS and not finished:
            self.fp.write(f"{self}\n")
            self._line_time = now
        return True

    def close(self) -> None:
        """Ends the bar. In lines the last one says how far it came, unless the bar leaves nothing or was never due."""
        if not self.in_lines or self.disable:
            super().close()
            return
        self.disable = True
        self._decr_instances(self)
        if self.leave and self.n > self.initial and self._time() - self.start_t >= self.delay:
            self.fp.write(f"{self}\n")
