"""Profiler traces for TensorBoard, of the steps that the config names or of the next steps on request."""

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

import jax
from absl import logging

from data_pipelines.errors import StorageUnavailableError
from data_pipelines.storage.paths import RemotePath, upload_folder
from data_pipelines.storage.retry import shorter_retries
from mplug2_jax.parallel.processes import is_primary_process
from mplug2_jax.training.config import ProfileConfig
from mplug2_jax.training.telemetry.events import EventLog

_POLL_SECONDS = 30.0


class Profiler:
    """Traces steps of a run into ``profiles/`` of its work directory, on process 0.

    A file named ``profile`` in the work directory (``touch profile``) starts a trace at the next step and is removed.
    """

    def __init__(self, workdir: Path, config: ProfileConfig, events: EventLog) -> None:
        self._folder, self._request = workdir / "profiles", workdir / "profile"
        self._config, self._events = config, events
        self._last_step: int | None = None  # of the trace that is being recorded
        self._next_poll = 0.0  # when a bucket is polled for a request, on the monotonic clock
        self._target: Path | None = None
        self._local: str | None = None  # where it is recorded, if not there

    def is_due(self, step: int) -> bool:
        """Return whether a step is traced, unless the trace is requested just now."""
        return self._last_step is not None or step in self._config.start_steps

    def before_step(self, step: int) -> None:
        """Start a trace if one is due; call it before the step is dispatched."""
        if (
            self._last_step is None
            and is_primary_process()
            and (step in self._config.start_steps or self._is_requested())
        ):
            self._target = self._folder / f"step-{step}"
            # The profiler writes to local disks only.
            self._local = tempfile.mkdtemp(prefix="trace-") if isinstance(self._target, RemotePath) else None
            jax.profiler.start_trace(self._local or str(self._target))
            self._last_step = step + self._config.num_steps - 1

    def _is_requested(self) -> bool:
        """Return whether there is a request, and remove it. A bucket is polled rarely and once: steps must not wait."""
        if not isinstance(self._request, RemotePath):
            is_requested = self._request.exists()
            self._request.unlink(missing_ok=True)
            return is_requested
        now = time.monotonic()
        if now < self._next_poll:
            return False
        self._next_poll = now + _POLL_SECONDS
        with contextlib.suppress(OSError, StorageUnavailableError), shorter_retries(0.0):
            self._request.unlink()
            return True
        return False

    def after_step(self, step: int, result: object) -> None:
        """End the trace if this is its last step; ``result``, the step's output, is waited for first."""
        if self._last_step is not None and step >= self._last_step:
            jax.block_until_ready(result)
            self.close()
            logging.info("profile up to step %d: %s", step, self._folder)
            self._events.log_event("profiled", step)

    def close(self) -> None:
        """End the trace that is being recorded, if any."""
        if self._last_step is not None:
            jax.profiler.stop_trace()
            self._last_step = None
            if self._local and self._target:
                upload_folder(self._local, self._target)
                shutil.rmtree(self._local)
