"""Individual files as a source: the images, videos or texts below a folder, or a single one."""

import collections
from collections.abc import Sequence
from pathlib import PurePosixPath

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import HEAD_BYTES, Media
from data_pipelines.record import Record, check_index
from data_pipelines.sources.files import ANIMATED_SUFFIXES, is_hidden, list_folder, media_kind, read_text, resolve_kind
from data_pipelines.storage.file_system import file_system


def kind_from_name(name: str) -> Kind | None:
    """Return the kind of a file by its name: "image", "video", "text" (.txt), or None for other files."""
    return "text" if PurePosixPath(name).suffix.lower() == ".txt" else media_kind(name)


def list_files(folder: str) -> list[str]:
    """Return the paths of all images, videos and texts below a folder, relative to it and sorted.

    Hidden files are skipped.

    Raises:
        DataError: no such folder, or no such file in it.
    """
    return _list_files(folder)[1]


def _list_files(folder: str) -> tuple[str, list[str]]:
    """Return the folder in full, and the files."""
    root, names = list_folder(folder)
    found = [name for name in names if kind_from_name(name) and not is_hidden(name)]
    if not found:
        raise DataError(f"{folder} holds no image, video or .txt file; found {len(names)} other files")
    return root, found


class FileSource:
    """One record per file of one kind; the key is the path relative to the folder, or a single file's path as given.

    An animated GIF, WebP or PNG is read as a video, or its first frame as an image.

    Raises:
        DataError: no such file or folder, or no file of this kind.
    """

    def __init__(self, path: str, kind: Kind) -> None:
        fs, fs_path = file_system(path)
        self._kind = kind
        self._folder, names = ("", [path]) if fs.isfile(fs_path) else _list_files(path)
        heads = self._heads(names) if kind == "video" else {}

        def is_of_kind(name: str) -> bool:
            return kind in (kind_from_name(name), resolve_kind(name, kind, lambda: heads.get(name, b"")))

        self._names = list(filter(is_of_kind, names))
        if not self._names:
            counts = collections.Counter(kind_from_name(name) or "other" for name in names)
            found = ", ".join(f"{count:,} of kind '{name}'" for name, count in counts.items())
            raise DataError(f"{path} contains no {kind} files: {found}; set another kind")

    def _heads(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the first bytes of the files that may be animations, fetched together."""
        names = [name for name in names if PurePosixPath(name).suffix.lower() in ANIMATED_SUFFIXES]
        if not names:
            return {}
        fs, _ = file_system(self._path(names[0]))
        paths = [file_system(self._path(name))[1] for name in names]
        heads = fs.cat_ranges(paths, [0] * len(paths), [HEAD_BYTES] * len(paths))
        return {name: head for name, head in zip(names, heads, strict=True) if isinstance(head, bytes)}

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        check_index(index, len(self), "file")
        name = self._names[index]
        path = self._path(name)
        if self._kind != "text":
            return Record(name, media=Media(self._kind, path, path))
        record = Record(name, texts=(read_text(path).read(),))
        if not record.texts:
            raise DataError(f"{path} has no visible text, expected some; remove the file")
        return record
