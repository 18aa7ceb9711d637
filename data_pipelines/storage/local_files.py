"""Local files for libraries that cannot write elsewhere or must map memory, copied from or to their place."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import logging

from data_pipelines.errors import DataError
from data_pipelines.storage.file_system import FileSystem, file_system, version_of
from data_pipelines.storage.retry import is_remote

_BLOCK = 2**26
_THREADS = 8


def local_copy(path: str) -> str:
    """Return a path with the contents of a file: itself, or a copy of a remote one, made once for all processes.

    Copies are in ``$TMPDIR``. Those of older versions are deleted; who has them open keeps them.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read, or the copy not be written.
        DataError: the disk has too little space.
    """
    if not is_remote(path):
        os.stat(path)
        return path
    fs, fs_path = file_system(path)
    info = fs.info(fs_path)
    name, version = _digest(path), _digest(f"{info['size']} {version_of(info)}")
    folder = _cache_folder()
    copy = folder / f"{name}-{version}"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of this machine wait for one copy
        if not copy.exists():
            _copy(fs, fs_path, info, copy)
            for other in folder.glob(f"{name}-*"):
                if other != copy:
                    other.unlink(missing_ok=True)
    return str(copy)


def _cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"mplug2-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _copy(fs: FileSystem, path: str, info: Mapping[str, Any], target: Path) -> None:
    size = int(info["size"])
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise DataError(
            f"{fs.url(path)} has {size / 1e9:.1f} GB, and {target.parent} only {free / 1e9:.1f} GB free; set "
            "TMPDIR to a folder on a larger disk"
        )
    if size > _BLOCK:
        logging.info("copying %s (%.1f GB) to %s, once for this machine", fs.url(path), size / 1e9, target.parent)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}")  # also deleted later if this process is killed
    with temporary.open("wb") as file:

        def copy_block(start: int) -> None:
            data = fs.cat_file(path, start, min(start + _BLOCK, size), exact=True)
            os.pwrite(file.fileno(), data, start)

        try:
            os.truncate(file.fileno(), size)
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(copy_block, range(0, size, _BLOCK)))
            if version_of(fs.info(path)) != version_of(info):
                raise DataError(f"{fs.url(path)} was replaced while it was copied; start again")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_write(path: str) -> Iterator[str]:
    """Provide a path on this machine to write a file to, which becomes ``path`` unless an exception is raised.

    Raises:
        OSError: it cannot be written.
    """
    fs, fs_path = file_system(path)
    if fs.is_local:
        os.makedirs(os.path.dirname(fs_path), exist_ok=True)
        temporary = f"{fs_path}.{uuid.uuid4().hex}.tmp"
    else:
        descriptor, temporary = tempfile.mkstemp(prefix="mplug2-upload-")
        os.close(descriptor)
    try:
        yield temporary
        if fs.is_local:
            os.replace(temporary, fs_path)
        else:
            fs.upload(temporary, fs_path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
