"""Serve what a run measures to Prometheus: ``GET /metrics`` of process 0, which has what all processes measured."""

import dataclasses
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from absl import logging
from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from mplug2_jax import __version__
from mplug2_jax.training.telemetry.events import EventLog
from mplug2_jax.training.telemetry.goodput import GoodputTracker
from mplug2_jax.training.telemetry.host_monitor import HostMonitor
from mplug2_jax.training.telemetry.metric_log import MetricLog
from mplug2_jax.training.telemetry.throughput import ThroughputMeter

_COUNTED_EVENTS = (
    "resumed", "update_skipped", "rolled_back", "saved", "save_failed", "checkpoint_damaged", "slow_host"
)  # fmt: skip
"""Events that have a series from the start: the increase of one that begins at 1 would not be seen."""
_HOST_METRICS = {
    "data": ("data_wait", "Share of a step in which the process waited for its own data"),
    "step": ("work", "Share of a step in which the process worked on the host"),
    "memory": ("memory", "Share of the host's memory in use"),
}
_LABELED = (
    (r"eval/(?P<evaluation>.+)/(?P<metric>[^/]+)", "eval_{metric}"),
    (r"(gradient|parameter)_norm/(?P<part>.+)", "part_{1}_norm"),
    (r"learning_rate/(?P<group>.+)", "learning_rate"),
    (r"(?P<stream>[^/]+)/(?P<objective>[^/]+)/(?P<metric>[^/]+)", "objective_{metric}"),
)
"""Patterns of logged names, and the names of their metrics, labeled with the pattern's groups."""
_SERVED_OTHERWISE = ("data/skipped/", "skipped_updates", "goodput/", "hosts/")
_SOCKET_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, eq=False)
class RunSources:
    """The objects that hold a run's measurements. Reading them uses no device and waits for no other process."""

    name: str
    meter: ThroughputMeter
    goodput: GoodputTracker
    events: EventLog
    hosts: HostMonitor
    metrics: MetricLog

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of now, in which no series is twice: Prometheus would refuse all of them."""
        run_metrics = list(self._collect_run_metrics())
        yield from run_metrics
        names = {sample.name for metric in run_metrics for sample in metric.samples}
        families: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for logged, value in self.metrics.latest.items():
            if not logged.startswith(_SERVED_OTHERWISE):
                name, labels = to_series(logged)
                families.setdefault(name, {}).setdefault(tuple(labels.items()), value)
        for name in sorted(families.keys() - names):
            metric = Metric(name, "Last logged value", "gauge")
            for pairs, value in families[name].items():
                metric.add_sample(name, dict(pairs), value)
            yield metric

    def _collect_run_metrics(self) -> Iterator[Metric]:
        run = {"name": _to_utf8(self.name), "version": __version__}
        yield InfoMetricFamily("mplug2_run", "The run and the version of mplug2_jax", run)
        yield GaugeMetricFamily("mplug2_step", "Last finished step", self.meter.step)
        if self.meter.step_time:
            yield GaugeMetricFamily(
                "mplug2_step_timestamp_seconds", "When a step finished last, in Unix time", self.meter.step_time
            )
        yield CounterMetricFamily(
            "mplug2_examples", "Examples of the steps since the process started", self.meter.num_examples
        )
        if seconds := self.metrics.latest.get("seconds_per_step"):
            yield GaugeMetricFamily("mplug2_steps_per_second", "Rate of the last logged steps", 1 / seconds)
        yield _labeled_counter(
            "mplug2_skipped_records", "Records that process 0 could not use", "source", self.meter.num_skipped_records
        )
        yield _labeled_counter(
            "mplug2_phase_seconds", "Wall-clock time since the process started, and idle before", "phase",
            self.goodput.read(),
        )  # fmt: skip
        yield GaugeMetricFamily(
            "mplug2_goodput_ratio", "Share of the run's wall-clock time in steps that were not repeated",
            self.goodput.goodput(),
        )  # fmt: skip
        yield _labeled_counter(
            "mplug2_events", "Events of the run, over restarts", "event",
            dict.fromkeys(_COUNTED_EVENTS, 0) | dict(self.events.counts),
        )  # fmt: skip
        saved = self.events.latest.get("saved", {})
        if {"step", "time"} <= saved.keys():
            yield GaugeMetricFamily("mplug2_checkpoint_step", "Step of the last checkpoint", saved["step"])
            yield GaugeMetricFamily(
                "mplug2_checkpoint_timestamp_seconds", "When it was complete, in Unix time", saved["time"]
            )
        hosts, columns = self.hosts.host_fractions
        for cause, column in columns.items():
            name, text = _HOST_METRICS[cause]
            metric = GaugeMetricFamily(f"mplug2_host_{name}_ratio", text, labels=("process", "host"))
            for process, (host, value) in enumerate(zip(hosts, column, strict=True)):
                metric.add_metric((str(process), _to_utf8(host)), value)
            yield metric


def to_series(logged: str) -> tuple[str, dict[str, str]]:
    """Return the name and the labels that a logged metric has in Prometheus.

    Example:
        >>> to_series("text/mlm/loss")
        ('mplug2_objective_loss', {'stream': 'text', 'objective': 'mlm'})
        >>> to_series("memory/peak_bytes")
        ('mplug2_memory_peak_bytes', {})
    """
    for pattern, template in _LABELED:
        if match := re.fullmatch(pattern, logged, re.DOTALL):
            labels = {name: _to_utf8(value) for name, value in match.groupdict().items()}
            name = template.format(match[0], match[1], metric=labels.pop("metric", ""))
            break
    else:
        name, labels = logged, {}
    return f"mplug2_{re.sub(r'[^a-zA-Z0-9]', '_', name)}", labels


def _to_utf8(text: str) -> str:
    """Return a label with "?" for what UTF-8 cannot encode, such as bytes of a command line that are not text."""
    return text.encode(errors="replace").decode()


def _labeled_counter(
    name: str, documentation: str, label: str, values: Mapping[str, int] | Mapping[str, float]
) -> Metric:
    metric = CounterMetricFamily(name, documentation, labels=(label,))
    for key, value in dict(values).items():
        metric.add_metric((_to_utf8(key),), value)
    return metric


class MetricsServer:
    """A server in daemon threads, which answers ``GET /metrics`` and nothing else.

    If the port cannot be used, a warning is logged and nothing is served. The run never waits for a client.

    Args:
        sources: of the measurements.
        address: IP address to listen on.
        port: to listen on.
    """

    def __init__(self, sources: RunSources, address: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(sources)
        self._server: _Server | None = None
        try:
            self._server = _Server(address, port, registry)
        except OSError as error:
            logging.warning(
                "no metrics for Prometheus: cannot listen on config.metrics_address=%s, config.metrics_port=%d (%s)",
                address, port, error.strerror or error,
            )  # fmt: skip
            return
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()
        host = f"[{address}]" if ":" in address else address
        logging.info("metrics for Prometheus at http://%s:%d/metrics", host, port)

    def close(self) -> None:
        """Stop listening."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()


class _Handler(MetricsHandler):
    timeout = _SOCKET_SECONDS  # for a client that connects and says nothing

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == "/metrics":
            super().do_GET()
        else:
            self.send_error(404)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), _Handler.factory(registry))

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's looks the host's name up, which may take long

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # one of those is a client that hung up
            logging.log_first_n(logging.WARNING, "metrics cannot be served to Prometheus: %r", 1, error)
