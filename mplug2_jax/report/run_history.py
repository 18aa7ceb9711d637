"""Where a run's time went and what happened to it, from ``ledger.jsonl`` and ``events.jsonl``."""

import collections
import dataclasses
import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_EVENTS = 200
_ORDER = ("step", "data wait", "compile", "checkpoint", "evaluation", "start", "restart", "idle")
_QUIET = ("saved", "compiled")  # of which a table would be full; they are counted


@dataclasses.dataclass(frozen=True)
class Booked:
    """One cause's part of the wall clock."""

    cause: str
    seconds: float
    share: float  # percent

    @property
    def time(self) -> str:
        """Hours, minutes and seconds."""
        return str(datetime.timedelta(seconds=round(self.seconds)))


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that happened."""

    time: str
    step: int
    what: str


@dataclasses.dataclass(frozen=True)
class Story:
    """What the page says of time and events; empty for a run that kept no ledger."""

    booked: Sequence[Booked] = ()
    wall: float = 0.0  # seconds from the first process's start to the last word of the last
    events: Sequence[Event] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def goodput(self) -> float:
        """Percent of the time that went into steps which were not done again."""
        return next((booked.share for booked in self.booked if booked.cause == "step"), 0.0)

    @property
    def time(self) -> str:
        """The wall clock in hours, minutes and seconds."""
        return str(datetime.timedelta(seconds=round(self.wall)))


def read_story(workdir: Path) -> Story:
    """Reads both files as streams; lines that are damaged are left out."""
    seconds: dict[str, float] = collections.defaultdict(float)
    first, last = math.inf, -math.inf
    for line in _lines(workdir / "ledger.jsonl"):
        try:
            booked = {str(cause): float(value) for cause, value in line["seconds"].items()}
            first, last = min(first, float(line["from"])), max(last, float(line["to"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        for cause, value in booked.items():
            seconds[cause] += value
    wall = max(last - first, 0.0) if math.isfinite(last - first) else 0.0
    causes = sorted(seconds, key=lambda cause: _ORDER.index(cause) if cause in _ORDER else len(_ORDER))
    shares = [Booked(cause, seconds[cause], round(100 * seconds[cause] / wall, 2) if wall else 0.0) for cause in causes]
    counts: collections.Counter[str] = collections.Counter()
    events: collections.deque[Event] = collections.deque(maxlen=MAX_EVENTS)
    for line in _lines(workdir / "events.jsonl"):
        kind = str(line.get("event"))
        counts[kind] += 1
        if kind not in _QUIET:
            events.append(Event(_moment(line.get("time")), _whole(line.get("step")), _told(kind, line)))
    return Story(shares, wall, list(events), dict(counts))


def _told(kind: str, line: Mapping[str, Any]) -> str:
    """An event in words."""
    if kind == "rolled back":
        return f"rolled back to step {line.get('to')}; the data are {line.get('offset')} batches further on since"
    if kind == "skipped":
        return f"update skipped: {', '.join(map(str, line.get('metrics') or ['it']))} not finite"
    return f"{kind}: {line['reason']}" if "reason" in line else kind


def _moment(seconds: Any) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return "?"


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line
