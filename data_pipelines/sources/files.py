"""Finding and reading files, local or behind a URL, through fsspec; and names that may not leave their folder."""

import codecs
import contextlib
import io
import os
import re
import uuid
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

import fsspec

from data_pipelines.errors import DataError
from data_pipelines.media import IMAGE_SUFFIXES, Media

VIDEO_SUFFIXES = frozenset({".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
MAX_FILES = 1_000_000

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_url(path: str) -> bool:
    """Whether a path names a file system other than this machine's."""
    return "://" in path


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path as it names files there.

    Raises:
        DataError: a protocol that nothing installed here speaks.
    """
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"{path} cannot be opened: {error}") from error


def find_files(path: str, *suffixes: str) -> list[str]:
    """All files that a path stands for, in order: one file, a folder, a pattern with ``*``, or ``{000..127}``.

    Raises:
        DataError: there is none, or a file that should be there is not.
    """
    system, plain = file_system(path)
    names = _expand(plain)
    if len(names) == 1 and "*" not in plain:
        if system.isdir(plain):
            listed = system.find(plain, maxdepth=1)
            names = sorted(name for name in listed if name.lower().endswith(suffixes))
            if not names:
                raise DataError(
                    f"{path} holds no file that ends in {' or '.join(suffixes)}; found {len(listed)} others"
                )
    elif "*" in plain:
        names = sorted(name for each in names for name in system.glob(each) if system.isfile(name))
        if not names:
            raise DataError(f"{path} matches no file; check the pattern")
    if missing := next((name for name in names if not system.exists(name)), None):
        raise DataError(f"{missing} does not exist; check the path")
    return [system.unstrip_protocol(name) if is_url(path) else name for name in names]


def _expand(pattern: str) -> list[str]:
    """The names that numbers in braces stand for: shard-{000..127}.tar."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(last) - int(first) >= MAX_FILES:
        raise DataError(f"{pattern} stands for more than {MAX_FILES:,} files; split it")
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in _expand(pattern[: match.start()] + n + pattern[match.end() :])]


def stamp(path: str) -> list[Any]:
    """What changes when a file changes: its size, and its time or tag."""
    system, plain = file_system(path)
    try:
        info = system.info(plain)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    changed = next((info[key] for key in ("mtime", "ETag", "etag", "updated", "LastModified") if info.get(key)), "")
    return [int(info["size"]), str(changed)]


def read_bytes(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """A file's bytes, or a part of them.

    Raises:
        DataError: the file is missing or unreadable, or ends before the part does.
    """
    try:
        if is_url(path):
            system, plain = file_system(path)
            data: bytes = system.cat_file(plain, offset or None, None if size is None else offset + size)
        else:
            data = _read_local(path, offset, size)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if size is not None and len(data) != size:
        raise DataError(
            f"{path} ends at byte {offset + len(data):,}, expected {offset + size:,}; it was cut or replaced"
        )
    return data


def _read_local(path: str, offset: int, size: int | None) -> bytes:
    """Without fsspec's layers and without a buffer, as this is done several times for every record."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        left = os.fstat(descriptor).st_size - offset if size is None else size
        parts = []
        while left > 0 and (part := os.pread(descriptor, left, offset)):
            parts.append(part)
            offset, left = offset + len(part), left - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def read_text(path: str) -> io.StringIO:
    """A whole text file, ready to be read line by line.

    Raises:
        DataError: missing, unreadable, or not UTF-8 (with the line).
    """
    data = read_bytes(path)
    try:
        encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        return io.StringIO(data.decode(encoding), newline="")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} is not UTF-8 text: {error.reason} in line {line}; convert it") from error


def write_atomically(path: str, data: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, and never a part; writers may be several."""
    system, plain = file_system(path)
    temporary = f"{plain}.{uuid.uuid4().hex}.tmp"
    try:
        system.pipe_file(temporary, data)
        system.mv(temporary, plain)
    except BaseException:
        with contextlib.suppress(OSError):
            system.rm_file(temporary)
        raise


def inside(folder: str, name: str) -> str:
    """The path of a file that data name, which may not leave its folder.

    Backslashes are those of Windows, and divide folders.

    Raises:
        DataError: an absolute name, one with ``..``, a URL, or one that no file can have.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    absolute = path.is_absolute() or PureWindowsPath(name).is_absolute()
    if not name or absolute or ".." in path.parts or is_url(name) or "\0" in name:
        raise DataError(f"the file name {name!a} is empty or leads out of {folder}; expected a name inside that folder")
    return f"{folder.rstrip('/')}/{path}"


def media_kind(name: str) -> Literal["image", "video"] | None:
    """What a file is by its name: "image", "video" or neither (None)."""
    suffix = PurePosixPath(name).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def media_file(folder: str, name: str) -> Media:
    """A picture or clip that data name, inside its folder. Nothing is opened.

    Raises:
        DataError: a name that leads out of the folder, or is no picture's or clip's.
    """
    path, kind = inside(folder, name), media_kind(name)
    if kind is None:
        raise DataError(f"{path} is neither a picture nor a clip by its name")
    return Media(kind, path, path)
