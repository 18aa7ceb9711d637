"""Log lines and progress: which process writes, where, and in which format."""

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest
from absl import logging as absl_logging

from mplug2_jax import console
from mplug2_jax.console import Progress, align_columns, configure_logging, format_duration, set_process_index

LINE = re.compile(r"(?P<severity>[DIWE])\d{4} \d\d:\d\d:\d\d p(?P<process>\d+)\] (?P<message>.*)")


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], absl_logging.get_verbosity()
    yield
    logging.root.handlers[:] = handlers
    absl_logging.set_verbosity(level)
    set_process_index(0)


def parse_lines(err: str) -> list[tuple[str, str, str]]:
    return [match.groups() for line in err.splitlines() if (match := LINE.fullmatch(line))]


def log_each_severity(from_project: bool) -> None:
    """Log one line of each severity, from a file of this project or of a library."""
    path = console.__file__ if from_project else "/usr/lib/orbax/save.py"
    logger = absl_logging.get_absl_logger()
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        if logger.isEnabledFor(level):
            logger.handle(logger.makeRecord("absl", level, path, 1, "level %d", (level,), None))


@pytest.mark.parametrize(("verbosity", "project", "library"), [(-1, "WE", "WE"), (0, "IWE", "WE"), (1, "DIWE", "DIWE")])
def test_verbosity_selects_severities_and_libraries_log_less(
    verbosity: int, project: str, library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(verbosity)
    configure_logging(verbosity)  # a second call must not duplicate lines
    for from_project, expected in ((True, project), (False, library)):
        log_each_severity(from_project)
        out, err = capsys.readouterr()
        assert out == ""
        assert "".join(severity for severity, _, _ in parse_lines(err)) == expected
        assert len(err.splitlines()) == len(expected)


def test_other_processes_log_only_warnings_and_errors_and_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    set_process_index(3)
    log_each_severity(True)
    with Progress(10, "record", log_every=0) as progress:
        progress.update(10)
    assert parse_lines(capsys.readouterr().err) == [("W", "3", "level 30"), ("E", "3", "level 40")]


def test_progress_without_a_terminal_is_log_lines_with_rate_and_eta(
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
        progress.update(40, seconds_per_unit=4.0)
    assert [message for _, _, message in parse_lines(capsys.readouterr().err)] == [
        "record   400/1,200  2 skipped  20.0 records/s  eta 0:40",
        "record 1,200/1,200  2 skipped  50.0 records/s  eta 0:00",
        "reading  500/2,000 MB  50 MB/s  eta 0:30",
        "step  20/380  loss 3.1250  2.0 steps/s  eta 3:00",
        "step  40/380  4.0 s/step  eta 22:40",
    ]


def test_progress_on_a_terminal_is_a_bar_below_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_logging()
    with Progress(4, "step") as progress:
        progress.update(1)
        log_each_severity(True)
        progress.update(2, "loss 1.0")
        progress.update(1)  # after a rollback
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


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert list(align_columns([("a", "1"), ("bcd", "234")], right=[1])) == ["a      1", "bcd  234"]
    assert list(align_columns([("a", ""), ("bcd", "x")])) == ["a", "bcd  x"]
    assert list(align_columns([])) == []
