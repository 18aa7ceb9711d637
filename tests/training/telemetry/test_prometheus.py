"""The Prometheus endpoint: types, names and values of its metrics; a server that never stops a run."""

import math
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import pytest

from mplug2_jax import __version__
from mplug2_jax.errors import UserError
from mplug2_jax.launch.local import find_free_port
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.telemetry.events import EventLog
from mplug2_jax.training.telemetry.goodput import GoodputTracker
from mplug2_jax.training.telemetry.host_monitor import HostMonitor
from mplug2_jax.training.telemetry.metric_log import MetricLog
from mplug2_jax.training.telemetry.prometheus import MetricsServer, RunSources
from mplug2_jax.training.telemetry.throughput import ThroughputMeter
from tests.runs import text_run
from tests.scrape import scrape


def make_sources(folder: Path, name: str = "small") -> RunSources:
    events = EventLog(folder / "events.jsonl")
    meter = mock.Mock(
        spec=ThroughputMeter, step=7, step_time=1.7e9, num_examples=56, num_skipped_records={"tars": 2}
    )  # fmt: skip
    hosts, metrics = HostMonitor(folder / "hosts.jsonl", 0, events), MetricLog(folder, 0)
    return RunSources(name, meter, GoodputTracker(), events, hosts, metrics)


@pytest.fixture
def sources(tmp_path: Path) -> RunSources:
    return make_sources(tmp_path)


@pytest.fixture
def port(sources: RunSources):
    port = find_free_port()
    server = MetricsServer(sources, "127.0.0.1", port)
    yield port
    server.close()


def test_types_and_values(port: int, sources: RunSources) -> None:
    sources.metrics.write(6, {"loss": 2.5, "seconds_per_step": 0.5, "text/mlm/loss": 2.0, "learning_rate/rest": 1e-3})
    sources.metrics.write(6, {"gradient_norm": 3.0, "gradient_norm/text": 1.0, "hosts/slowest": 1.0})
    sources.metrics.write(6, {"eval/words/top_5": math.nan, "data/skipped/tars": 2.0, "goodput/step": 0.5})
    sources.events.log_event("saved", 6)
    sources.hosts.record(6, 1.0, 3.0)
    with sources.goodput.track("compile"):
        types, values = scrape(port)
    assert types["mplug2_examples"] == types["mplug2_phase_seconds"] == types["mplug2_events"] == "counter"
    assert types["mplug2_run_info"] == types["mplug2_loss"] == types["mplug2_goodput_ratio"] == "gauge"
    assert values["mplug2_run_info", "small", __version__] == 1
    assert values["mplug2_step",] == 7
    assert values["mplug2_step_timestamp_seconds",] == 1.7e9
    assert values["mplug2_examples_total",] == 56
    assert values["mplug2_steps_per_second",] == 2
    assert values["mplug2_skipped_records_total", "tars"] == 2
    assert values["mplug2_phase_seconds_total", "init"] > 0
    assert values["mplug2_phase_seconds_total", "compile"] > 0
    assert values["mplug2_goodput_ratio",] == 0
    assert values["mplug2_events_total", "saved"] == 1
    assert values["mplug2_events_total", "rolled_back"] == 0
    assert values["mplug2_checkpoint_step",] == 6
    assert values["mplug2_checkpoint_timestamp_seconds",] == sources.events.latest["saved"]["time"]
    assert values["mplug2_host_data_wait_ratio", socket.gethostname(), "0"] == 0.25
    assert values["mplug2_loss",] == 2.5
    assert values["mplug2_objective_loss", "mlm", "text"] == 2.0
    assert values["mplug2_learning_rate", "rest"] == 1e-3
    assert (values["mplug2_gradient_norm",], values["mplug2_part_gradient_norm", "text"]) == (3.0, 1.0)
    assert math.isnan(values["mplug2_eval_top_5", "words"])
    assert not [name for name, *_ in values if "slowest" in name or "data_skipped" in name or "goodput_step" in name]


def test_names_that_prometheus_does_not_allow(tmp_path: Path) -> None:
    sources = make_sources(tmp_path, 'a "run"\\ with\nlines \udcff')
    sources.metrics.latest = {
        'a"b/mlm/loss': 1.0, "eval/ü\n}{/R@1, %": 2.0, "x-y": 3.0, "x.y": 4.0, "": 5.0, "step": 6.0,
        "examples_total": 7.0, "run_info": 8.0, "\udcff{} 1\n#": 9.0,
    }  # fmt: skip
    port = find_free_port()
    server = MetricsServer(sources, "127.0.0.1", port)
    _, values = scrape(port)
    _, in_openmetrics = scrape(port, accept="application/openmetrics-text")
    server.close()
    assert in_openmetrics.keys() == values.keys()
    assert values["mplug2_run_info", 'a "run"\\ with\nlines ?', __version__] == 1
    assert values["mplug2_objective_loss", "mlm", 'a"b'] == 1
    assert values["mplug2_eval_R_1___", "ü\n}{"] == 2
    assert values["mplug2_x_y",] == 3  # the first of two names that become one
    assert values["mplug2_",] == 5
    assert (values["mplug2_step",], values["mplug2_examples_total",]) == (7, 56)
    assert values["mplug2_____1__",] == 9


def test_events_are_counted_over_restarts(tmp_path: Path) -> None:
    for _ in range(2):
        sources = make_sources(tmp_path)
        sources.events.log_event("resumed", 3)
        sources.events.close()
    (events,) = [metric for metric in sources.collect() if metric.name == "mplug2_events"]
    assert {sample.labels["event"]: sample.value for sample in events.samples}["resumed"] == 2


def test_nothing_else_is_served(port: int) -> None:
    for path in ("", "/metrics/", "/../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30)
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", b"data", timeout=30)


def test_a_client_that_says_nothing_delays_no_other(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)):
        assert scrape(port)[1]["mplug2_step",] == 7


def test_a_port_in_use_is_one_warning(port: int, sources: RunSources, caplog: pytest.LogCaptureFixture) -> None:
    second = MetricsServer(sources, "127.0.0.1", port)
    (warning,) = caplog.messages
    assert f"config.metrics_address=127.0.0.1, config.metrics_port={port} (Address already in use)" in warning
    second.close()
    assert scrape(port)[1]["mplug2_step",] == 7


def test_a_closed_port_is_free_again(sources: RunSources) -> None:
    port = find_free_port()
    for _ in range(2):
        server = MetricsServer(sources, "127.0.0.1", port)
        scrape(port)
        server.close()
        with pytest.raises(urllib.error.URLError, match="refused"):
            scrape(port)


def test_ports_and_addresses_are_checked() -> None:
    for port in (-1, 65536):
        with pytest.raises(UserError, match=f"config.metrics_port={port} must be between 0 and 65535"):
            text_run(metrics_port=port)
    with pytest.raises(
        UserError, match=r"config.metrics_address='localhost' is not an IP address: 127.0.0.1 serves this"
    ):
        text_run(metrics_address="localhost")
    assert RunConfig.metrics_port == 0


def test_the_server_keeps_no_process_alive(port: int) -> None:
    threads = [thread for thread in threading.enumerate() if thread.name == "prometheus"]
    assert threads
    assert all(thread.daemon for thread in threads)
