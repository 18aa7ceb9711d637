"""Where metrics are drawn while a run goes on: TensorBoard always, Weights & Biases where it is asked for."""

import contextlib
import importlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mplug2_jax.errors import UserError


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Importing a module that was not imported yet fails here, as if it were not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


with _without("torch"):  # which tensorboardX imports where it can: two seconds of every run, for nothing that is used
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary


@runtime_checkable
class Board(Protocol):
    """Takes the metrics of steps."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one step."""

    def close(self) -> None:
        """Ends it."""


class TensorBoard:
    """Event files, written by the caller: tensorboardX's own thread dies of a full disk and then blocks the run.

    Args:
        folder: where they are.
        start_step: what earlier files say of later steps is hidden.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._add(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One event; a full disk loses it."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        with contextlib.suppress(OSError):  # metrics.jsonl has the same, and says so
            self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which goes on where the work directory's last one ended.

    Raises:
        UserError: it is not installed.
    """

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                f"config.wandb_project={project!r} needs the package wandb, which is not installed: pip install wandb, "
                "or leave the field empty"
            ) from error
        name = workdir.resolve().name
        self._run = wandb.init(
            project=project, name=name, id=name, resume="allow", dir=str(workdir), config=dict(config)
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
