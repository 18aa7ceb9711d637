"""Outputs that appear whole or not at all: made beside their place under another name, then moved there."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mplug2_jax.errors import UserError


def check_not_existing(path: Path, *, overwrite: bool) -> None:
    """Raises UserError if something is there and may not be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another place, or replace it with --overwrite")


def check_disk_space(folder: Path, needed: int) -> None:
    """Raises UserError if the disk of a folder (or of its nearest parent that is there) has less room than needed."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"no space: this needs {needed / 1e9:.1f} GB, and the disk of {existing} has {free / 1e9:.1f} GB free"
        )


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder for what will stand at ``path``: moved there when all went well, else removed.

    Raises:
        UserError: something is at ``path`` already, or the disk is full.
    """
    check_not_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        _replace(partial, path)
    except Exception as error:
        if _is_full(error):
            raise UserError(f"the disk of {path.parent} is full: nothing was written; free some") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_files(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder for files that will stand in ``folder`` among others. Raises as :func:`staged`."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder / f".{folder.name or 'files'}.new", overwrite=True) as partial:
        yield partial
        made = sorted(partial.iterdir())
        for file in made:
            check_not_existing(folder / file.name, overwrite=overwrite)
        for file in made:
            file.replace(folder / file.name)
    (folder / f".{folder.name or 'files'}.new").rmdir()


def _replace(partial: Path, path: Path) -> None:
    """Moves a folder to its place; what was there before is only removed once the new one stands."""
    if not path.exists():
        partial.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    path.rename(old / path.name)
    partial.rename(path)
    shutil.rmtree(old)


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
