"""Loose files as a source: the pictures, clips or texts below a folder, or a single one, each named by its path."""

import collections
from collections.abc import Sequence
from pathlib import PurePosixPath

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import HEAD, Media
from data_pipelines.record import Record
from data_pipelines.sources.files import (
    ANIMATED_SUFFIXES,
    file_system,
    is_hidden,
    is_url,
    kind_for,
    media_kind,
    read_text,
)


def kind_of(name: str) -> Kind | None:
    """What a file is taken for by its name: a picture, a clip, a text (.txt), or nothing of these (None)."""
    return "text" if PurePosixPath(name).suffix.lower() == ".txt" else media_kind(name)


def walk(folder: str) -> list[str]:
    """The names of all pictures, clips and texts below a folder, by their paths in it and in their order.

    What is hidden is left out.

    Raises:
        DataError: no such folder, or none of these in it.
    """
    system, plain = file_system(folder)
    if not system.isdir(plain):
        raise DataError(f"{folder} does not exist or is no folder; check the path")
    root = plain.rstrip("/")
    names = sorted(name.removeprefix(root).lstrip("/") for name in system.find(root))
    found = [name for name in names if kind_of(name) and not is_hidden(name)]
    if not found:
        raise DataError(f"{folder} holds no picture, clip or .txt file; found {len(names)} others")
    return found


class LooseFiles:
    """A record for every file of one kind; its key is the path below the folder, or a single file's path as given.

    An animated GIF, WebP or PNG is a clip, and by its first frame a picture.

    Raises:
        DataError: no such file or folder, or nothing of this kind there.
    """

    def __init__(self, path: str, kind: Kind) -> None:
        system, plain = file_system(path)
        self._folder, self._kind = "", kind
        if system.isfile(plain):
            names = [path]
        else:
            names = walk(path)
            self._folder = system.unstrip_protocol(plain.rstrip("/")) if is_url(path) else plain.rstrip("/")
        heads = self._heads(names) if kind == "video" else {}

        def fits(name: str) -> bool:
            return kind in (kind_of(name), kind_for(name, kind, lambda: heads.get(name, b"")))

        self._names = list(filter(fits, names))
        if not self._names:
            counts = collections.Counter(kind_of(name) or "other" for name in names)
            found = ", ".join(f"{count:,} of kind '{other}'" for other, count in counts.items())
            raise DataError(f"{path} is no {kind}, nor holds any, by its files' names: {found}; set another kind")

    def _heads(self, names: Sequence[str]) -> dict[str, bytes]:
        """How files begin that may be animations, fetched together."""
        names = [name for name in names if PurePosixPath(name).suffix.lower() in ANIMATED_SUFFIXES]
        if not names:
            return {}
        system, _ = file_system(self._path(names[0]))
        paths = [file_system(self._path(name))[1] for name in names]
        heads = system.cat_ranges(paths, [0] * len(paths), [HEAD] * len(paths), on_error="return")
        return {name: head for name, head in zip(names, heads, strict=True) if isinstance(head, bytes)}

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self._names):
            raise IndexError(f"file {index} of {len(self._names)}")
        name = self._names[index]
        path = self._path(name)
        if self._kind != "text":
            return Record(name, media=Media(self._kind, path, path))
        record = Record(name, texts=(read_text(path).read(),))
        if not record.texts:
            raise DataError(f"{path} is empty; expected a text that can be seen")
        return record
