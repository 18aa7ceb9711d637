"""The example ids of every step, recorded on request, to compare runs."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from mplug2_jax.parallel.placement import replicated_sharding
from mplug2_jax.parallel.processes import is_primary_process
from mplug2_jax.training.step import StreamBatches
from mplug2_jax.training.telemetry.metric_log import StepJsonl


class ExampleIdLog:
    """``examples.jsonl``: for each step and stream the example ids of the global batch, read back from the devices.

    Args:
        path: of the file, which process 0 writes.
        start_step: the step that the run resumes from; lines of later steps are dropped.
        mesh: of the batches.
        enabled: if False, nothing is gathered or written.
    """

    def __init__(self, path: Path, start_step: int, mesh: Mesh, *, enabled: bool) -> None:
        self._enabled = enabled
        self._lines = StepJsonl(path, start_step) if enabled and is_primary_process() else None
        self._all_gather = jax.jit(lambda ids: ids, out_shardings=replicated_sharding(mesh))

    def write(self, step: int, batches: StreamBatches) -> None:
        """Write the ids of a step. All processes must call it."""
        if not self._enabled:
            return
        ids = {name: np.asarray(self._all_gather(batch["example_id"])).tolist() for name, batch in batches.items()}
        if self._lines:
            self._lines.write(step, ids)

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, which will be repeated."""
        if self._lines:
            self._lines.rewind(step)

    def close(self) -> None:
        """Close the file."""
        if self._lines:
            self._lines.close()
