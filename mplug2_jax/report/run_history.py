"""The history of a run: time by phase and events, from ``goodput.jsonl`` and ``events.jsonl``."""

import collections
import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mplug2_jax.console import format_duration
from mplug2_jax.training.telemetry.events import read_events
from mplug2_jax.training.telemetry.goodput import read_goodput

MAX_EVENTS = 200
_ORDER = ("step", "data_wait", "compile", "checkpoint", "evaluation", "init", "restart", "idle")
MAX_STARTS = 10
MIN_START_SECONDS = 0.05  # of a phase that is listed
_COUNTED_ONLY = ("saved", "compiled", "config_changed", "started")  # too frequent, or in a table of their own


@dataclasses.dataclass(frozen=True)
class PhaseTime:
    """The part of the wall-clock time that one phase took."""

    phase: str
    seconds: float
    share: float  # percent

    @property
    def time(self) -> str:
        """Return the time in hours, minutes and seconds."""
        return format_duration(self.seconds)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to the run."""

    time: str
    step: int
    description: str


@dataclasses.dataclass(frozen=True)
class Change:
    """A field of the config that changed when the run resumed after a step."""

    step: int
    field: str
    old: str
    new: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Start:
    """A start of the run, until its first step was done."""

    time: str
    step: int
    seconds: float
    phases: str  # the seconds of each


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """Time and events of a run; empty if it wrote none.

    ``wall`` counts seconds from the start of the first process to the last line of the last one.
    """

    phases: Sequence[PhaseTime] = ()
    wall: float = 0.0
    events: Sequence[Event] = ()
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    changes: Sequence[Change] = ()
    starts: Sequence[Start] = ()

    @property
    def goodput(self) -> float:
        """Return the percentage of the time that went into steps that were not repeated."""
        return next((time.share for time in self.phases if time.phase == "step"), 0.0)

    @property
    def time(self) -> str:
        """Return the wall-clock time in hours, minutes and seconds."""
        return format_duration(self.wall)


def read_run_history(workdir: Path) -> RunHistory:
    """Return the history of a run; damaged lines of its files are skipped."""
    seconds: dict[str, float] = collections.defaultdict(float)
    spans = read_goodput(workdir / "goodput.jsonl")
    for span in spans:
        for phase, value in span["seconds"].items():
            seconds[phase] += value
    end = max((span["end_time"] for span in spans), default=0.0)
    wall = max(end - min((span["start_time"] for span in spans), default=0.0), 0.0)
    order = {phase: i for i, phase in enumerate(_ORDER)}
    phases = sorted(seconds, key=lambda phase: order.get(phase, len(order)))
    times = [PhaseTime(name, seconds[name], round(100 * seconds[name] / wall, 2) if wall else 0.0) for name in phases]
    counts: collections.Counter[str] = collections.Counter()
    events: collections.deque[Event] = collections.deque(maxlen=MAX_EVENTS)
    changes: list[Change] = []
    starts: collections.deque[Start] = collections.deque(maxlen=MAX_STARTS)
    for line in read_events(workdir / "events.jsonl"):
        name = line["event"]
        counts[name] += 1
        if name == "config_changed":
            old, new = (
                json.dumps(line[key], ensure_ascii=False) if key in line else "absent" for key in ("old", "new")
            )
            kind = f"{line.get('kind')}{', forced' if line.get('forced') else ''}"
            changes.append(Change(_as_int(line.get("step")), str(line.get("field")), old, new, kind))
        if name == "started" and (start := _read_start(line)):
            starts.append(start)
        if name not in _COUNTED_ONLY:
            events.append(Event(_format_time(line.get("time")), _as_int(line.get("step")), _describe_event(name, line)))
    return RunHistory(times, wall, list(events), dict(counts), changes, list(starts))


def _read_start(line: Mapping[str, Any]) -> Start | None:
    """Return the start that an event describes; None if the event is damaged."""
    try:
        seconds = {str(phase): float(value) for phase, value in line["seconds"].items()}
        phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if value >= MIN_START_SECONDS)
        return Start(_format_time(line.get("time")), _as_int(line.get("step")), sum(seconds.values()), phases)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _describe_event(name: str, line: Mapping[str, Any]) -> str:
    if name == "rolled_back":
        return f"rolled back to step {line.get('to_step')}; {line.get('data_offset')} batches of data were skipped"
    if name == "update_skipped":
        return f"update skipped: non-finite {', '.join(map(str, line.get('metrics') or ['loss']))}"
    name = name.replace("_", " ")
    return f"{name}: {line['reason']}" if "reason" in line else name


def _format_time(seconds: Any) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (TypeError, ValueError, OverflowError, OSError):
        return "?"


def _as_int(value: Any) -> int:
    return value if isinstance(value, int) else 0
