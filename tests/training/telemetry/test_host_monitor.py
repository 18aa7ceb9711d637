"""Measurements go from all processes to process 0 through a key-value store, and nobody waits for them."""

import types
from pathlib import Path
from typing import Any

import pytest

from mplug2_jax.training.telemetry import host_monitor
from mplug2_jax.training.telemetry.events import EventLog, read_events
from mplug2_jax.training.telemetry.host_monitor import HostMonitor, memory_in_use
from mplug2_jax.training.telemetry.metric_log import read_step_lines


class Store:
    """JAX's key-value store as far as it is used; unreachable if asked."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.is_reachable = True

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        if not self.is_reachable:
            raise RuntimeError("UNAVAILABLE")
        assert allow_overwrite  # a step is repeated after a rollback
        self.values[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.values.items() if key.startswith(f"{folder}/")]

    def key_value_delete(self, folder: str) -> None:
        self.values = {key: value for key, value in self.values.items() if not key.startswith(f"{folder}/")}


class Cluster:
    """Monitors of three processes in one, with a clock."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.now, self.process, self.folder = Store(), 0.0, 0, folder
        monkeypatch.setattr(host_monitor, "key_value_client", lambda: self.store)
        monkeypatch.setattr(host_monitor, "is_primary_process", lambda: self.process == 0)
        monkeypatch.setattr(host_monitor, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        fake = types.SimpleNamespace(process_count=lambda: 3, process_index=lambda: self.process)
        monkeypatch.setattr(host_monitor, "jax", fake)
        self.events, self.monitors = EventLog(folder / "events.jsonl"), []
        for self.process in range(3):
            self.monitors.append(HostMonitor(folder / "hosts.jsonl", 0, self.events))

    def record(self, process: int, step: int, data: float, work: float) -> dict[str, float]:
        """Record ten seconds: waiting for data, working, and waiting for the others for the rest."""
        self.process, monitor = process, self.monitors[process]
        with monitor.waiting():
            self.now += 10 - data - work
        return monitor.record(step, data, 10 - data)

    def lines(self) -> list[dict[str, Any]]:
        return read_step_lines(self.folder / "hosts.jsonl")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def test_process_0_reads_a_line_when_all_have_reached_it(cluster: Cluster) -> None:
    assert cluster.record(0, 10, 1.0, 1.0) == {}
    assert cluster.record(1, 10, 8.0, 1.0) == {}
    assert cluster.record(2, 10, 1.0, 2.0) == {}
    metrics = cluster.record(0, 20, 1.0, 1.0)
    assert (metrics["hosts/slowest"], metrics["hosts/data_max"], metrics["hosts/step_max"]) == (1, 0.8, 0.2)
    assert cluster.monitors[0].slow_host.startswith("process 1 (")
    assert cluster.monitors[0].slow_host.endswith(") waits for data for 80% of a step, the others 10%")
    (line,) = cluster.lines()
    assert (line["step"], line["shares"]["data"], line["shares"]["step"]) == (10, [0.1, 0.8, 0.1], [0.1, 0.1, 0.2])
    assert len(line["names"]) == 3
    assert {key.split("/")[2] for key in cluster.store.values} == {"20"}


def test_a_line_that_stays_incomplete_and_an_unreachable_store_are_passed_over(cluster: Cluster) -> None:
    for step in range(1, 9):
        cluster.store.is_reachable = step != 6
        assert cluster.record(0, step, 1.0, 1.0) == {}
    assert len(cluster.store.values) == 3
    for process in (1, 2):
        cluster.record(process, 8, 1.0, 1.0)
    cluster.record(0, 9, 1.0, 1.0)
    cluster.record(0, 10, 1.0, 1.0)
    assert [line["step"] for line in cluster.lines()] == [8]


def test_a_host_that_is_slow_for_five_minutes_is_an_event(cluster: Cluster) -> None:
    for step in range(60):
        for process in range(3):
            cluster.record(process, step, 0.1, 9.0 if process == 2 else 1.0)
    (event,) = read_events(cluster.folder / "events.jsonl")
    assert (event["event"], event["process"], event["cause"]) == ("slow_host", 2, "step")
    assert event["reason"].startswith("for 5 minutes, process 2 (")


def test_a_rollback_drops_the_lines_that_will_be_repeated(cluster: Cluster) -> None:
    for step in (1, 2, 3):
        for process in (2, 1, 0):
            cluster.record(process, step, 1.0, 1.0)
    cluster.monitors[0].rewind(1)
    assert [line["step"] for line in cluster.lines()] == [1]


def test_the_memory_in_use_is_a_share() -> None:
    assert 0 <= memory_in_use() < 1
