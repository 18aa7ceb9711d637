"""What finished steps say: losses, norms, rates, the share of time waiting for data, FLOP/s, MFU and memory."""

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mplug2_jax.parallel.accelerators import peak_flops
from mplug2_jax.training.state import RunSpec
from mplug2_jax.training.step import StreamBatches
from mplug2_jax.training.telemetry.goodput import Ledger
from mplug2_jax.training.telemetry.metric_log import MetricsFile, Progress
from mplug2_jax.training.telemetry.step_flops import flops_of_step, gradient_flops


class Meter:
    """Turns finished steps into lines and files. Times are the ledger's: saving and evaluating are no part of them."""

    def __init__(self, spec: RunSpec, progress: Progress, metrics_file: MetricsFile, ledger: Ledger) -> None:
        self._spec, self._progress, self._file, self._ledger = spec, progress, metrics_file, ledger
        self._flops = self._tokens = 0
        self._steps = 0
        self._counts: collections.Counter[str] = collections.Counter()
        each = peak_flops(spec.mesh.devices.flat[0].device_kind)
        self._peak = None if each is None else each * spec.mesh.size
        self._examples = sum(stream.data.batch_size for stream in spec.config.streams.values())
        self._read = ledger.read()

    def count(self, jaxpr: Any, batches: StreamBatches) -> None:
        """Count a step's operations from its trace (nothing runs), and the positions that the model reads."""
        spec = self._spec
        counted = flops_of_step(spec, jaxpr)
        if counted is None:
            counted = gradient_flops(spec, spec.config.streams, batches, remat=False)
        self._flops = counted.total()
        self._tokens = sum(positions(batch, spec.config.model.patch_size) for batch in batches.values())

    def finished(self, step: int, metrics: Mapping[str, jax.Array], lost: Mapping[str, int]) -> None:
        """Takes the metrics of a step, and how many records each source lacked; waits for it if it still runs."""
        loss = float(np.asarray(metrics["loss"]))
        self._steps += 1
        self._counts.update({f"data/skipped/{source}": count for source, count in lost.items()})
        self._counts.update({"skipped_updates": int(np.asarray(metrics["skipped"]))})
        config = self._spec.config
        if step % config.log_every and step != config.steps:
            return
        rates = self._rates()
        counts = {name: float(count) for name, count in self._counts.items() if count}
        self._counts.clear()
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items() if name != "skipped"}
        self._file.write(step, values | rates | memory() | counts)
        shown = {"examples/s": rates["examples_per_second"], "data wait": rates["data_wait"]}
        shown["GFLOP/s"] = rates["flops_per_second"] / 1e9
        if "mfu" in rates:
            shown["MFU"] = rates["mfu"]
        self._progress.show(step, loss, shown, rates["seconds_per_step"])

    def _rates(self) -> dict[str, float]:
        """Of the time in steps since the last reading."""
        now, before, steps = self._ledger.read(), self._read, self._steps
        self._read, self._steps = now, 0
        spent = {cause: now.get(cause, 0.0) - before.get(cause, 0.0) for cause in ("step", "restart", "data wait")}
        seconds = max(sum(spent.values()), 1e-9) / max(steps, 1)
        devices = self._spec.mesh.size
        rates = {
            "examples_per_second": self._examples / seconds,
            "examples_per_second_per_device": self._examples / seconds / devices,
            "tokens_per_second_per_device": self._tokens / seconds / devices,
            "data_wait": spent["data wait"] / max(sum(spent.values()), 1e-9),
            "seconds_per_step": seconds,
            "flops_per_second": self._flops / seconds,
        }
        return rates | ({"mfu": rates["flops_per_second"] / self._peak} if self._peak else {})


def positions(batch: Mapping[str, Any], patch_size: int) -> int:
    """Patches and text positions of a batch, padding included: what the towers compute on."""
    total = 0
    for name in ("text", "instruction", "target"):
        if name in batch:
            total += math.prod(batch[name].shape)
    if "frames" in batch:
        examples, frames, height, width, _ = batch["frames"].shape
        total += examples * frames * (height // patch_size) * (width // patch_size)
    return total


def memory() -> dict[str, float]:
    """Bytes in use and at most so far on this process's fullest device; empty where the backend does not say."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"bytes_in_use": "memory/bytes_in_use", "peak_bytes_in_use": "memory/peak_bytes"}
    return {ours: float(max(s[name] for s in stats)) for name, ours in names.items() if stats and name in stats[0]}
