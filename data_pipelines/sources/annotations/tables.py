"""Tables as files: CSV, TSV and their like, cut into rows so that a bad quote spoils one row and no more."""

import ast
import csv
from collections.abc import Iterator, Sequence, Set
from pathlib import PurePosixPath

from data_pipelines.errors import DataError
from data_pipelines.sources.annotations.rows import Row, normalize_name
from data_pipelines.sources.files import read_text

MAX_CELL = 10_000_000
"""Characters of one cell."""
MAX_LINES = 10_000
"""Of one cell."""

DELIMITERS = (",", "\t", ";", "|")
_MISSING = frozenset({"nan", "NaN"})  # what pandas makes of an empty cell that is written as text


def read_table(
    path: str, known: Set[str] = frozenset(), *, columns: tuple[str, ...] = (), quotes: bool = True
) -> Iterator[Row]:
    """The rows of a table, whose delimiter is the one that its header has.

    A cell in quotes may hold delimiters, doubled quotes and line ends. One that only begins with a quote is taken to
    the letter.

    Args:
        path: the file.
        known: plain names of fields, one of which a header has; empty: any.
        columns: names of those of a file without a header.
        quotes: whether they mean anything; in GLUE's files they do not.

    Raises:
        DataError: missing, not UTF-8, or a header without any known field.
    """
    csv.field_size_limit(MAX_CELL)
    lines, at = list(read_text(path)), 0
    usual = "\t" if path.lower().endswith(".tsv") or not quotes else ","
    delimiter, header = usual, list(columns)
    if lines and not header:
        while at < len(lines) - 1 and not lines[at].strip():
            at += 1
        tried = (usual, *DELIMITERS) if known else (usual,)
        candidates = {each: _cells(lines, at, each, 0, quotes) for each in tried}
        matching = {
            each: len({normalize_name(name) for name in cells} & known) for each, (cells, _) in candidates.items()
        }
        delimiter = max(matching, key=lambda each: matching[each])  # the usual one, of equals
        if known and not matching[delimiter]:
            raise DataError(
                f"{path} begins with the line {lines[at].strip()[:80]!a}, expected a header that names what is in the "
                "columns, such as 'image,caption'; write it as the first line"
            )
        header, at = candidates[delimiter]
        header = [name.strip() for name in header]
    while at < len(lines):
        first = at
        cells, at = _cells(lines, at, delimiter, len(header), quotes)
        if not any(map(str.strip, cells)) or [cell.strip(" \ufeff") for cell in cells] == header:  # of joined files
            continue
        while len(cells) > len(header) and not cells[-1].strip():  # of delimiters that end a line
            cells.pop()
        fault = ""
        if len(cells) > len(header):
            fault = f"has {len(cells)} cells, expected the header's {len(header)}; put those with delimiters in quotes"
        yield Row(path, first + 1, _named(header, cells) if quotes else dict(zip(header, cells, strict=False)), fault)


def _named(header: Sequence[str], cells: Sequence[str]) -> dict[str, str | list[str]]:
    """The cells by their columns' names; columns of the same name are one list."""
    named: dict[str, str | list[str]] = {}
    for name, cell in zip(header, cells, strict=False):
        value = "" if cell in _MISSING else _listed(cell) or cell
        if name in named:
            value = [each for part in (named[name], value) for each in (part if isinstance(part, list) else [part])]
        named[name] = value
    return named


def _listed(cell: str) -> list[str] | None:
    """The texts of a list that was written into a cell, as pandas does; None if it is none."""
    if not (cell.startswith(("['", '["')) and cell.endswith(("']", '"]'))):
        return None
    try:
        values = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else None


def _cells(lines: Sequence[str], at: int, delimiter: str, width: int, quotes: bool) -> tuple[list[str], int]:
    """The cells of the row that begins at a line, and the line at which the next one begins."""
    literal = lines[at].rstrip("\r\n").split(delimiter)
    if not quotes or '"' not in lines[at]:
        return literal, at + 1
    following = (lines[each] for each in range(at, min(at + MAX_LINES, len(lines))))
    reader = csv.reader(following, delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t")
    try:
        cells = next(reader)
    except csv.Error:  # a quote that none ends, or behind which the cell goes on
        return [_unquoted(cell) for cell in literal], at + 1
    end = at + reader.line_num
    if len(literal) == width and end > at + 1:
        further = [line.rstrip("\r\n").split(delimiter) for line in lines[at + 1 : end]]
        if all(len(row) == width and any(map(_alike, literal, row)) for row in further):
            return [_unquoted(cell) for cell in literal], at + 1
    return cells, end


def _alike(cell: str, other: str) -> bool:
    """Whether two cells are of one column for sure: numbers, or names with the same suffix.

    Lines that have such cells are rows of their own, even if one has a quote that ends in another.
    """
    suffix = PurePosixPath(cell.strip(' "')).suffix[1:]
    return (cell.isdigit() and other.isdigit()) or (suffix.isalnum() and other.strip(' "').endswith(f".{suffix}"))


def _unquoted(cell: str) -> str:
    inner = cell.strip()
    whole = len(inner) > 1 and inner[0] == inner[-1] == '"'
    return inner[1:-1].replace('""', '"') if whole else cell
