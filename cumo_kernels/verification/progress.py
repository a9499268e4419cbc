"""How far a long command is: one line that changes in a terminal, a line from time to time elsewhere."""

import sys
import time
from typing import TextIO

SECONDS = {True: 0.2, False: 5.0}  # between two lines, in a terminal or not
CLEAR = "\r\x1b[K"  # to the first column, and erase the line


class Progress:
    """Writes to `stream`, standard error by default."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._is_shown = False  # whether the cursor is behind a line that must be erased
        self._last = time.monotonic()

    def show(self, done: str, seconds_left: float | None) -> None:
        """Show what is done, such as "50 of 696 cases", and an estimate of the time left, if there is one."""
        if time.monotonic() - self._last < SECONDS[self._is_terminal]:
            return
        self._last = time.monotonic()
        left = "" if seconds_left is None else f", about {max(1, round(seconds_left))} s left"
        if self._is_terminal:
            self._stream.write(f"{CLEAR}{done}{left}")
            self._stream.flush()
            self._is_shown = True
        else:
            print(f"{done}{left}", file=self._stream, flush=True)

    def log(self, line: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(line, file=self._stream, flush=True)

    def clear(self) -> None:
        """Erase what `show` has shown in a terminal."""
        if self._is_shown:
            self._stream.write(CLEAR)
            self._stream.flush()
            self._is_shown = False


def time_left(done: int, total: int, begin: float) -> float | None:
    """Seconds until `total` parts are done, if the rest is as fast as the parts since `begin`."""
    return (time.monotonic() - begin) / done * (total - done) if done else None
