"""``events.jsonl``: what happened to a run besides its steps."""

import collections
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.storage.jsonl import JsonlWriter, read_jsonl

_OLD_EVENTS: Mapping[str, str] = {
    "rolled back": "rolled_back", "not saved": "save_failed", "skipped": "update_skipped",
    "damaged": "checkpoint_damaged", "lengthened": "steps_extended",
}  # fmt: skip
_OLD_KEYS: Mapping[str, str] = {"to": "to_step", "offset": "data_offset", "before": "old_steps"}
_OLD_KINDS: Mapping[str, str] = {"free": "runtime", "neutral": "execution", "deciding": "training"}  # of fields


class EventLog:
    """Appends events to a file; without a path it discards them.

    ``counts`` has the number of events of each name in the file, ``latest`` the last of each name.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._writer = JsonlWriter(path) if path else None
        self.counts: collections.Counter[str] = collections.Counter()
        self.latest: dict[str, Mapping[str, Any]] = {}
        for line in read_events(path) if path else ():
            self._count(line)

    def log_event(self, event: str, step: int, **details: Any) -> None:
        """Write an event with its time, the step that the run is at, and its details."""
        if self._writer:
            line = {"time": round(time.time(), 3), "event": event, "step": step, **details}
            self._writer.write(line)
            self._count(line)

    def _count(self, line: Mapping[str, Any]) -> None:
        self.counts[line["event"]] += 1
        self.latest[line["event"]] = line

    def close(self) -> None:
        """Close the file."""
        if self._writer:
            self._writer.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return all undamaged events; those of older versions get the names, keys and kinds of this one."""
    events = []
    for line in read_jsonl(path):
        event = {_OLD_KEYS.get(key, key): value for key, value in line.items()}
        event["event"] = _OLD_EVENTS.get(name := str(line.get("event")), name)
        if "kind" in event:
            event["kind"] = _OLD_KINDS.get(str(event["kind"]), event["kind"])
        events.append(event)
    return events
