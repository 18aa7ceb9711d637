"""From the name of an image or video in an annotation to its file."""

import collections
import functools
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from data_pipelines.config import Kind
from data_pipelines.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Media
from data_pipelines.sources.files import ANIMATED_SUFFIXES, make_media, media_kind, safe_join
from data_pipelines.storage.file_system import file_system, is_local_file
from data_pipelines.storage.retry import is_refused, is_url

_SUFFIXES = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}


def find_media(folder: str, kind: Kind, *names: str) -> Media | None:
    """Return the first file of the given names that exists, as named or with a suffix of the kind appended.

    A video that is named with a suffix may have another one, since data sets get re-encoded. If no file exists the
    first name is returned, so that reading it reports what is missing.

    Raises:
        DataError: a name that leads out of the folder.
    """
    if kind == "text":
        return None
    for name in names:
        if path := _find(safe_join(folder, name), kind):
            return make_media(path, kind)
    suffix = "" if media_kind(names[0]) else _SUFFIXES[kind][0]
    return make_media(safe_join(folder, f"{names[0]}{suffix}"), kind)


def _find(path: str, kind: Kind) -> str | None:
    if _exists_remotely(path) if is_url(path) else is_local_file(path):
        return path
    folder, _, base = path.rpartition("/")
    files, kind_of_name = _media_in(folder), media_kind(base)

    def rank(name: str) -> tuple[int, str]:
        """Rank suffixes of the requested kind first, then animations."""
        suffixes, suffix = _SUFFIXES[kind], PurePosixPath(name).suffix.lower()
        return (
            suffixes.index(suffix) if suffix in suffixes else len(suffixes) + (suffix not in ANIMATED_SUFFIXES),
            name,
        )

    candidates = sorted(files.get(base, ()), key=rank)
    if kind_of_name:
        same_stem = sorted(files.get(PurePosixPath(base).stem, ()), key=rank)
        candidates = [name for name in candidates if media_kind(name) == kind_of_name]
        candidates += [name for name in same_stem if name.lower() == base.lower()]
        candidates += [name for name in same_stem if media_kind(name) == kind_of_name == "video"]
    return f"{folder}/{candidates[0]}" if candidates else None


@functools.lru_cache(maxsize=1024)
def _media_in(folder: str) -> Mapping[str, Sequence[str]]:
    """Return the names of a folder's images and videos by their stems. The folder is listed once."""
    fs, fs_path = file_system(folder)
    try:
        paths = fs.ls(fs_path)
    except OSError:
        return {}
    names = collections.defaultdict[str, list[str]](list)
    for path in map(PurePosixPath, filter(media_kind, paths)):
        names[path.stem].append(path.name)
    return names


@functools.lru_cache(maxsize=100_000)
def _exists_remotely(path: str) -> bool:
    fs, fs_path = file_system(path)
    try:
        return fs.isfile(fs_path)
    except OSError as error:
        if is_refused(path, error):
            raise
        return False  # reading it reports why
