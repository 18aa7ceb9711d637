"""A folder of images and videos with captions: in a table, in files next to them, or as the names of files."""

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal

from absl import logging

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import Media
from data_pipelines.record import Record, check_index
from data_pipelines.sources.annotations import fields
from data_pipelines.sources.annotations.rows import Row
from data_pipelines.sources.annotations.source import read_rows
from data_pipelines.sources.files import (
    MAX_FILES,
    decode_text,
    is_hidden,
    list_folder,
    media_kind,
    read_bytes,
    safe_join,
)
from data_pipelines.storage.file_system import is_local_file
from data_pipelines.storage.retry import is_url

TABLES = tuple(f"{stem}{suffix}" for stem in ("captions", "metadata") for suffix in fields.FORMAT.suffixes)
"""Names of the tables of captions, in the folder itself."""
MAX_CAPTION_BYTES, MAX_TABLE_BYTES = 2**20, 2**30

_SEPARATORS = re.compile(r"[\s_.,+-]+")
_NO_LETTERS = re.compile(r"[\W\d_]+")

VisualKind = Literal["image", "video"]


@dataclasses.dataclass(frozen=True)
class Folder:
    """The images and videos of a folder, and how their captions are found.

    Attributes:
        root: the folder in full.
        kinds: the kind of each image and video that has a caption, by its path relative to the folder.
        skipped: those without a caption.
        captions: returns the captions of one of ``kinds``, at least one, or raises DataError.
    """

    root: str
    kinds: Mapping[str, VisualKind]
    skipped: Sequence[str]
    captions: Callable[[str], tuple[str, ...]]


@functools.lru_cache(maxsize=4)
def read_folder(path: str) -> Folder:
    """List a folder, once per process: its streams and evaluations see the same files.

    Captions are those of its tables (:data:`TABLES`). Without a table, they are in a ``.txt``, or in the fields of a
    ``.json``, of the same name; without any such file, the names are the captions: "red_car-on-the_road.jpg".

    Raises:
        DataError: no such folder, no image or video, no captions, too many files, or a table that cannot be read.
    """
    root, listed = list_folder(path)
    names = [name for name in listed if not is_hidden(name)]
    media = {name: kind for name in names if (kind := media_kind(name))}
    if not media:
        raise DataError(f"{path} holds no image or video; found {len(listed):,} other files")
    if len(media) > MAX_FILES:
        raise DataError(f"{path} holds {len(media):,} images and videos, expected at most {MAX_FILES:,}: make shards "
                        "of them (mplug2 data convert), or name a folder inside it")  # fmt: skip
    if tables := sorted(set(TABLES).intersection(names)):
        return _read_tables(root, tables, media)
    caption_files = {name for name in names if name.endswith((".txt", ".json"))}
    sidecars = {name: sidecar for name in media if (sidecar := _sidecar(name, caption_files))}
    if sidecars:
        return _select(root, media, sidecars, lambda name: _read_sidecar(root, sidecars[name]))
    words = {name: text for name in media if _letters(text := caption_from_filename(name))}
    if len(set(map(_letters, words.values()))) < min(2, len(media)):
        raise DataError(
            f"{path} has no captions: write captions.csv with lines 'image,caption', or a .txt next to each image or "
            f"video; names such as {next(iter(media))!a} are not captions"
        )
    return _select(root, media, words, lambda name: (words[name],))


def caption_from_filename(name: str) -> str:
    """Return the words of a file's name: "cars/red_car-on-the_road.jpg" gives "red car on the road"."""
    return " ".join(filter(None, _SEPARATORS.split(PurePosixPath(name).stem)))


def _letters(text: str) -> str:
    return _NO_LETTERS.sub("", text).casefold()


def _select(
    root: str, media: Mapping[str, VisualKind], captioned: Iterable[str], captions: Callable[[str], tuple[str, ...]]
) -> Folder:
    kinds = {name: media[name] for name in captioned}
    return Folder(root, kinds, [name for name in media if name not in kinds], captions)


def _sidecar(name: str, caption_files: set[str]) -> str | None:
    stem = str(PurePosixPath(name).with_suffix(""))
    return next((each for each in (f"{stem}.txt", f"{stem}.json") if each in caption_files), None)


