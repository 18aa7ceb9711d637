"""Rows of annotation files: named fields, each row knowing its file and line."""

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

INNER = ("raw", "sent", "caption", "sentence", "text", "answer")
"""Under which names objects in a list keep their text."""


@functools.lru_cache(maxsize=10_000)
def normalize_name(name: str) -> str:
    """Return a field's name without what people write it differently in: case, spaces, ``_`` and ``-``."""
    return re.sub(r"[\s_-]", "", name).casefold()


@dataclasses.dataclass(frozen=True)
class Row:
    """One row. ``values`` stays text until it is asked for, so that a bad line spoils one record and no more."""

    file: str
    number: int  # of the line or item, from 1
    values: Mapping[str, Any] | str
    fault: str = ""  # why it has no fields

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
            DataError: a line that is no JSON object, or could not be cut into cells.
        """
        if self.fault:
            raise DataError(f"{self.where} {self.fault}")
        if not isinstance(self.values, str):
            return self.values
        try:
            values = parse_json(self.values)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where} is not valid JSON ({error}); mend or remove the line") from error
        if not isinstance(values, dict):
            raise DataError(f"{self.where} holds a {type(values).__name__}, expected named fields")
        return values

    def find(self, names: tuple[str, ...]) -> Any:
        """The value of the first of several names that holds anything, or None."""
        return self._find(names)[1]

    def _find(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """Return the field's name as the file spells it, and its value; "" and None where no field holds anything."""
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

    def need(self, *names: str) -> Any:
        """The value of the first of several names that holds anything.

        Raises:
            DataError: none does; names what there is, and what is nearest to a name that would be read.
        """
        return self._need(names)[1]

    def _need(self, names: tuple[str, ...]) -> tuple[str, Any]:
        name, value = self._find(names)
        if value is not None:
            return name, value
        plain = {normalize_name(field): field for field in self.fields()}
        if blank := [plain[normalize_name(name)] for name in names if normalize_name(name) in plain]:
            raise DataError(f"{self.where} has nothing in its {blank[0]}; fill it in, or remove the row")
        found = ", ".join(list(self.fields())[:12]) or "nothing"
        near = {field: difflib.get_close_matches(field.casefold(), names, n=1, cutoff=0.65) for field in self.fields()}
        hint = next((f"; call {field} {match[0]}, if it is that" for field, match in near.items() if match), "")
        wanted = " or ".join([*names[:5], *(["..."] if len(names) > 5 else [])])
        raise DataError(f"{self.where} has no {wanted}; its fields are {found}{hint}")

    def text(self, *names: str) -> str:
        """The first of several names as text; numbers become their digits. Raises as :meth:`need`."""
        name, value = self._need(names)
        if isinstance(value, dict | list | bool):
            raise DataError(f"{self.where}: {name} is a {type(value).__name__}, expected text")
        return _text(value)

    def texts(self, *names: str) -> tuple[str, ...]:
        """One text or several, those left out of which nothing would be seen; empty if there are none."""
        return tuple(filter(None, self.all_texts(*names)))

    def all_texts(self, *names: str) -> tuple[str, ...]:
        """One text or several, those of which nothing would be seen as empty ones; empty if there are none.

        Raises:
            DataError: something else than texts, numbers, or objects that hold one of these under a name of ``INNER``.
        """
        name, value = self._find(names)
        values = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(self._inner(name, each) for each in values)

    def _inner(self, name: str, value: Any) -> str:
        if isinstance(value, dict):
            inner = [value[key] for key in INNER if key in value]
            if not inner:
                raise DataError(
                    f"{self.where}: {name} holds objects with the fields {', '.join(value)[:80] or 'nothing'}, "
                    f"expected texts, or one of {', '.join(INNER)}"
                )
            value = inner[0]
        if isinstance(value, dict | list | bool):
            raise DataError(f"{self.where}: {name} holds a {type(value).__name__}, expected texts")
        try:
            return _text(value) if _is_present(value) else ""
        except DataError as error:
            raise DataError(f"{self.where}: {name} {error}") from error


def _is_present(value: Any) -> bool:
    """Whether there is anything in a value. Raises DataError for a text that is no Unicode."""
    if isinstance(value, str):
        return bool(clean_text(value))
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return any(map(_is_present, value))
    if isinstance(value, dict) and (inner := [value[name] for name in INNER if name in value]):
        return _is_present(inner[0])
    return value not in (None, {})


def _text(value: Any) -> str:
    """A text, or a number's digits: what became a float, because others in its column are missing, is whole again."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else clean_text(str(value))


def as_missing(constant: str) -> None:
    """Parse NaN and Infinity, which pandas writes for missing values, as None."""
    del constant


parse_json = functools.partial(json.loads, parse_constant=as_missing)
"""``json.loads``, for which NaN and Infinity are missing values."""


def read_json(path: str) -> Any:
    """A whole JSON file; a list may have a comma behind its last item.

    Raises:
        DataError: missing, not UTF-8, or damaged (with the line).
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
    """The rows of the wanted splits, and those that cannot be read.

    Raises:
        DataError: no row is of any of them; names those there are.
    """
    wanted, seen, found = set(filter(None, split.split("+"))), collections.Counter[str](), False
    for row in rows:
        try:
            its = str(row.find((field,)) or "") if wanted else ""
        except DataError:
            yield row
            continue
        seen[its] += 1
        if not wanted or its in wanted:
            found = True
            yield row
    if wanted and not found:
        raise DataError(f"split '{split}' is none of the file's: {', '.join(sorted(seen)[:20]) or 'it has no rows'}")
