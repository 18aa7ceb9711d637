"""Which examples every step consumed, written down on request, to compare runs by."""

from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from mplug2_jax.parallel.placement import replicated_sharding
from mplug2_jax.parallel.processes import is_primary_process
from mplug2_jax.training.step import StreamBatches
from mplug2_jax.training.telemetry.metric_log import StepLines


class ExampleLog:
    """``examples.jsonl``: for each step and stream the example ids of the global batch, read back from the devices.

    Args:
        path: of the file; the first process writes it.
        start_step: lines of later steps are dropped, because those steps are done again.
        mesh: where the batches are.
        wanted: if not, nothing is gathered or written.
    """

    def __init__(self, path: Path, start_step: int, mesh: Mesh, *, wanted: bool) -> None:
        self._wanted = wanted
        self._lines = StepLines(path, start_step) if wanted and is_primary_process() else None
        self._gather = jax.jit(lambda ids: ids, out_shardings=replicated_sharding(mesh))

    def take(self, step: int, batches: StreamBatches) -> None:
        """Writes a step's line. All processes must call it."""
        if not self._wanted:
            return
        ids = {name: np.asarray(self._gather(batch["example_id"])).tolist() for name, batch in batches.items()}
        if self._lines:
            self._lines.write(step, ids)

    def rewind(self, step: int) -> None:
        """Drops the lines of later steps, which will be done again."""
        if self._lines:
            self._lines.rewind(step)

    def close(self) -> None:
        """Closes the file."""
        if self._lines:
            self._lines.close()