def _read_sidecar(root: str, name: str) -> tuple[str, ...]:
    path = _check_inside(root, name)
    data = read_bytes(path, 0, MAX_CAPTION_BYTES + 1, exact=False)
    if len(data) > MAX_CAPTION_BYTES:
        raise DataError(f"{path} has more than {MAX_CAPTION_BYTES:,} bytes, expected a caption; remove it")
    text = decode_text(data, path)
    if name.endswith(".json"):
        return _read_captions(Row(path, 1, text))
    if not text.strip():
        raise DataError(f"{path} is empty, expected a caption; write one, or remove the file")
    return (text,)


def _read_captions(row: Row) -> tuple[str, ...]:
    """Return the captions of a row. Raises DataError if it has none, or cannot be read."""
    captions = row.texts(*fields.CAPTION_FIELDS) or row.texts(*fields.TEXT_FIELDS)
    if not captions:
        row.require(*fields.CAPTION_FIELDS, *fields.TEXT_FIELDS)
    return captions


def _check_inside(root: str, name: str) -> str:
    """Return the path of a file of captions. Raises DataError for a link out of the folder, or no regular file."""
    path = f"{root}/{name}"
    if not is_url(path):
        if not os.path.realpath(path).startswith(f"{os.path.realpath(root).rstrip('/')}/"):
            raise DataError(f"{path} is a link out of {root}; replace it by the file")
        if not is_local_file(path):
            raise DataError(f"{path} is no regular file that can be read; replace it")
    return path


def _read_tables(root: str, tables: Sequence[str], media: Mapping[str, VisualKind]) -> Folder:
    """Return the folder with the media that its tables name, one record for all rows of each."""
    paths = [_check_inside(root, name) for name in tables]
    for path in paths:
        if len(read_bytes(path, MAX_TABLE_BYTES, 1, exact=False)):
            raise DataError(f"{path} has more than {MAX_TABLE_BYTES:,} bytes; split the folder, or make shards of it")
    rows, stems = collections.defaultdict[str, list[Row]](list), {}
    for name in sorted(media, reverse=True):
        stems[str(PurePosixPath(name).with_suffix(""))] = name
    for row in read_rows(fields.FORMAT, paths, ""):
        name = _media_name(row)
        rows[name if name in media else stems.get(name, name)].append(row)
    found = {media_kind(name) for name in rows}
    default: VisualKind = "video" if "video" in found and "image" not in found else "image"  # of unusable rows
    kinds = {name: media_kind(name) or default for name in rows}
    return _select(root, {**media, **kinds}, kinds, lambda name: _captions_of_rows(rows[name]))


def _media_name(row: Row) -> str:
    """Return the image or video that a row names, or its own key if it cannot be read, which is reported on access."""
    try:
        return str(PurePosixPath(row.text(*fields.IMAGE_FIELDS).replace("\\", "/")))
    except DataError:
        return row.key


def _captions_of_rows(rows: Iterable[Row]) -> tuple[str, ...]:
    for row in rows:
        row.require(*fields.IMAGE_FIELDS)
    return tuple(caption for row in rows for caption in _read_captions(row))


class FolderSource:
    """The images or videos of a folder with their captions, or as texts the captions of both.

    The key of a record is its path relative to the folder. A kind is that of a file's name, so a GIF is an image, of
    which the first frame is read.

    Raises:
        DataError: as :func:`read_folder`, or no file of this kind has a caption.
    """

    def __init__(self, path: str, kind: Kind) -> None:
        self._folder, self._kind = read_folder(path), kind
        self._names = sorted(name for name, each in self._folder.kinds.items() if kind in (each, "text"))
        skipped = [name for name in self._folder.skipped if media_kind(name) == kind]
        if skipped:
            logging.warning(
                "%s: skipped %d %ss without a caption; the first is %a", path, len(skipped), kind, skipped[0]
            )
        if not self._names:
            found = collections.Counter(self._folder.kinds.values())
            counts = ", ".join(f"{count:,} of kind '{each}'" for each, count in found.items())
            raise DataError(f"{path} holds no {kind} with a caption; found {counts or 'none'}")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """Return the key of a record, without reading it."""
        check_index(index, len(self), "file")
        return self._names[index]

    def __getitem__(self, index: int) -> Record:
        name = self.key(index)
        path, captions = safe_join(self._folder.root, name), self._folder.captions(name)
        if self._kind == "text":
            return Record(name, texts=captions)
        return Record(name, media=Media(self._kind, path, path), captions=captions)
