"""Finding and reading files, local or remote, through fsspec; and safe file names."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import HEAD_BYTES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, Media, is_animation
from data_pipelines.storage.file_system import FileSystem, file_system, version_of
from data_pipelines.storage.retry import is_refused, is_url, retry

MAX_FILES = 1_000_000

ANIMATED_SUFFIXES = frozenset({".apng", ".avif", ".gif", ".png", ".webp"})
"""Suffixes of files that may hold one frame or several."""

_SYSTEM_NAMES = frozenset({"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found"})
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


_MAX_REQUESTS = 16
"""Numbered files behind a URL that are asked for one by one; for more, their folder is listed."""


class FoundFile(NamedTuple):
    """A file of a listing."""

    path: str  # with its scheme
    size: int
    version: str  # changes when the file is written again

    @property
    def signature(self) -> list[Any]:
        """Return what changes when the file changes."""
        return [self.size, self.version]


def find_files(path: str, *suffixes: str) -> list[FoundFile]:
    """Return all files of a path, sorted: a file, a folder, a pattern with ``*``, or ``{000..127}``; by few requests.

    Hidden files in folders are skipped.

    Raises:
        DataError: no file, or one of several numbered files is missing.
    """
    fs, fs_path = file_system(path)
    if "*" in fs_path:
        infos = {name: info for name, info in _match(fs, fs_path).items() if not is_hidden(PurePosixPath(name).name)}
        if not infos:
            raise DataError(f"{path} matches no file; check the pattern")
    else:
        infos = _infos_of(fs, _expand_braces(fs_path))
        if infos.get(fs_path, {}).get("type") == "directory":
            found = _only_files(fs, fs.find(fs_path, maxdepth=1, detail=True))
            listed = {name: info for name, info in found.items() if not is_hidden(PurePosixPath(name).name)}
            infos = {name: info for name, info in listed.items() if name.lower().endswith(suffixes)}
            if not infos:
                raise DataError(
                    f"{path} holds no file that ends in {' or '.join(suffixes)}; found {len(listed)} other files"
                )
    return [FoundFile(fs.url(name), int(info["size"] or 0), version_of(info)) for name, info in infos.items()]


def path_exists(path: str) -> bool:
    """Return whether a path of a source leads to something: a file, a folder, or all files of a pattern.

    Raises:
        DataError: a scheme that no installed package serves.
        StorageUnavailableError: storage does not answer.
    """
    fs, fs_path = file_system(path)
    if "*" not in fs_path and not _BRACES.search(fs_path):
        return fs.exists(fs_path)
    try:
        return bool(find_files(path, ""))
    except DataError:
        return False


def _infos_of(fs: FileSystem, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the infos of files in the order of their names. Raises DataError if one is missing."""
    if fs.is_local or len(names) <= _MAX_REQUESTS:
        infos = {}
        for name in names:
            try:
                infos[name] = fs.info(name)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise DataError(f"{fs.url(name)} does not exist; check the path") from error
        return infos
    folder = os.path.commonpath([name.rpartition("/")[0] for name in names])
    depth = names[0].removeprefix(folder).lstrip("/").count("/") + 1
    listed = fs.find(folder, maxdepth=depth, detail=True)
    if missing := next((name for name in names if name not in listed), None):
        raise DataError(f"{fs.url(missing)} does not exist; check the path")
    return {name: listed[name] for name in names}


def _match(fs: FileSystem, pattern: str) -> dict[str, dict[str, Any]]:
    """Return the infos of the files that match a pattern, sorted."""
    ranges = [match.groups() for match in _BRACES.finditer(pattern)]
    marked = _BRACES.sub("\0", pattern)
    from fsspec.utils import glob_translate  # fsspec is imported when a file is read

    try:
        regex = re.compile(glob_translate(marked).replace("\0", r"(\d+)"))
    except ValueError as error:
        raise DataError(f"{fs.url(pattern)} cannot be matched: {error}") from error

    def matches(name: str) -> bool:
        match = regex.match(name)
        return match is not None and all(
            int(first) <= int(number) <= int(last) and number == str(int(number)).zfill(len(first))
            for number, (first, last) in zip(match.groups(), ranges, strict=True)
        )

    listed = _only_files(fs, fs.glob_infos(re.sub(r"[*\0]*\0[*\0]*", "*", marked)))
    return {name: info for name, info in listed.items() if not ranges or matches(name)}


