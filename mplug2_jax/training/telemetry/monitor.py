"""Everything that observes a run, opened and closed together."""

import collections
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import jax
from absl import logging

from mplug2_jax.config import to_dict
from mplug2_jax.objectives.forward import Metrics
from mplug2_jax.parallel.processes import is_primary_process
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.reliability.faults import FaultDetector, LocalRows
from mplug2_jax.training.state import RunSpec, TrainState
from mplug2_jax.training.step import BatchSizes, StreamBatches, TrainStep, batch_sizes
from mplug2_jax.training.telemetry.events import EventLog
from mplug2_jax.training.telemetry.goodput import GoodputTracker
from mplug2_jax.training.telemetry.host_monitor import HostMonitor
from mplug2_jax.training.telemetry.metric_log import MetricLog
from mplug2_jax.training.telemetry.profiling import Profiler
from mplug2_jax.training.telemetry.throughput import ThroughputMeter
from mplug2_jax.training.telemetry.writers import WandbWriter
from mplug2_jax.training.workdir import WorkDir

if TYPE_CHECKING:
    from mplug2_jax.training.telemetry.prometheus import MetricsServer

_MIN_LOGGED_SECONDS = 0.1


class TrainMonitor:
    """Metrics, goodput, profiler and fault detector. Steps are handed in when dispatched, and read once finished.

    All processes have one and take the same decisions; process 0 writes. Only the rows of faulty steps differ between
    processes.

    Args:
        spec: the run.
        workdir: of the run.
        position: where the run resumes.
        events: receives what happens.
        goodput: the tracker, which runs since the process was started.
    """

    def __init__(
        self, spec: RunSpec, workdir: WorkDir, position: DataPosition, events: EventLog, goodput: GoodputTracker
    ) -> None:
        config, primary = spec.config, is_primary_process()
        self._events, self.goodput = events, goodput
        writers = []
        if config.wandb_project and primary:
            writers.append(WandbWriter(workdir.path, config.wandb_project, to_dict(config)))
        self.metrics = MetricLog(
            workdir.path, position.step, best_metric=config.checkpoint.best_metric, writers=writers, is_writer=primary
        )
        if primary:
            goodput.open(workdir.goodput, self.metrics.last_step)
        self.hosts = HostMonitor(workdir.hosts, position.step, events)
        self._meter = ThroughputMeter(spec, position.step, self.metrics, goodput, self.hosts)
        self.faults = FaultDetector(config.faults, workdir.faults_path(jax.process_index()), events, position.recent)
        self.profiler = Profiler(workdir.path, config.profile, events)
        self._pending: collections.deque[tuple[int, Metrics, BatchSizes, LocalRows, Mapping[str, int]]]
        self._pending = collections.deque()
        self._server = self._serve_metrics(config) if config.metrics_port and primary else None

    def _serve_metrics(self, config: RunConfig) -> "MetricsServer":
        from mplug2_jax.training.telemetry.prometheus import MetricsServer, RunSources

        sources = RunSources(config.name, self._meter, self.goodput, self._events, self.hosts, self.metrics)
        return MetricsServer(sources, config.metrics_address, config.metrics_port)

    def compile(self, train_step: TrainStep, step: int, state: TrainState, batches: StreamBatches) -> None:
        """Compile the step function before its first call with batches of a size; log the time and memory it needs."""
        sizes = dict(batch_sizes(batches))
        with self.goodput.track("compile"):
            examples = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            logging.info("step %d: compiling the train step for batches of %s examples", step, examples)
            start = time.perf_counter()
            traced = train_step.trace(state, batches)
            with ThreadPoolExecutor(1) as executor:  # XLA compiles without the GIL
                counting = executor.submit(self._meter.count_step, traced.jaxpr, batches)
                memory = train_step.compile(traced, batches)
                counting.result()
            seconds = time.perf_counter() - start
        message = f"compiled in {seconds:.1f} s"
        if train_step.cache_miss_reason is not None:
            reason = train_step.cache_miss_reason
            message += f"; the AOT program was not used: {reason}" if reason else ", loaded from the AOT program"
        if memory:
            temp = memory["temp"]
            total = memory["argument"] + temp + memory["output"] - memory["alias"] + memory["generated_code"]
            message += f"; {total / 2**20:,.0f} MiB per device, {temp / 2**20:,.0f} MiB of them temporary"
        logging.info("%s", message)
        self._events.log_event("compiled", step, seconds=seconds, bytes=memory, batch_sizes=sizes)

    def log_startup(self, step: int, seconds: Mapping[str, float]) -> None:
        """Log what the time from the start of the process to the end of its first step went into."""
        parts = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items() if value >= _MIN_LOGGED_SECONDS)
        logging.info("step %d done %.1f s after the start of the process: %s", step, sum(seconds.values()), parts)
        rounded = {phase: round(value, 3) for phase, value in seconds.items()}
        self._events.log_event("started", step, seconds=rounded)

    def on_step_dispatched(
        self,
        step: int,
        metrics: Metrics,
        sizes: BatchSizes,
        rows: LocalRows,
        num_skipped_records: Mapping[str, int],
    ) -> None:
        """Take a dispatched step: future metrics, batch sizes, rows, and the number of unusable records by source."""
        self._pending.append((step, metrics, sizes, rows, num_skipped_records))

    def drain(self, *, max_pending: int) -> int | None:
        """Read the metrics of dispatched steps until at most ``max_pending`` are left.

        Returns:
            The step whose loss spiked, after which the run should roll back; None if there is none.

        Raises:
            UserError: too many updates in a row were skipped.
        """
        while len(self._pending) > max_pending:
            step, metrics, sizes, rows, num_skipped_records = self._pending.popleft()
            self._meter.record_step(step, metrics, sizes, num_skipped_records)
            if self.faults.observe(step, metrics, rows):
                return step
        return None

    def rewind(self, step: int) -> None:
        """Forget everything after a step, to which the run rolls back."""
        self._pending.clear()
        self.metrics.rewind(step)
        self.hosts.rewind(step)
        self.goodput.roll_back()

    def close(self) -> None:
        """Write what is pending, and close all files."""
        if self._server:
            self._server.close()
        self.profiler.close()
        self._meter.close()
        self.faults.close()
        self.metrics.close()
        self.hosts.close()
        self._events.close()
        self.goodput.close()
