"""From what an annotation calls a picture or clip to its file."""

import functools
import os

from data_pipelines.config import Kind
from data_pipelines.media import Media
from data_pipelines.sources.files import file_system, inside, is_url, media_file, media_kind

_SUFFIXES = {"image": (".jpg", ".jpeg", ".png", ".webp"), "video": (".mp4", ".avi", ".webm", ".mkv", ".mov")}


def named_media(folder: str, kind: Kind, *names: str) -> Media | None:
    """The first file of the given names that exists; without a suffix, all usual ones are tried.

    TGIF's names begin with "tumblr", and its clips are GIFs, as in the release. Where nothing exists the first name is
    kept, so that whoever reads it says what is missing.

    Raises:
        DataError: a name that leads out of the folder.
    """
    if kind == "text":
        return None
    candidates = [full for name in names for full in _with_suffixes(name, kind)]
    for candidate in candidates:
        if _exists(inside(folder, candidate)):
            return media_file(folder, candidate)
    return media_file(folder, candidates[0])


def _with_suffixes(name: str, kind: Kind) -> tuple[str, ...]:
    if media_kind(name):
        return (name,)
    if kind == "video" and name.rpartition("/")[2].split("_")[0] == "tumblr":
        return (f"{name}.gif",)
    return tuple(f"{name}{suffix}" for suffix in _SUFFIXES[kind])


def _exists(path: str) -> bool:
    if not is_url(path):
        return os.path.exists(path)
    return _exists_remotely(path)


@functools.lru_cache(maxsize=100_000)
def _exists_remotely(path: str) -> bool:
    system, plain = file_system(path)
    found: bool = system.exists(plain)
    return found