def _only_files(fs: FileSystem, infos: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the infos of files, sorted; links become what they lead to."""
    files = {}
    for name in sorted(infos):
        info = infos[name]
        if info.get("islink"):
            with contextlib.suppress(FileNotFoundError):
                info = fs.info(name)
        if info["type"] == "file":
            files[name] = info
    return files


def list_folder(folder: str, hint: str = "check the path") -> tuple[str, list[str]]:
    """Return a folder in full, and the sorted paths, relative to it, of all files below it.

    Raises:
        DataError: no such folder, with a hint.
    """
    fs, fs_path = file_system(folder)
    if not fs.isdir(fs_path):
        raise DataError(f"{folder} does not exist or is not a folder; {hint}")
    root = fs_path.rstrip("/")
    names = sorted(name.removeprefix(root).lstrip("/") for name in fs.find(root))
    return fs.url(root), names


def _expand_braces(pattern: str) -> list[str]:
    """Return the names of a pattern with a range in braces: shard-{000..127}.tar."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(last) - int(first) >= MAX_FILES:
        raise DataError(f"{pattern} matches more than {MAX_FILES:,} files; split it")
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in _expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]


def read_bytes(path: str, offset: int = 0, size: int | None = None, *, exact: bool = True) -> bytes:
    """Return a file's bytes, or ``size`` of them from ``offset`` on; without ``exact``, possibly fewer.

    Raises:
        DataError: the file is missing or unreadable, or with ``exact`` ends too early.
        StorageUnavailableError: storage does not answer.
        PermissionError: a URL that this account may not read, which says nothing about the file.
    """
    try:
        if is_url(path):
            fs, fs_path = file_system(path)
            data = fs.cat_file(fs_path, offset or None, None if size is None else offset + size, exact=exact)
        else:
            data = retry(lambda: _read_local(path, offset, size), path)
    except OSError as error:
        if is_refused(path, error):
            raise
        raise _unreadable(path, error) from error
    if exact and size is not None:
        _check_length(path, data, offset, size)
    return data


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Return bytes of several files of one place, which are requested at the same time.

    Args:
        ranges: path, offset and size of each.

    Raises:
        DataError: as :func:`read_bytes`.
    """
    fs, _ = file_system(ranges[0][0])
    paths = [file_system(path)[1] for path, _, _ in ranges]
    starts, ends = [offset for _, offset, _ in ranges], [offset + size for _, offset, size in ranges]
    results = fs.cat_ranges(paths, starts, ends, exact=True)
    for (path, offset, size), result in zip(ranges, results, strict=True):
        if isinstance(result, OSError) and not is_refused(path, result):
            raise _unreadable(path, result) from result
        if isinstance(result, Exception):
            raise result
        _check_length(path, result, offset, size)
    return [result for result in results if isinstance(result, bytes)]


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}")


def _check_length(path: str, data: bytes, offset: int, size: int) -> None:
    if len(data) != size:
        raise DataError(
            f"{path} ends at byte {offset + len(data):,}, expected {offset + size:,}; it was truncated or replaced"
        )


def _read_local(path: str, offset: int, size: int | None) -> bytes:
    """Read without fsspec's layers and without a buffer: this happens several times for every record."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        remaining = os.fstat(descriptor).st_size - offset if size is None else size
        parts = []
        while remaining > 0 and (part := os.pread(descriptor, remaining, offset)):
            parts.append(part)
            offset, remaining = offset + len(part), remaining - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def read_text(path: str) -> io.StringIO:
    """Return a whole text file as a stream of lines.

    Raises:
        DataError: the file is missing, unreadable, or not UTF-8 (with the line).
    """
    return io.StringIO(decode_text(read_bytes(path), path), newline="")


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8, or UTF-16 with a byte order mark; the mark is removed.

    Raises:
        DataError: other bytes (with the line).
    """
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        expected = encoding.removesuffix("-sig").upper()
        raise DataError(f"{name} is not {expected} text: {error.reason} in line {line}; convert it") from error


def read_lines(
    files: Iterable[Path],
    on_progress: Callable[[int], None] = lambda num_bytes: None,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[str]:
    """Yield the lines of text files without surrounding whitespace, and without empty ones.

    Args:
        files: read one after the other.
        on_progress: called with the number of bytes read so far.
        start: lines that begin before this byte, counted over all files, are skipped.
        stop: lines that begin at or after this byte are skipped; None: none are.

    Raises:
        DataError: a file is not UTF-8; the message names its line.
    """
    file_start, done, end = 0, 0, sys.maxsize if stop is None else stop
    for path in files:
        if start:  # sizes are requests if files are remote
            size = path.stat().st_size
            if file_start + size <= start:
                file_start += size
                continue
        if file_start >= end:
            return
        with path.open("rb") as file:
            if start > file_start:  # the line to which the byte before belongs began earlier
                file.seek(start - file_start - 1)
                file.readline()
            position = file_start + file.tell()
            while position < end and (line := file.readline()):
                try:
                    text = line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    number = 1 + _count_lines(path, position - file_start)
                    raise DataError(f"text file {path} is not UTF-8: {error.reason} in line {number}") from error
                if text:
                    yield text
                position, done = position + len(line), done + len(line)
                on_progress(done)
            file_start = position


def _count_lines(path: Path, num_bytes: int) -> int:
    """Return how many lines end within the first bytes of a file."""
    with path.open("rb") as file:
        count = 0
        while num_bytes > 0 and (block := file.read(min(num_bytes, 2**20))):
            count, num_bytes = count + block.count(b"\n"), num_bytes - len(block)
    return count


def safe_join(folder: str, name: str) -> str:
    """Return the path of a file that data name, which may not lead out of its folder.

    Backslashes separate folders, as on Windows.

    Raises:
        DataError: an empty or absolute name, one with ``..``, a URL, or an impossible name.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    absolute = path.is_absolute() or PureWindowsPath(name).is_absolute()
    if not name or absolute or ".." in path.parts or is_url(name) or "\0" in name:
        raise DataError(f"the file name {name!a} is empty or leads out of {folder}; expected a name inside that folder")
    return f"{folder.rstrip('/')}/{path}"


