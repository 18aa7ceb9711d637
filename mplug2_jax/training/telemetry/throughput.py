"""Metrics of finished steps: losses, norms, throughput, share of time waiting for data, FLOP/s, MFU and memory."""

import collections
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from mplug2_jax.console import Progress
from mplug2_jax.parallel.accelerators import peak_flops
from mplug2_jax.training.state import RunSpec
from mplug2_jax.training.step import BatchSizes, StreamBatches, batch_sizes
from mplug2_jax.training.telemetry.goodput import GoodputTracker, Phase
from mplug2_jax.training.telemetry.host_monitor import HostMonitor
from mplug2_jax.training.telemetry.metric_log import MetricLog
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops, count_traced_step_flops


class StepWork(NamedTuple):
    """The examples, the tokens and the floating-point operations of one step."""

    examples: int = 0
    tokens: int = 0
    flops: int = 0


class ThroughputMeter:
    """Writes the metrics of finished steps and shows progress.

    Times are the goodput tracker's, so saving and evaluating do not count. ``step`` is the last finished step,
    ``step_time`` when it finished in Unix seconds (0 before the first), ``num_examples`` the examples of all steps
    that this process finished, and ``num_skipped_records`` what it could not use, by source.

    Args:
        spec: the run.
        start_step: the step that the run resumes from.
        metric_log: receives the metrics.
        goodput: the tracker of the run.
        hosts: compares this process with the others.
    """

    def __init__(
        self, spec: RunSpec, start_step: int, metric_log: MetricLog, goodput: GoodputTracker, hosts: HostMonitor
    ) -> None:
        self._spec, self._metric_log, self._goodput, self._hosts = spec, metric_log, goodput, hosts
        self._progress = Progress(spec.config.steps, "step", initial=start_step, log_every=0)
        self._work: dict[BatchSizes, StepWork] = {}
        self._done: list[StepWork] = []  # since the last measurement
        self._counts: collections.Counter[str] = collections.Counter()
        self.step, self.step_time, self.num_examples = start_step, 0.0, 0
        self.num_skipped_records: collections.Counter[str] = collections.Counter()
        device_peak = peak_flops(spec.mesh.devices.flat[0].device_kind)
        self._peak = None if device_peak is None else device_peak * spec.mesh.size
        self._seconds = goodput.read()

    def count_step(self, jaxpr: Any, batches: StreamBatches) -> None:
        """Count the operations of a step from its trace (nothing runs), and the tokens of its batches."""
        spec = self._spec
        flops = count_traced_step_flops(spec, jaxpr)
        if flops is None:
            flops = count_gradient_flops(spec, spec.config.streams, batches, remat=False)
        tokens = sum(count_tokens(batch, spec.config.model.patch_size) for batch in batches.values())
        sizes = batch_sizes(batches)
        self._work[sizes] = StepWork(sum(size for _, size in sizes), tokens, flops.total())

    def record_step(
        self, step: int, metrics: Mapping[str, jax.Array], sizes: BatchSizes, num_skipped_records: Mapping[str, int]
    ) -> None:
        """Record the metrics of a step; blocks until the step has finished.

        Args:
            step: its number.
            metrics: of the step.
            sizes: of its batches, for which :meth:`count_step` was called.
            num_skipped_records: records that could not be used, by source.
        """
        with self._hosts.waiting():
            loss = float(np.asarray(metrics["loss"]))
        work = self._work.get(sizes, StepWork())
        self._done.append(work)
        self.step, self.step_time = step, time.time()
        self.num_examples += work.examples
        self.num_skipped_records.update(num_skipped_records)
        self._counts.update({f"data/skipped/{source}": count for source, count in num_skipped_records.items()})
        self._counts.update({"skipped_updates": int(np.asarray(metrics["skipped"]))})
        config = self._spec.config
        if step % config.log_every and step != config.steps:
            return
        rates = self._measure_rates(step)
        counts = {name: float(count) for name, count in self._counts.items() if count}
        self._counts.clear()
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items() if name != "skipped"}
        self._metric_log.write(step, values | rates | device_memory() | counts)
        stats = f"loss {loss:.4f}  {rates['examples_per_second']:,.1f} examples/s  data wait {rates['data_wait']:.1%}"
        stats += f"  {rates['flops_per_second'] / 1e9:,.1f} GFLOP/s"
        if "mfu" in rates:
            stats += f"  MFU {rates['mfu']:.1%}"
        if self._hosts.slow_host:
            stats += f"  slowest: {self._hosts.slow_host}"
        self._progress.update(step, stats, seconds_per_unit=rates["seconds_per_step"])

    def close(self) -> None:
        """Remove the progress bar."""
        self._progress.close()

    def _measure_rates(self, step: int) -> dict[str, float]:
        """Return the rates over the steps since the last measurement, and what the hosts measured."""
        seconds, before, done = self._goodput.read(), self._seconds, self._done
        self._seconds, self._done = seconds, []
        examples, tokens, flops = (sum(amounts) for amounts in zip(*done, strict=True))
        spent = {phase: seconds.get(phase, 0.0) - before.get(phase, 0.0) for phase in get_args(Phase)}
        total = max(spent["step"] + spent["restart"] + spent["data_wait"], 1e-9)
        wall = max(sum(spent.values()), 1e-9)
        devices = self._spec.mesh.size
        rates = {
            "examples_per_second": examples / total,
            "examples_per_second_per_device": examples / total / devices,
            "tokens_per_second_per_device": tokens / total / devices,
            "data_wait": spent["data_wait"] / total,
            "seconds_per_step": total / len(done),
            "flops_per_second": flops / total,
        }
        rates |= {f"goodput/{phase}": value / wall for phase, value in spent.items() if phase != "idle"}
        rates |= {"mfu": rates["flops_per_second"] / self._peak} if self._peak else {}
        return rates | self._hosts.record(step, spent["data_wait"], spent["step"] + spent["restart"])


def count_tokens(batch: Mapping[str, Any], patch_size: int) -> int:
    """Return the number of patches and text tokens of a batch, padding included: what the towers compute on."""
    total = sum(math.prod(batch[name].shape) for name in ("text", "instruction", "target") if name in batch)
    if "frames" in batch:
        examples, frames, height, width, _ = batch["frames"].shape
        total += examples * frames * (height // patch_size) * (width // patch_size)
    return total


def device_memory() -> dict[str, float]:
    """Return the bytes in use and their peak on the fullest local device; empty if the backend reports none."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"bytes_in_use": "memory/bytes_in_use", "peak_bytes_in_use": "memory/peak_bytes"}
    return {name: float(max(s[key] for s in stats)) for key, name in names.items() if stats and key in stats[0]}
