"""Fingerprints of a source's files, to detect changes: their names, their sizes, and the first bytes of some.

Modification times are excluded, since copying changes them; so are the media that annotation files name: too many.
"""

import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from data_pipelines.config import SourceConfig
from data_pipelines.errors import DataError
from data_pipelines.sources.file_source import kind_from_name
from data_pipelines.sources.files import find_files, is_hidden, media_kind, read_bytes
from data_pipelines.storage.file_system import file_system

MAX_FILES, MAX_BYTES = 16, 2**20
"""Number of files to read, evenly spaced, and bytes of each."""
_FOLDERS = {"captioned_folder", "files", "image_folder", "tfds"}
"""Formats whose records are all the files below a folder."""
_SUFFIXES = {"array_record": (".array_record",), "webdataset": (".tar",)}
_TABLES = (".csv", ".json", ".jsonl", ".tsv", ".txt")
"""Suffixes of annotation files, in a folder that may hold other files."""


def source_fingerprint(config: SourceConfig) -> Mapping[str, Any]:
    """Return the number of a source's files, their bytes, and a digest; {} for synthetic sources.

    Raises:
        DataError: files that are missing or cannot be read.
    """
    if not config.path:
        return {}
    sizes = _sizes(config)
    digest, names = hashlib.sha256(), sorted(sizes)
    for name in names:
        digest.update(f"{name}\0{sizes[name][1]}\0".encode(errors="surrogatepass"))
    for name in names[:: -(-len(names) // MAX_FILES) or 1]:
        path, size = sizes[name]
        digest.update(read_bytes(path, 0, min(size, MAX_BYTES)))
    return {
        "files": len(names), "bytes": sum(size for _, size in sizes.values()), "digest": digest.hexdigest()[:16]
    }  # fmt: skip


def _sizes(config: SourceConfig) -> dict[str, tuple[str, int]]:
    """Return the path and size of every file, by its name relative to the source's path, which may be moved."""
    fs, fs_path = file_system(config.path)
    try:
        if not fs.isdir(fs_path):
            # Archives in different folders may share a name; their order distinguishes them.
            return {
                f"{i:09} {PurePosixPath(file.path).name}": (file.path, file.size)
                for i, file in enumerate(find_files(config.path, ""))
            }
        root = fs_path.rstrip("/")
        depth = None if config.format in _FOLDERS else 1
        found = fs.find(root, maxdepth=depth, detail=True) or fs.find(root, detail=True)
    except OSError as error:
        raise DataError(f"{config.path} cannot be read: {error.strerror or error}") from error
    sizes = {
        name.removeprefix(root).lstrip("/"): (
            fs.url(name), int(info["size"])
        )
        for name, info in found.items()
    }  # fmt: skip
    return {name: size for name, size in sizes.items() if _is_read(name, config)} or sizes


def _is_read(name: str, config: SourceConfig) -> bool:
    """Return whether the format reads a file of a folder, by its name."""
    if is_hidden(name):
        return False
    if config.format == "captioned_folder":
        return media_kind(name) is not None or name.lower().endswith(_TABLES)
    if config.format in _FOLDERS:
        return config.format == "tfds" or kind_from_name(name) == config.kind
    return name.lower().endswith(_SUFFIXES.get(config.format, _TABLES))
