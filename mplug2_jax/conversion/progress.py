"""Progress of a conversion in bytes."""

import threading
import time

from mplug2_jax.console import Progress


class ByteProgress:
    """Counts the bytes that several threads read and write, and shows how much of ``total`` is read."""

    def __init__(self, desc: str, total: int) -> None:
        self._progress = Progress(total, "B", desc=desc)
        self._start = time.perf_counter()
        self._lock = threading.Lock()
        self.bytes_read = self.bytes_written = 0

    def add_read(self, count: int) -> None:
        """Count bytes read from the source."""
        with self._lock:
            self.bytes_read += count
            self._progress.update(self.bytes_read)

    def add_written(self, count: int) -> None:
        """Count bytes written."""
        with self._lock:
            self.bytes_written += count

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._start

    def close(self) -> None:
        """Remove the progress bar."""
        self._progress.close()
