"""Finding and reading files, local or behind a URL, through fsspec; and names that may not leave their folder."""

import contextlib
import io
import os
import re
import uuid
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

import fsspec

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import HEAD, IMAGE_SUFFIXES, VIDEO_SUFFIXES, Media, is_animation

MAX_FILES = 1_000_000

ANIMATED_SUFFIXES = frozenset({".apng", ".avif", ".gif", ".png", ".webp"})
"""Of files that may hold one frame or several."""

_OF_SYSTEMS = frozenset({"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"})
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

    Hidden ones in folders are left out.

    Raises:
        DataError: there is none, or a file that should be there is not.
    """
    system, plain = file_system(path)
    names = _expand(plain)
    if len(names) == 1 and "*" not in plain:
        if system.isdir(plain):
            listed = [name for name in system.find(plain, maxdepth=1) if not is_hidden(name.rpartition("/")[2])]
            names = sorted(name for name in listed if name.lower().endswith(suffixes))
            if not names:
                raise DataError(
                    f"{path} holds no file that ends in {' or '.join(suffixes)}; found {len(listed)} others"
                )
    elif "*" in plain:
        found = {name for each in names for name in system.glob(each) if not is_hidden(name.rpartition("/")[2])}
        names = sorted(filter(system.isfile, found))
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


def read_bytes(path: str, offset: int = 0, size: int | None = None, *, whole: bool = True) -> bytes:
    """A file's bytes, or a part of them; unless it must be there as a whole, as much of it as there is.

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
    if whole and size is not None and len(data) != size:
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
    return io.StringIO(decode_text(read_bytes(path), path), newline="")


def decode_text(data: bytes, name: str) -> str:
    """UTF-8, or UTF-16 where a byte order mark tells it; the mark is dropped.

    Raises:
        DataError: it is neither (names the line).
    """
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        expected = encoding.removesuffix("-sig").upper()
        raise DataError(f"{name} is not {expected} text: {error.reason} in line {line}; convert it") from error


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


def is_hidden(name: str) -> bool:
    """Whether a file or a folder above it is what systems leave beside what people keep: thumbnails, resource forks."""
    parts = PurePosixPath(name).parts
    return any((part.startswith(".") and part != "..") or part in _OF_SYSTEMS for part in parts)


def media_kind(name: str) -> Literal["image", "video"] | None:
    """What a file is by its name: "image", "video" or neither (None)."""
    suffix = PurePosixPath(name).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def kind_for(name: str, wanted: Kind, head: Callable[[], bytes]) -> Literal["image", "video"] | None:
    """What a file is where a kind is wanted: an animation is both a clip and, by its first frame, a picture.

    Args:
        name: of the file.
        wanted: the kind.
        head: reads the file's first ``HEAD`` bytes, where the name leaves it open.
    """
    kind = media_kind(name)
    if kind == wanted or wanted == "text" or PurePosixPath(name).suffix.lower() not in ANIMATED_SUFFIXES:
        return kind
    return wanted if wanted == "image" or is_animation(head()) else kind


def media_at(path: str, wanted: Kind) -> Media:
    """A picture or clip by its path; what neither its name nor its content tells is what is wanted."""

    def head() -> bytes:
        try:
            return read_bytes(path, 0, HEAD, whole=False)
        except DataError:  # whoever decodes it says what is wrong
            return b""

    kind = kind_for(path, wanted, head) or ("video" if wanted == "video" else "image")
    return Media(kind, path, path)
