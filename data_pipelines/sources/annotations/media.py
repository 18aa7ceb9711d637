"""From what an annotation calls a picture or clip to its file."""

import collections
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from data_pipelines.config import Kind
from data_pipelines.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Media
from data_pipelines.sources.files import ANIMATED_SUFFIXES, file_system, inside, is_url, make_media, media_kind

_SUFFIXES = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES}


def find_media(folder: str, kind: Kind, *names: str) -> Media | None:
    """The first file of the given names that exists: as it is named, or with a suffix of the kind behind it.

    A clip that is named with a suffix may have another, since sets are encoded anew. Where nothing exists the first
    name is kept, so that whoever reads it says what is missing.

    Raises:
        DataError: a name that leads out of the folder.
    """
    if kind == "text":
        return None
    for name in names:
        if path := _find(inside(folder, name), kind):
            return make_media(path, kind)
    suffix = "" if media_kind(names[0]) else _SUFFIXES[kind][0]
    return make_media(inside(folder, f"{names[0]}{suffix}"), kind)


def _find(path: str, kind: Kind) -> str | None:
    if _exists(path):
        return path
    folder, _, base = path.rpartition("/")
    beside, own = _media_in(folder), media_kind(base)

    def rank(name: str) -> tuple[int, str]:
        """The wanted kind first, then what may be of it."""
        usual, suffix = _SUFFIXES[kind], PurePosixPath(name).suffix.lower()
        return (usual.index(suffix) if suffix in usual else len(usual) + (suffix not in ANIMATED_SUFFIXES), name)

    found = sorted(beside.get(base, ()), key=rank)
    if own:
        twins = sorted(beside.get(PurePosixPath(base).stem, ()), key=rank)
        found = [name for name in found if media_kind(name) == own]
        found += [name for name in twins if name.lower() == base.lower()]
        found += [name for name in twins if media_kind(name) == own == "video"]
    return f"{folder}/{found[0]}" if found else None


@functools.lru_cache(maxsize=1024)
def _media_in(folder: str) -> Mapping[str, Sequence[str]]:
    """The names of a folder's pictures and clips, by what is before their suffixes. A listing is asked for once."""
    system, plain = file_system(folder)
    try:
        listed = system.ls(plain, detail=False)
    except OSError:
        return {}
    names = collections.defaultdict[str, list[str]](list)
    for path in map(PurePosixPath, filter(media_kind, listed)):
        names[path.stem].append(path.name)
    return names


def _exists(path: str) -> bool:
    if not is_url(path):
        return os.path.isfile(path)
    return _exists_remotely(path)


@functools.lru_cache(maxsize=100_000)
def _exists_remotely(path: str) -> bool:
    system, plain = file_system(path)
    found: bool = system.isfile(plain)
    return found
