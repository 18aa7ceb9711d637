"""How far a conversion is: bytes, rate and time left."""

import sys
import threading
import time

from mplug2_jax.console import format_duration


class Transfer:
    """Counts bytes from several threads; rewrites one line on a terminal, prints one every ten seconds elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._start = self._shown = time.perf_counter()
        self._lock = threading.Lock()
        self.bytes_read = self.bytes_written = 0

    def read(self, count: int) -> None:
        """Books bytes that were read from the source."""
        with self._lock:
            self.bytes_read += count
            self._show()

    def wrote(self, count: int) -> None:
        """Books bytes that were written."""
        with self._lock:
            self.bytes_written += count

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._start

    def _show(self) -> None:
        now, live = time.perf_counter(), sys.stderr.isatty()
        if now - self._shown < (0.2 if live else 10):
            return
        self._shown = now
        rate = self.bytes_read / (now - self._start)
        left = format_duration((self._total - self.bytes_read) / max(rate, 1))
        line = f"{self._what}  {self.bytes_read / 1e6:,.0f} of {self._total / 1e6:,.0f} MB  {rate / 1e6:,.0f} MB/s"
        sys.stderr.write(f"\r\x1b[K{line}  left {left}" if live else f"{line}  left {left}\n")
        sys.stderr.flush()

    def done(self) -> None:
        """Ends the line that was rewritten."""
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
