"""Annotation files as rows of named fields, each of which knows its file and line."""

import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.sources.files import read_text

MAX_CELL = 10_000_000
"""Characters of one cell of a CSV or TSV file."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row. ``values`` stays text until it is asked for, so that a bad line spoils one record and no more."""

    file: str
    number: int  # of the line or item, from 1
    values: Mapping[str, Any] | str

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file} row {self.number}"

    @property
    def key(self) -> str:
        """Stable as long as the file is."""
        return f"{PurePosixPath(self.file).stem}/{self.number}"

    def fields(self) -> Mapping[str, Any]:
        """Field names and values.

        Raises:
            DataError: a line that is no JSON object.
        """
        if not isinstance(self.values, str):
            return self.values
        try:
            values = json.loads(self.values)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where} is not valid JSON ({error}); mend or remove the line") from error
        if not isinstance(values, dict):
            raise DataError(f"{self.where} holds a {type(values).__name__}, expected named fields")
        return values

    def find(self, names: tuple[str, ...]) -> Any:
        """The value of the first of several names that is there, or None."""
        fields = self.fields()
        return next((fields[name] for name in names if fields.get(name) not in (None, "", [])), None)

    def need(self, *names: str) -> Any:
        """The value of the first of several names that is there.

        Raises:
            DataError: none is.
        """
        value = self.find(names)
        if value is None:
            if blank := [name for name in names if self.fields().get(name) is not None]:
                raise DataError(f"{self.where} has nothing in its {blank[0]}; fill it in, or remove the row")
            found = ", ".join(list(self.fields())[:12]) or "nothing"
            raise DataError(f"{self.where} has no {' or '.join(names)}; its fields are {found}")
        return value

    def text(self, *names: str) -> str:
        """The first of several names as text; numbers become their digits. Raises as :meth:`need`."""
        value = self.need(*names)
        if isinstance(value, dict | list | bool):
            raise DataError(f"{self.where}: {names[0]} is a {type(value).__name__}, expected text")
        return str(value).strip()

    def texts(self, *names: str) -> tuple[str, ...]:
        """One text or several; empty if there are none."""
        value = self.find(names)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(each, dict | list | bool) for each in values):
            raise DataError(f"{self.where}: {names[0]} holds something else than texts")
        return tuple(filter(None, (str(each).strip() for each in values)))


def read_json(path: str) -> Any:
    """A whole JSON file.

    Raises:
        DataError: missing, not UTF-8, or damaged (with the line).
    """
    try:
        return json.load(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); it is damaged or of another format") from error


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a file: JSON lines, a JSON list, CSV or TSV with a header, by its suffix and first character.

    Raises:
        DataError: missing, not UTF-8, or a file that cannot be cut into rows.
    """
    if path.endswith((".csv", ".tsv")):
        yield from read_table(path)
        return
    text = read_text(path)
    if text.read(1) == "[":
        for number, item in enumerate(read_json(path), 1):
            yield Row(path, number, item if isinstance(item, dict) else json.dumps(item))
        return
    text.seek(0)
    for number, line in enumerate(text, 1):
        if line.strip():
            yield Row(path, number, line.strip())


def read_table(path: str, columns: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of a CSV or TSV file; ``columns`` names those of a file without a header.

    Raises:
        DataError: as ``read_rows``; a line with more cells than the header has.
    """
    csv.field_size_limit(MAX_CELL)
    # Quotes mean nothing in the tab-separated files that are around, GLUE's above all.
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.endswith(".tsv") else {}
    reader = csv.reader(read_text(path), **form)
    try:
        header = list(columns) or next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) > len(header):
                raise DataError(
                    f"{path} line {reader.line_num} has {len(cells)} cells, expected the header's {len(header)}"
                )
            yield Row(path, reader.line_num, dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} cannot be read: {error}") from error
