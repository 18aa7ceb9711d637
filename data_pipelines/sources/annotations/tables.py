"""Tables: CSV, TSV and similar, parsed so that an unbalanced quote fails only one row."""

import ast
import csv
from collections.abc import Iterator, Sequence, Set
from pathlib import PurePosixPath

from data_pipelines.errors import DataError
from data_pipelines.sources.annotations.rows import Row, normalize_name
from data_pipelines.sources.files import read_text

MAX_CELL = 10_000_000
"""Maximum number of characters of one cell."""
MAX_LINES = 10_000
"""Maximum number of lines of one cell."""

DELIMITERS = (",", "\t", ";", "|")
_MISSING = frozenset({"nan", "NaN"})  # as pandas writes an empty cell as text


def read_table(
    path: str, known: Set[str] = frozenset(), *, columns: tuple[str, ...] = (), quotes: bool = True
) -> Iterator[Row]:
    """Yield the rows of a table, with the delimiter of its header.

    A quoted cell may contain delimiters, doubled quotes and line ends. One that only begins with a quote is read
    literally.

    Args:
        path: the file.
        known: normalized names of fields, one of which the header must have; empty: any.
        columns: the columns of a file without a header.
        quotes: whether quotes are special; in GLUE's files they are not.

    Raises:
        DataError: the file is missing, not UTF-8, or its header has no known field.
    """
    csv.field_size_limit(MAX_CELL)
    lines, at = list(read_text(path)), 0
    default = "\t" if path.lower().endswith(".tsv") or not quotes else ","
    delimiter, header = default, list(columns)
    if lines and not header:
        while at < len(lines) - 1 and not lines[at].strip():
            at += 1
        delimiters = (default, *DELIMITERS) if known else (default,)
        candidates = {each: _cells(lines, at, each, 0, quotes) for each in delimiters}
        matching = {
            each: len({normalize_name(name) for name in cells} & known) for each, (cells, _) in candidates.items()
        }
        delimiter = max(matching, key=lambda each: matching[each])  # on ties, the default
        if known and not matching[delimiter]:
            raise DataError(
                f"{path} begins with the line {lines[at].strip()[:80]!a}, expected a header with the names of the "
                "columns, such as 'image,caption'; add it as the first line"
            )
        header, at = candidates[delimiter]
        header = [name.strip() for name in header]
    while at < len(lines):
        first = at
        cells, at = _cells(lines, at, delimiter, len(header), quotes)
        if not any(map(str.strip, cells)) or [cell.strip(" \ufeff") for cell in cells] == header:
            continue  # an empty line, or the header of a concatenated file
        while len(cells) > len(header) and not cells[-1].strip():  # trailing delimiters
            cells.pop()
        error = ""
        if len(cells) > len(header):
            error = f"has {len(cells)} cells, expected {len(header)} as in the header; quote cells with delimiters"
        fields = _to_fields(header, cells) if quotes else dict(zip(header, cells, strict=False))
        yield Row(path, first + 1, fields, error)


def _to_fields(header: Sequence[str], cells: Sequence[str]) -> dict[str, str | list[str]]:
    """Return the cells by the names of their columns; columns of the same name become a list."""
    fields: dict[str, str | list[str]] = {}
    for name, cell in zip(header, cells, strict=False):
        value = "" if cell in _MISSING else _parse_list(cell) or cell
        if name in fields:
            value = [each for part in (fields[name], value) for each in (part if isinstance(part, list) else [part])]
        fields[name] = value
    return fields


def _parse_list(cell: str) -> list[str] | None:
    """Return the texts of a list that was written into a cell, as pandas does; None for other cells."""
    if not (cell.startswith(("['", '["')) and cell.endswith(("']", '"]'))):
        return None
    try:
        values = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else None


def _cells(lines: Sequence[str], at: int, delimiter: str, width: int, quotes: bool) -> tuple[list[str], int]:
    """Return the cells of the row that begins at a line, and the line of the next row."""
    literal = lines[at].rstrip("\r\n").split(delimiter)
    if not quotes or '"' not in lines[at]:
        return literal, at + 1
    following = (lines[each] for each in range(at, min(at + MAX_LINES, len(lines))))
    reader = csv.reader(following, delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t")
    try:
        cells = next(reader)
    except csv.Error:  # an unbalanced quote, or text after the closing quote
        return [_unquote(cell) for cell in literal], at + 1
    end = at + reader.line_num
    if len(literal) == width and end > at + 1:
        next_rows = [line.rstrip("\r\n").split(delimiter) for line in lines[at + 1 : end]]
        if all(len(row) == width and any(map(_same_column, literal, row)) for row in next_rows):
            return [_unquote(cell) for cell in literal], at + 1
    return cells, end


def _same_column(cell: str, other: str) -> bool:
    """Return whether two cells are certainly of one column: numbers, or names with the same suffix.

    Lines with such cells are separate rows, even if a quote in one is closed in another.
    """
    suffix = PurePosixPath(cell.strip(' "')).suffix[1:]
    return (cell.isdigit() and other.isdigit()) or (suffix.isalnum() and other.strip(' "').endswith(f".{suffix}"))


def _unquote(cell: str) -> str:
    inner = cell.strip()
    is_quoted = len(inner) > 1 and inner[0] == inner[-1] == '"'
    return inner[1:-1].replace('""', '"') if is_quoted else cell
