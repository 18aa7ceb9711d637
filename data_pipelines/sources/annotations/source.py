"""Annotation files as a source: the rows are in memory, and converted to records on access."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.record import Record, check_index
from data_pipelines.sources.annotations.rows import Row
from data_pipelines.sources.files import find_files


@dataclasses.dataclass(frozen=True)
class MediaContext:
    """The folder and the kind of the media that rows refer to."""

    folder: str
    kind: Kind


@dataclasses.dataclass(frozen=True)
class AnnotationFormat:
    """A public format: its suffixes, how files are read as rows, and how a row becomes a record.

    ``read`` takes the files and a split ("" for all rows). ``has_splits`` tells whether the files name splits.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Sequence[str], str], Iterator[Row]]
    to_record: Callable[[Row, MediaContext], Record]
    has_splits: bool = False


_SHAPE_ERRORS = (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError)
"""Raised for JSON of an unexpected structure."""


def read_rows(format: AnnotationFormat, files: Sequence[str], split: str) -> list[Row]:
    """Return the rows of annotation files. Raises DataError for files that are not of the format."""
    try:
        return list(format.read(files, split))
    except _SHAPE_ERRORS as error:
        raise DataError(f"{files[0]} is not of this format ({type(error).__name__}: {error})") from error


class AnnotationSource:
    """The records of annotation files.

    Args:
        format: the format.
        path: a file, a folder of them, or a pattern; several files are read one after the other.
        media: the folder of the images or videos; empty: the folder of the first file.
        split: the split to read, if the files name splits; several are joined by "+".
        kind: what the records are read as.

    Raises:
        DataError: no such file, or one that cannot be read as rows.
    """

    def __init__(self, format: AnnotationFormat, path: str, media: str, split: str, kind: Kind) -> None:
        files = [file.path for file in find_files(path, *format.suffixes)]
        self._rows = read_rows(format, files, split)
        self._context = MediaContext(media.rstrip("/") or files[0].rpartition("/")[0] or ".", kind)
        self._to_record = format.to_record

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        check_index(index, len(self), "row")
        row = self._rows[index]
        try:  # parsed once, however many fields are read
            return self._to_record(dataclasses.replace(row, values=row.fields()), self._context)
        except _SHAPE_ERRORS as error:
            raise DataError(f"{row.where} is not of this format ({type(error).__name__}: {error})") from error
