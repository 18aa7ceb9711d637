"""Log lines and progress: who writes, where to, and in which form."""

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest
from absl import logging as absl_logging

from mplug2_jax import console
from mplug2_jax.console import Progress, configure_logging, format_duration, set_process_index

LINE = re.compile(r"(?P<severity>[DIWE])\d{4} \d\d:\d\d:\d\d p(?P<process>\d+)\] (?P<message>.*)")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], absl_logging.get_verbosity()
    yield
    logging.root.handlers[:] = handlers
    absl_logging.set_verbosity(level)
    set_process_index(0)


def lines(err: str) -> list[tuple[str, str, str]]:
    return [match.groups() for line in err.splitlines() if (match := LINE.fullmatch(line))]


def log(ours: bool) -> None:
    """Log one line of each severity, from a file of this project or from a library's."""
    path = console.__file__ if ours else "/usr/lib/orbax/save.py"
    logger = absl_logging.get_absl_logger()
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        if logger.isEnabledFor(level):
            logger.handle(logger.makeRecord("absl", level, path, 1, "said %d", (level,), None))


@pytest.mark.parametrize(("verbosity", "ours", "theirs"), [(-1, "WE", "WE"), (0, "IWE", "WE"), (1, "DIWE", "DIWE")])
def test_verbosity_chooses_severities_and_libraries_are_less_loud(
    verbosity: int, ours: str, theirs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(verbosity)
    configure_logging(verbosity)  # again: not a second time each line
    for is_ours, expected in ((True, ours), (False, theirs)):
        log(is_ours)
        out, err = capsys.readouterr()
        assert out == ""
        assert "".join(severity for severity, _, _ in lines(err)) == expected
        assert len(err.splitlines()) == len(expected)


def test_other_processes_log_warnings_and_errors_alone_and_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    set_process_index(3)
    log(True)
    with Progress(10, "record", log_every=0) as progress:
        progress.update(10)
    assert lines(capsys.readouterr().err) == [("W", "3", "said 30"), ("E", "3", "said 40")]


def test_progress_is_log_lines_with_rate_and_eta_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    configure_logging()
    with Progress(1200, "record", initial=200) as progress:
        for done, moment in ((200, 101), (300, 105), (400, 110), (500, 111), (1200, 120)):
            now[0] = moment
            progress.update(done, "2 skipped")
    with Progress(2_000_000_000, "B", desc="reading", log_every=0) as progress:
        now[0] += 10
        progress.update(500_000_000)
    with Progress(380, "step", log_every=0) as progress:
        progress.update(20, "loss 3.1250", seconds_per_unit=0.5)
    assert [message for _, _, message in lines(capsys.readouterr().err)] == [
        "record   400/1,200  2 skipped  20.0 records/s  eta 0:40",
        "record 1,200/1,200  2 skipped  50.0 records/s  eta 0:00",
        "reading  500/2,000 MB  50 MB/s  eta 0:30",
        "step  20/380  loss 3.1250  2.0 steps/s  eta 3:00",
    ]


def test_progress_is_a_bar_on_a_terminal_and_log_lines_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging()
    with Progress(4, "step") as progress:
        progress.update(1)
        log(True)
        progress.update(2, "loss 1.0")
        progress.update(1)  # rolled back
    shown = terminal.getvalue()
    assert "/4" in shown
    assert any(LINE.fullmatch(part) for part in re.split(r"[\r\n]", shown))
    configure_logging(-1)
    before = len(terminal.getvalue())
    with Progress(4, "step") as progress:
        progress.update(4)
    assert len(terminal.getvalue()) == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (1e6, "277:46:40")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
