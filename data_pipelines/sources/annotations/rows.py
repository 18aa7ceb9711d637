"""Rows of annotation files: named fields, with the file and line of each row."""

import collections
import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.record import clean_text
from data_pipelines.sources.files import read_text

INNER_FIELDS = ("raw", "sent", "caption", "sentence", "text", "answer")
"""The names of the text in objects of a list."""


@functools.lru_cache(maxsize=10_000)
def normalize_name(name: str) -> str:
    """Return a field's name in lower case, without spaces, ``_`` and ``-``, which people write differently."""
    return re.sub(r"[\s_-]", "", name).casefold()


@dataclasses.dataclass(frozen=True)
class Row:
    """One row. ``values`` stays text until it is used, so that an invalid line fails only one record."""

    file: str
    number: int  # of the line or item, from 1
    values: Mapping[str, Any] | str
    error: str = ""  # why it has no fields

    @property
    def where(self) -> str:
        """Return the file and row, for messages."""
        return f"{self.file} row {self.number}"

    @property
    def key(self) -> str:
        """Return a key, stable as long as the file is."""
        return f"{PurePosixPath(self.file).stem}/{self.number}"

    def fields(self) -> Mapping[str, Any]:
        """Return field names and values.

        Raises:
            DataError: a line that is not a JSON object, or not a row of the table.
        """
        if self.error:
            raise DataError(f"{self.where} {self.error}")
        if not isinstance(self.values, str):
            return self.values
        try:
            values = parse_json(self.values)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where} is not valid JSON ({error}); fix or remove the line") from error
        if not isinstance(values, dict):
            raise DataError(f"{self.where} holds a {type(values).__name__}, expected named fields")
        return values

    def find(self, names: tuple[str, ...]) -> Any:
        """Return the value of the first of several fields that is not empty, or None."""
        return self._find(names)[1]

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """Return the field's name as the file spells it, and its value; "" and None if all are empty."""
        fields = self.fields()
        plain = {normalize_name(field): field for field in fields}
        for name in names:
            field = name if name in fields else plain.get(normalize_name(name))
            if field is None:
                continue
            try:
                if _is_present(fields[field]):
                    return field, fields[field]
            except DataError as error:
                raise DataError(f"{self.where}: {field} {error}") from error
        return "", None

    def require(self, *names: str) -> Any:
        """Return the value of the first of several fields that is not empty.

        Raises:
            DataError: all are empty; lists the row's fields, and one with a similar name.
        """
        return self._require(names)[1]

    def _require(self, names: tuple[str, ...]) -> tuple[str, Any]:
        name, value = self._find(names)
        if value is not None:
            return name, value
        plain = {normalize_name(field): field for field in self.fields()}
        if blank := [plain[normalize_name(name)] for name in names if normalize_name(name) in plain]:
            raise DataError(f"{self.where}: {blank[0]} is empty; fill it in, or remove the row")
        found = ", ".join(list(self.fields())[:12]) or "nothing"
        near = {field: difflib.get_close_matches(field.casefold(), names, n=1, cutoff=0.65) for field in self.fields()}
        hint = next((f"; rename {field} to {match[0]} if it is that" for field, match in near.items() if match), "")
        expected = " or ".join([*names[:5], *(["..."] if len(names) > 5 else [])])
        raise DataError(f"{self.where} has no {expected}; its fields are {found}{hint}")

    def text(self, *names: str) -> str:
        """Return the first of several fields as text; numbers become digits. Raises as :meth:`require`."""
        name, value = self._require(names)
        if isinstance(value, dict | list | bool):
            raise DataError(f"{self.where}: {name} is a {type(value).__name__}, expected text")
        return _text(value)

    def texts(self, *names: str) -> tuple[str, ...]:
        """Return one text or several without invisible ones; empty if there are none."""
        return tuple(filter(None, self.all_texts(*names)))

    def all_texts(self, *names: str) -> tuple[str, ...]:
        """Return one text or several, invisible ones as empty texts; empty if there are none.

        Raises:
            DataError: values other than texts, numbers, or objects with one of these in a field of ``INNER_FIELDS``.
        """
        name, value = self._find(names)
        values = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(self._inner_text(name, each) for each in values)

    def _inner_text(self, name: str, value: Any) -> str:
        if isinstance(value, dict):
            inner = [value[key] for key in INNER_FIELDS if key in value]
            if not inner:
                raise DataError(
                    f"{self.where}: {name} holds objects with the fields {', '.join(value)[:80] or 'nothing'}, "
                    f"expected texts, or one of {', '.join(INNER_FIELDS)}"
                )
            value = inner[0]
        if isinstance(value, dict | list | bool):
            raise DataError(f"{self.where}: {name} holds a {type(value).__name__}, expected texts")
        try:
            return _text(value) if _is_present(value) else ""
        except DataError as error:
            raise DataError(f"{self.where}: {name} {error}") from error


def _is_present(value: Any) -> bool:
    """Return whether a value is not empty. Raises DataError for a text that is not Unicode."""
    if isinstance(value, str):
        return bool(clean_text(value))
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return any(map(_is_present, value))
    if isinstance(value, dict) and (inner := [value[name] for name in INNER_FIELDS if name in value]):
        return _is_present(inner[0])
    return value not in (None, {})


def _text(value: Any) -> str:
    """Return a text, or a number's digits: 3.0 becomes "3", as missing values turn a column into floats."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else clean_text(str(value))


def nan_to_none(constant: str) -> None:
    """Parse NaN and Infinity, which pandas writes for missing values, as None."""
    del constant


parse_json = functools.partial(json.loads, parse_constant=nan_to_none)
"""``json.loads`` with NaN and Infinity as missing values."""


def read_json(path: str) -> Any:
    """Return the content of a JSON file; a list may have a trailing comma.

    Raises:
        DataError: the file is missing, not UTF-8, or damaged (with the line).
    """
    text = read_text(path).read().strip()
    items = text[:-1].rstrip()
    if text.endswith("]") and items.endswith(","):
        text = f"{items[:-1]}]"
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); it is damaged or of another format") from error


def filter_split(rows: Iterator[Row], split: str, field: str) -> Iterator[Row]:
    """Yield the rows of the requested splits, and unreadable rows.

    Raises:
        DataError: no row is of a requested split; lists the splits of the file.
    """
    requested, seen, found = set(filter(None, split.split("+"))), collections.Counter[str](), False
    for row in rows:
        try:
            row_split = str(row.find((field,)) or "") if requested else ""
        except DataError:
            yield row
            continue
        seen[row_split] += 1
        if not requested or row_split in requested:
            found = True
            yield row
    if requested and not found:
        raise DataError(f"split '{split}' is not in the file; its splits are {', '.join(sorted(seen)[:20]) or 'none'}")
