"""The hosts of a run, the busiest first, from ``hosts.jsonl``."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.storage.jsonl import iterate_jsonl
from mplug2_jax.training.telemetry.slow_hosts import CAUSES, HostTable, find_slow_host

_LAST_LINES, _MAX_ROWS = 100, 16


@dataclasses.dataclass(frozen=True)
class HostRow:
    """A process with its shares in percent, and how often it was the slowest."""

    process: int
    name: str
    data: float
    step: float
    memory: float
    times_slowest: int


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The last lines of a run of several processes; empty for one process."""

    count: int = 0
    lines: int = 0
    rows: Sequence[HostRow] = ()
    slowest: str = ""


def read_hosts(workdir: Path) -> Hosts:
    """Return the means over the last lines of the processes that the run had last; damaged lines are skipped."""
    parsed = map(_parse, iterate_jsonl(workdir / "hosts.jsonl"))
    lines = collections.deque((line for line in parsed if line is not None), maxlen=_LAST_LINES)
    if not lines or len(lines[-1][0]) < 2:
        return Hosts()
    names = lines[-1][0]
    tables = [table for before, table in lines if before == names]
    mean = np.mean(tables, axis=0)
    slow = [find_slow_host(table) for table in tables]
    times_slowest = collections.Counter(found.process for found in slow if found)
    order = np.argsort(-mean[:, :2].sum(axis=1), kind="stable")[:_MAX_ROWS]
    rows = []
    for process in map(int, order):
        data, step, memory = (round(100 * float(share), 1) for share in mean[process])
        rows.append(HostRow(process, names[process], data, step, memory, times_slowest[process]))
    found = find_slow_host(mean)
    slowest = f"Process {found.process} ({names[found.process]}) {found}." if found else ""
    return Hosts(len(names), len(tables), rows, slowest)


def _parse(line: Mapping[str, Any] | None) -> tuple[list[str], HostTable] | None:
    try:
        names = [str(name) for name in line["names"]]  # type: ignore[index]
        table = np.array([line["shares"][cause] for cause in CAUSES], np.float64).T  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None
    return (names, table) if table.shape == (len(names), len(CAUSES)) and np.isfinite(table).all() else None
