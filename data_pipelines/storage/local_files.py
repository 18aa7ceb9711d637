"""Local files for libraries that cannot write elsewhere, copied to their place when they are complete."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator

from data_pipelines.storage.file_system import file_system


@contextlib.contextmanager
def write_locally(path: str) -> Iterator[str]:
    """Provide a path on this machine to write a file to, which becomes ``path`` unless an exception is raised.

    Raises:
        OSError: it cannot be written.
    """
    system, plain = file_system(path)
    if system.is_local:
        os.makedirs(os.path.dirname(plain), exist_ok=True)
        temporary = f"{plain}.{uuid.uuid4().hex}.tmp"
    else:
        descriptor, temporary = tempfile.mkstemp(prefix="mplug2-upload-")
        os.close(descriptor)
    try:
        yield temporary
        if system.is_local:
            os.replace(temporary, plain)
        else:
            system.upload(temporary, plain)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
