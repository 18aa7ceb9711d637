"""Annotation files as a source: the rows in memory, each made into a record when it is asked for."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.record import Record
from data_pipelines.sources.annotations.rows import Row
from data_pipelines.sources.files import find_files


@dataclasses.dataclass(frozen=True)
class MediaContext:
    """What a row needs to become a record, besides itself."""

    folder: str  # of the media
    kind: Kind


@dataclasses.dataclass(frozen=True)
class AnnotationFormat:
    """A public format: which files, how they are cut into rows, and what a row says.

    ``read`` takes the files and the split that is wanted ("" for all there is). ``splits`` says whether the files
    themselves name splits.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Sequence[str], str], Iterator[Row]]
    make: Callable[[Row, MediaContext], Record]
    splits: bool = False


_MISSHAPEN = (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError)
"""What comes of JSON whose lists are numbers and whose numbers are lists."""


class AnnotationSource:
    """The records of annotation files.

    Args:
        form: the format.
        path: a file, a folder of them, or a pattern; several are read one after the other.
        media: the folder of the pictures or clips; empty: beside the first file.
        split: which part, where the files name parts; several with "+" between them.
        kind: what is taken.

    Raises:
        DataError: no such file, or one that cannot be cut into rows.
    """

    def __init__(self, form: AnnotationFormat, path: str, media: str, split: str, kind: Kind) -> None:
        files = find_files(path, *form.suffixes)
        try:
            self._rows = list(form.read(files, split))
        except _MISSHAPEN as error:
            raise DataError(f"{path} is not of this format ({type(error).__name__}: {error})") from error
        self._place = MediaContext(media.rstrip("/") or files[0].rpartition("/")[0] or ".", kind)
        self._make = form.make

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"row {index} of {len(self._rows)}")
        row = self._rows[index]
        try:  # parsed once, however many fields are asked for
            return self._make(dataclasses.replace(row, values=row.fields()), self._place)
        except _MISSHAPEN as error:
            raise DataError(f"{row.where} is not of this format ({type(error).__name__}: {error})") from error
