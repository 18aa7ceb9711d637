"""Metric writers: TensorBoard always, Weights & Biases if the config enables it."""

import contextlib
import importlib
import os
import queue
import secrets
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from data_pipelines.storage.file_system import write_atomically
from data_pipelines.storage.object_log import ObjectLog
from data_pipelines.storage.paths import RemotePath
from mplug2_jax.errors import UserError
from mplug2_jax.training.telemetry.charts import Charts, make_charts


@contextlib.contextmanager
def _import_blocked(*names: str) -> Iterator[None]:
    """Make imports of modules fail inside this context, unless they are imported already."""
    blocked = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in blocked:
            del sys.modules[name]


# tensorboardX imports both if it can: more than two seconds of every run, and nothing here needs them.
with _import_blocked("torch", "google.cloud.storage"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c
    from tensorboardX.summary import custom_scalars


_MAX_WAITING_LINES = 10_000
_CLOSE_SECONDS = 60.0
_RETRY_SECONDS = 600.0
_WANDB_ENVIRONMENT = {
    "WANDB_CONSOLE": "off",  # otherwise every line that is printed goes through its service
    "WANDB_FINISH_TIMEOUT": f"{_CLOSE_SECONDS:g}",  # otherwise Python's exit waits until everything is uploaded
    "WANDB_LOGIN_TIMEOUT": f"{_CLOSE_SECONDS:g}",  # of the question for a key, on a terminal
}
"""Settings for those that the user does not make."""


class TensorBoardWriter:
    """Event files, written by the calling thread: tensorboardX's own thread dies of a full disk and blocks the run.

    Args:
        folder: of the files.
        start_step: the step that the run resumes from; TensorBoard hides later steps of earlier files.
        tags: of the metrics that earlier files have.
    """

    def __init__(self, folder: Path, start_step: int, tags: Iterable[str] = ()) -> None:
        self._tags = dict.fromkeys(tags)
        self._charts: Charts = {}
        self._objects: ObjectLog | None = None
        self._writer: Any = None
        if isinstance(folder, RemotePath):
            prefix = f"events.out.tfevents.{int(time.time()):010}."
            header = _encode_record(Event(wall_time=time.time(), file_version="brain.Event:2"))
            self._objects = ObjectLog(folder, prefix=prefix, header=header)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
        self._add(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one event; a full disk loses it."""
        if not metrics.keys() <= self._tags.keys() or not self._charts:
            self._write_charts(step, metrics)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

    def _write_charts(self, step: int, tags: Iterable[str]) -> None:
        """Write which metrics belong together, again if new ones do; TensorBoard uses the last charts of a run."""
        self._tags |= dict.fromkeys(tags)
        charts = make_charts(self._tags)
        if charts != self._charts:
            self._charts = charts
            self._add(Event(step=step, summary=custom_scalars(charts)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        if self._objects is not None:
            self._objects.append(_encode_record(event))
            return
        with contextlib.suppress(OSError):  # metrics.jsonl has the same values, and its writer logs the failure
            self._writer.write_event(event)
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._objects is not None:
            self._objects.close()
            return
        with contextlib.suppress(OSError):
            self._writer.close()


def _encode_record(event: Any) -> bytes:
    """Return an event as a record of an event file (TensorFlow's TFRecord)."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join([length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))])


class WandbWriter:
    """A run of Weights & Biases, which continues the previous one of the same work directory.

    A thread of its own speaks to the service, so that no error or delay of the network reaches the training run. After
    an error it tries again every ten minutes; up to 10,000 lines wait.

    Args:
        workdir: of the run; ``wandb-id.txt`` there holds the id, so that no two work directories share one.
        project: that receives the metrics.
        config: to show there.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]) -> None:
        for name, value in _WANDB_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                f"config.wandb_project={project!r} needs the package wandb, which is not installed: pip install wandb, "
                "or leave the field empty"
            ) from error
        id_file = workdir / "wandb-id.txt"
        if not id_file.exists():
            write_atomically(str(id_file), secrets.token_hex(8).encode())
        folder = tempfile.mkdtemp(prefix="wandb-") if isinstance(workdir, RemotePath) else str(workdir)
        run = {"id": id_file.read_text(encoding="utf-8"), "name": workdir.resolve().name, "resume": "allow"}
        self._closed = threading.Event()
        self._lines: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_MAX_WAITING_LINES)
        arguments = {"project": project, "config": dict(config), "dir": folder, **run}
        self._thread = threading.Thread(target=self._serve, args=(wandb, arguments), name="wandb", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over the metrics of one step; they are dropped if the service is too slow for too long."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait((step, dict(metrics)))

    def close(self) -> None:
        """Finish the run; wait at most a minute for the service."""
        self._closed.set()
        if self._lines.full():
            with contextlib.suppress(queue.Empty):
                self._lines.get_nowait()
        self._lines.put_nowait(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logging.warning("Weights & Biases did not answer for %g s: it may lack the last metrics", _CLOSE_SECONDS)

    def _serve(self, wandb: Any, arguments: Mapping[str, Any]) -> None:
        reason = ""
        while True:
            try:
                run = wandb.init(**arguments)
                while (line := self._lines.get()) is not None:
                    step, metrics = line
                    run.log(metrics, step=step)
                run.finish()
                return
            except Exception as error:  # the package raises errors of its own, of requests, and of its service process
                if reason != (reason := str(error)):
                    logging.warning("Weights & Biases gets no metrics now (%s); metrics.jsonl has them", reason)
            with contextlib.suppress(Exception):
                wandb.teardown()  # its service process holds the id of the run that failed
            if self._closed.wait(_RETRY_SECONDS):
                return


MetricWriter = TensorBoardWriter | WandbWriter
