"""Atomic outputs: written under a temporary name in the same folder, then renamed.

Those for an object store are written on this machine, then copied there; the files without which nothing finds the
others come last, so that a copy that was interrupted is not taken for whole.
"""

import errno
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.storage.paths import RemotePath, check_can_write, upload_folder
from mplug2_jax.errors import UserError

_LAST = ("*.safetensors", "*.safetensors.index.json", "commit_success.txt", "conversion-report.json")
"""Weights follow what describes them; then their index, what Orbax writes into a whole checkpoint, and the report."""


def check_not_existing(path: Path, *, overwrite: bool) -> None:
    """Raise UserError if something exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another path, or replace it with --overwrite")


def check_free_space(path: Path, needed: int) -> None:
    """Check that an output of some bytes can be written.

    Raises:
        UserError: the disk of its folder, or of the nearest existing parent, has less free space.
        DataError: it is in an object store that refuses to be written.
    """
    check_can_write(path)
    folder = Path(tempfile.gettempdir()) if isinstance(path, RemotePath) else path.parent.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        remedy = "free some space" + ", or set TMPDIR to another folder" * isinstance(path, RemotePath)
        raise UserError(
            f"the disk of {existing} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed; {remedy}"
        )


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder of this machine that becomes ``path`` on success, and is removed on failure.

    Raises:
        UserError: ``path`` exists, or the disk is full.
    """
    check_not_existing(path, overwrite=overwrite)
    if not isinstance(path, RemotePath):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _new_folder(path) as folder:
        yield folder
        if isinstance(path, RemotePath):
            path.rmtree(missing_ok=True)
            upload_folder(str(folder), path, _LAST)
        else:
            folder.chmod(0o755)
            _replace(folder, path)


@contextmanager
def atomic_files(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder whose files are moved to ``folder`` on success. Raises as :func:`atomic_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with _new_folder(folder / "files") as partial:
        yield partial
        files = sorted(partial.iterdir())
        for file in files:
            check_not_existing(folder / file.name, overwrite=overwrite)
        if isinstance(folder, RemotePath):
            for file in files:
                (folder / file.name).unlink(missing_ok=True)
            upload_folder(str(partial), folder, _LAST)
        else:
            for file in files:
                file.replace(folder / file.name)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to a path, or on the disk for temporary files; remove what is left of it."""
    parent = None if isinstance(path, RemotePath) else path.parent
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=parent))
    try:
        yield partial
    except Exception as error:
        if _is_disk_full(error):
            raise UserError(f"the disk of {partial.parent} is full, nothing was written; free some space") from error
        raise
    finally:
        _remove(partial)


def _remove(folder: Path, seconds: float = 5.0) -> None:
    """Remove a folder into which writes that were in flight when another one failed may still add files."""
    deadline = time.monotonic() + seconds
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.02)


def _replace(partial: Path, path: Path) -> None:
    """Rename a folder to ``path``; remove what was there only afterwards."""
    if not path.exists():
        partial.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old / path.name)
    partial.rename(path)
    shutil.rmtree(old)


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
