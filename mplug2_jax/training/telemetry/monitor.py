"""All that looks at a run while it goes on, opened and closed together."""

import collections
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax

from mplug2_jax.config import to_dict
from mplug2_jax.objectives.forward import Metrics
from mplug2_jax.parallel.processes import is_primary_process
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.reliability.faults import Rows, Watch
from mplug2_jax.training.state import RunSpec, TrainState
from mplug2_jax.training.step import Step, StreamBatches
from mplug2_jax.training.telemetry.events import Events
from mplug2_jax.training.telemetry.goodput import Ledger
from mplug2_jax.training.telemetry.metric_log import MetricsFile, Progress
from mplug2_jax.training.telemetry.profiling import Profiler
from mplug2_jax.training.telemetry.throughput import Meter
from mplug2_jax.training.telemetry.writers import WeightsAndBiases
from mplug2_jax.training.workdir import WorkDir


class Instruments:
    """Metrics, ledger, profiler, and the watch over steps that go wrong. Steps are handed in, and read when asked.

    All processes have them, and judge alike; the first writes. Only the rows of steps that go wrong are everyone's own.

    Args:
        plan: the run.
        workdir: where everything is written.
        position: where the run goes on.
        progress: talks to people.
        events: takes what happens.
        ledger: that runs since the run was started.
    """

    def __init__(
        self,
        spec: RunSpec,
        workdir: WorkDir,
        position: DataPosition,
        progress: Progress,
        events: Events,
        ledger: Ledger,
    ) -> None:
        config, first = spec.config, is_primary_process()
        self._progress, self._events, self.ledger = progress, events, ledger
        boards = (
            [WeightsAndBiases(workdir.path, config.wandb_project, to_dict(config))]
            if config.wandb_project and first
            else []
        )
        self.metrics = MetricsFile(
            workdir.path,
            position.step,
            watched=config.checkpoint.best_metric,
            boards=boards,
            say=progress.say,
            writes=first,
        )
        if first:
            ledger.open(workdir.ledger, self.metrics.reached)
        self._meter = Meter(spec, progress, self.metrics, ledger)
        self.watch = Watch(config.faults, workdir.faults_path(jax.process_index()), events, position.recent)
        self.profiler = Profiler(workdir.path, config.profile, events)
        self._unread: collections.deque[tuple[int, Metrics, Rows, Mapping[str, int]]] = collections.deque()
        self._compiled = False

    def compile(self, step: Step, number: int, state: TrainState, batches: StreamBatches) -> None:
        """Compiles the step before its first call, and writes down what that took and what the program needs."""
        if self._compiled:
            return
        self._compiled = True
        with self.ledger.during("compile"):
            self._progress.say("compiling the step ...")
            begun = time.perf_counter()
            traced = step.trace(state, batches)
            with ThreadPoolExecutor(1) as counting:  # XLA compiles without holding the interpreter's lock
                counted = counting.submit(self._meter.count, traced.jaxpr, batches)
                needs = step.compile(traced)
                counted.result()
            seconds = time.perf_counter() - begun
        said = f"compiled in {seconds:.1f} s"
        if step.cache_miss_reason is not None:
            said += (
                f" anew: {step.cache_miss_reason}"
                if step.cache_miss_reason
                else ", from the program that was compiled ahead"
            )
        if needs:
            total = needs["argument"] + needs["temp"] + needs["output"] - needs["alias"] + needs["generated_code"]
            said += f"; {total / 2**20:,.0f} MiB per device, {needs['temp'] / 2**20:,.0f} of them while a step runs"
        self._events.note("compiled", number, seconds=seconds, bytes=needs, said=said)

    def begun(self, number: int, metrics: Metrics, rows: Rows, lost: Mapping[str, int]) -> None:
        """Takes a step that was started: its metrics to be, its rows, and the records that its sources lacked."""
        self._unread.append((number, metrics, rows, lost))

    def read(self, behind: int) -> int | None:
        """Reads the metrics of the steps that were begun, but for the last few. Returns a step whose loss jumped.

        Raises:
            UserError: too many updates in a row were skipped.
        """
        while len(self._unread) > behind:
            number, metrics, rows, lost = self._unread.popleft()
            self._meter.finished(number, metrics, lost)
            if self.watch.spiked(number, metrics, rows):
                return number
        return None

    def saved(self, step: int, seconds: float) -> None:
        """Writes down how long a save kept the run waiting."""
        self.metrics.write(step, {"checkpoint/blocking_seconds": seconds})

    def rewind(self, step: int) -> None:
        """Forgets all that came after a step, to which the run goes back."""
        self._unread.clear()
        self.metrics.rewind(step)
        self.ledger.rolled_back()

    def close(self) -> None:
        """Writes what is left, and closes all files."""
        self.profiler.close()
        self.watch.close()
        self.metrics.close()
        self._events.close()
        self.ledger.close()
