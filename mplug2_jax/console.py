"""Log lines on standard error, and the progress of long work.

All code logs by ``absl.logging``; ``print`` is for the output of a command. Process 0 logs at every severity, the other
processes only warnings and errors.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging as absl_logging

_PACKAGE = Path(__file__).resolve().parent
_OURS = (f"{_PACKAGE}/", f"{_PACKAGE.parent / 'data_pipelines'}/")
_process_index = 0


def configure_logging(verbosity: int = 0) -> None:
    """Send the log to standard error, one line per message: severity, date, time, process, message.

    Args:
        verbosity: -1 shows only warnings and errors; 0 also this project's INFO messages; 1 everything down to DEBUG,
            from libraries too.
    """
    for handler in [handler for handler in logging.root.handlers if isinstance(handler, _Handler)]:
        logging.root.removeHandler(handler)
    logging.root.addHandler(_Handler(verbosity))  # at the root, or absl would add a second handler there
    levels = {-1: absl_logging.WARNING, 0: absl_logging.INFO, 1: absl_logging.DEBUG}
    absl_logging.set_verbosity(levels[max(-1, min(verbosity, 1))])


def set_process_index(index: int) -> None:
    """Set this process's index in log lines; processes other than 0 log only warnings and errors."""
    global _process_index
    _process_index = index


def process_index() -> int:
    """Return this process's index, without asking JAX, which may not answer; 0 until it is known."""
    return _process_index


class _Handler(logging.StreamHandler[Any]):
    """A handler that writes to the current ``sys.stderr`` and clears a progress bar first."""

    def __init__(self, verbosity: int) -> None:
        logging.Handler.__init__(self)
        self._verbosity = verbosity

    @property
    def stream(self) -> Any:
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio" and self._verbosity <= 0:
            return False  # tracebacks of reads that Orbax abandons; the error that ends the command says what is wrong
        if record.levelno >= logging.WARNING:
            return True
        return _process_index == 0 and (self._verbosity > 0 or record.pathname.startswith(_OURS))

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%m%d %H:%M:%S", time.localtime(record.created))
        return f"{record.levelname[0]}{when} p{_process_index}] {super().format(record)}"

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.ExitStack() as stack:
            if "tqdm" in sys.modules:
                from tqdm import tqdm

                stack.enter_context(tqdm.external_write_mode(file=sys.stderr))
            super().emit(record)


def format_duration(seconds: float | int) -> str:
    """Return a duration as ``minutes:seconds`` or ``hours:minutes:seconds``.

    Example:
        >>> format_duration(42), format_duration(187), format_duration(8100)
        ('0:42', '3:07', '2:15:00')
    """
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Yield rows as lines with aligned columns, those in ``right`` aligned to the right.

    Example:
        >>> list(align_columns([("a", "1"), ("bcd", "234")], right=[1]))
        ['a      1', 'bcd  234']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        yield "  ".join(cells).rstrip()


class Progress:
    """Progress of long work, with rate and ETA: a bar on a terminal, log lines elsewhere. Only process 0 shows it.

    Args:
        total: number of units.
        unit: in the singular, such as "step" or "record"; "B" for bytes, shown as MB.
        initial: units done before this process started.
        desc: description at the start of the line.
        log_every: seconds between log lines; 0 logs every update.
    """

    def __init__(self, total: int, unit: str, *, initial: int = 0, desc: str = "", log_every: float | int = 10) -> None:
        self._total, self._unit, self._initial, self._desc, self._log_every = total, unit, initial, desc, log_every
        self._start = self._logged = time.monotonic()
        self._shown = _process_index == 0 and absl_logging.get_absl_logger().isEnabledFor(logging.INFO)
        self._bar = None
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=initial, unit=unit if unit == "B" else f" {unit}", unit_scale=unit == "B",
                desc=desc, dynamic_ncols=True, leave=False, mininterval=0.2, file=sys.stderr,
            )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, done: int, stats: str = "", *, seconds_per_unit: float | None = None) -> None:
        """Show the number of units done.

        Args:
            done: units done in total, including ``initial``; may decrease after a rollback.
            stats: further text for the line.
            seconds_per_unit: a better estimate of the rate than the mean since the start.
        """
        if self._bar is not None:
            self._bar.set_postfix_str(stats, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if not self._shown or done == self._initial or (done < self._total and now - self._logged < self._log_every):
            return
        self._logged = now
        rate = 1 / seconds_per_unit if seconds_per_unit else (done - self._initial) / max(now - self._start, 1e-9)
        eta = format_duration((self._total - done) / rate) if rate > 0 else "unknown"
        absl_logging.info("%s", "  ".join(filter(None, (self._line(done), stats, self._rate(rate), f"eta {eta}"))))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, done: int) -> str:
        desc = f"{self._desc}  " if self._desc else ""
        if self._unit == "B":
            return f"{desc}{done / 1e6:,.0f}/{self._total / 1e6:,.0f} MB"
        return f"{desc}{self._unit} {done:>{len(f'{self._total:,}')},}/{self._total:,}"

    def _rate(self, rate: float) -> str:
        if self._unit == "B":
            return f"{rate / 1e6:,.0f} MB/s"
        return f"{rate:,.1f} {self._unit}s/s" if rate >= 1 or not rate else f"{1 / rate:,.1f} s/{self._unit}"
