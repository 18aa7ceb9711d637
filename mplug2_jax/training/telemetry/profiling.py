"""Traces for TensorBoard's profiler, of steps that the config names or from when somebody asks."""

from pathlib import Path

import jax

from mplug2_jax.parallel.processes import is_primary_process
from mplug2_jax.training.config import ProfileConfig
from mplug2_jax.training.telemetry.events import Events


class Profiler:
    """Traces steps of a run into ``profiles/`` of its work directory, on the first process.

    A file named ``profile`` there, as ``touch`` makes it, starts a trace with the next step and is taken away.
    """

    def __init__(self, workdir: Path, config: ProfileConfig, events: Events) -> None:
        self._folder, self._asked = workdir / "profiles", workdir / "profile"
        self._config, self._events = config, events
        self._until: int | None = None  # the last step of the trace that runs

    def before(self, step: int) -> None:
        """Call before a step is started."""
        if self._until is None and is_primary_process() and (step in self._config.start_steps or self._asked.exists()):
            self._asked.unlink(missing_ok=True)
            jax.profiler.start_trace(str(self._folder / f"step-{step}"))
            self._until = step + self._config.num_steps - 1

    def after(self, step: int, result: object) -> None:
        """Call with what a step gave; the last step of a trace is waited for."""
        if self._until is not None and step >= self._until:
            jax.block_until_ready(result)
            self.close()
            self._events.note("profiled", step, said=f"profile up to step {step} is in {self._folder}")

    def close(self) -> None:
        """Ends a trace that runs."""
        if self._until is not None:
            jax.profiler.stop_trace()
            self._until = None
