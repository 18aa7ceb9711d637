"""Atomic outputs: written under a temporary name in the same folder, then renamed."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mplug2_jax.errors import UserError


def check_not_existing(path: Path, *, overwrite: bool) -> None:
    """Raise UserError if something exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another path, or replace it with --overwrite")


def check_disk_space(folder: Path, needed: int) -> None:
    """Raise UserError if the disk of a folder, or of its nearest existing parent, has less free space than needed."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"the disk of {existing} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed; free some "
            "space"
        )


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder that is renamed to ``path`` on success, and removed on failure.

    Raises:
        UserError: ``path`` exists, or the disk is full.
    """
    check_not_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        _replace(partial, path)
    except Exception as error:
        if _is_disk_full(error):
            raise UserError(f"the disk of {path.parent} is full, nothing was written; free some space") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_files(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder whose files are moved to ``folder`` on success. Raises as :func:`atomic_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder / f".{folder.name or 'files'}.new", overwrite=True) as partial:
        yield partial
        files = sorted(partial.iterdir())
        for file in files:
            check_not_existing(folder / file.name, overwrite=overwrite)
        for file in files:
            file.replace(folder / file.name)
    (folder / f".{folder.name or 'files'}.new").rmdir()


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
