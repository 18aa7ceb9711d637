"""A probe of storage: a few bytes are written, read and deleted before a run spends its first step."""

from pathlib import Path

import tensorstore

from data_pipelines.errors import StorageUnavailableError
from data_pipelines.storage.paths import RemotePath
from data_pipelines.storage.retry import is_transient
from mplug2_jax.errors import UserError

_DATA = b"mplug2"


def probe_storage(folder: Path, name: str) -> None:
    """Write, read and delete a file by the library that writes the arrays of checkpoints.

    Args:
        folder: that exists, or is in an object store.
        name: of the file; no other process uses it.

    Raises:
        StorageUnavailableError: storage does not answer.
        UserError: it refuses, or returns other bytes.
    """
    spec = {"driver": "file", "path": f"{folder.absolute()}/"}
    if isinstance(folder, RemotePath):
        scheme, _, location = str(folder).partition("://")
        bucket, _, path = location.partition("/")
        spec = {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{path}/" if path else ""}
    try:
        store = tensorstore.KvStore.open(spec).result()
        store.write(name, _DATA).result()
        read_back = store.read(name).result().value
        store.write(name, None).result()
    except Exception as error:  # without types of its own
        reason = str(error).split("\n")[0].partition(" [")[0][:160]
        if is_transient(error):
            raise StorageUnavailableError(f"{folder} cannot be written now ({reason}); start again later") from error
        raise UserError(f"--workdir {folder} cannot be written ({reason}); choose another") from error
    if read_back != _DATA:
        raise UserError(f"--workdir {folder} returns other bytes than were written; choose another")
