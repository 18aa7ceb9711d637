"""Metric writers: TensorBoard always, Weights & Biases if the config enables it."""

import contextlib
import importlib
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.storage.object_log import ObjectLog
from data_pipelines.storage.paths import RemotePath
from mplug2_jax.errors import UserError


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


class TensorBoardWriter:
    """Event files, written by the calling thread: tensorboardX's own thread dies of a full disk and blocks the run.

    Args:
        folder: of the files.
        start_step: the step that the run resumes from; TensorBoard hides later steps of earlier files.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
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
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

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

    Raises:
        UserError: the package is not installed.
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
            project=project,
            name=name,
            id=name,
            resume="allow",
            config=dict(config),
            dir=tempfile.mkdtemp(prefix="wandb-") if isinstance(workdir, RemotePath) else str(workdir),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


MetricWriter = TensorBoardWriter | WandbWriter