def is_hidden(name: str) -> bool:
    """Return whether a file, or a folder above it, is hidden or made by the system: thumbnails, resource forks."""
    parts = PurePosixPath(name).parts
    return any((part.startswith(".") and part != "..") or part in _SYSTEM_NAMES for part in parts)


def media_kind(name: str) -> Literal["image", "video"] | None:
    """Return the kind of a file by its name: "image", "video", or None for other files."""
    suffix = PurePosixPath(name).suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def resolve_kind(name: str, requested: Kind, read_head: Callable[[], bytes]) -> Literal["image", "video"] | None:
    """Return the kind of a file where a kind is requested: an animation is a video, or its first frame an image.

    Args:
        name: of the file.
        requested: the kind.
        read_head: reads the file's first ``HEAD_BYTES`` bytes; called where the name does not decide.
    """
    kind = media_kind(name)
    if kind == requested or requested == "text" or PurePosixPath(name).suffix.lower() not in ANIMATED_SUFFIXES:
        return kind
    return requested if requested == "image" or is_animation(read_head()) else kind


def make_media(path: str, requested: Kind) -> Media:
    """Return the image or video of a path; if neither name nor content decides, it is of the requested kind."""

    def read_head() -> bytes:
        try:
            return read_bytes(path, 0, HEAD_BYTES, exact=False)
        except DataError:  # decoding reports it
            return b""

    kind = resolve_kind(path, requested, read_head) or ("video" if requested == "video" else "image")
    return Media(kind, path, path)
