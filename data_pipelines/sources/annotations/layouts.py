"""The shapes in which people keep rows of named fields: lines, lists, and objects that wrap them."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.sources.annotations.rows import Row, as_missing, normalize_name, read_json
from data_pipelines.sources.annotations.tables import read_table
from data_pipelines.sources.files import media_kind, read_text

ENTRY_NAME = "name in the file"
"""The field of what an object calls a row of it."""

_OF_FILES = frozenset({"comment", "desc", "description", "text"})  # which may say something of a file, too

Fields = Mapping[str, Any]


def read_rows(path: str, known: Set[str]) -> Iterator[Row]:
    """The rows of a file: a table, JSON lines, JSON objects one after the other, a JSON list, or an object of rows.

    Args:
        path: the file.
        known: plain names of the fields that say what a row is of.

    Raises:
        DataError: missing, not UTF-8, or a file that cannot be cut into rows, or that is of another format.
    """
    if path.lower().endswith((".csv", ".tsv")):
        yield from read_table(path, known)
        return
    file = read_text(path)
    stripped = (line.strip().lstrip("\ufeff") for line in file)  # the marks of files that were joined
    lines = [(number, line) for number, line in enumerate(stripped, 1) if line]
    begins = [line[0] for _, line in lines[:2]]
    if not begins:
        return
    if begins[0] == "[":
        yield from _items(path, read_json(path))
    elif begins[0] != "{":
        yield from read_table(path, known)
    elif len(lines) > 1 and _sequence(lines[0][1], most=1) is not None:
        yield from _lines(path, lines)
    elif values := _sequence(file.getvalue()):
        alone = len(values) == 1 and isinstance(values[0], dict)
        yield from _items(path, _objects_in(path, values[0], known) if alone else values)
    elif begins == ["{", "{"] or len(lines) == 1:
        yield from _lines(path, lines)
    else:
        read_json(path)  # says where it is damaged


def _lines(path: str, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    """A row for each line, not parsed yet."""
    return (Row(path, number, line.rstrip(",")) for number, line in lines)


def _items(path: str, items: Iterable[Any]) -> Iterator[Row]:
    for number, item in enumerate(items, 1):
        yield Row(path, number, item if isinstance(item, dict) else json.dumps(item))


def _sequence(text: str, most: int | None = None) -> list[Any] | None:
    """Values that stand one after the other, white space or commas between them; None where there is anything else."""
    decoder, values, at = json.JSONDecoder(parse_constant=as_missing), list[Any](), 0
    try:
        while at < len(text):
            if text[at].isspace() or text[at] == ",":
                at += 1
            elif len(values) == most:
                return None
            else:
                value, at = decoder.raw_decode(text, at)
                values.append(value)
    except (ValueError, RecursionError):
        return None
    return values


def _objects_in(path: str, content: Fields, known: Set[str]) -> Sequence[Fields]:
    """The rows of an object: MSRVTT's, lists by their split, columns, rows by their names; else it is one row itself.

    Raises:
        DataError: it is of another format.
    """
    if isinstance(content.get("videos"), list) and isinstance(content.get("sentences"), list):
        return _msrvtt(path, content["videos"], content["sentences"])
    if form := detect_format(content):
        raise DataError(f"{path} is of format '{form}', by its {', '.join(list(content)[:4])}; read it as that")
    ours = [name for name in content if normalize_name(name) in known]
    lists = {name: rows for name, rows in content.items() if name not in ours and _are_objects(rows)}
    if lists and not any(isinstance(content[name], str) and normalize_name(name) not in _OF_FILES for name in ours):
        return [{"split": name, **row} for name, rows in lists.items() for row in rows]
    columns, cells = content.get("columns"), content.get("data")
    if isinstance(columns, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        return [dict(zip(map(str, columns), row, strict=False)) for row in cells]
    if table := _transposed(content, ours):
        return table
    if ours:
        return [content]
    inner = {name: rows for name, rows in content.items() if isinstance(rows, dict) and rows}
    if inner and len(inner) == len(content) and all(_are_named(rows, known) for rows in inner.values()):
        return [{"split": name, **row} for name, rows in inner.items() for row in _named(rows)]
    if len(inner) == 1 and not any(normalize_name(name) in known for rows in inner.values() for name in rows):
        return _objects_in(path, next(iter(inner.values())), known)  # beside it are a version, a licence and the like
    if len(inner) == len(content) or all(isinstance(said, list) or media_kind(name) for name, said in content.items()):
        return _named(content)
    return [content]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _are_named(rows: Fields, known: Set[str]) -> bool:
    return all(isinstance(row, dict) and normalize_name(name) not in known for name, row in rows.items())


def _named(rows: Fields) -> list[Fields]:
    """Rows that an object calls by names, or captions of what it calls so."""
    return [{ENTRY_NAME: name, **(row if isinstance(row, dict) else {"captions": row})} for name, row in rows.items()]


def _transposed(content: Fields, ours: Sequence[str]) -> list[Fields]:
    """The rows of columns, as pandas writes them; none if these are no columns."""
    columns = {
        name: list(cells.values()) if isinstance(cells, dict) else cells
        for name, cells in content.items()
        if isinstance(cells, dict | list)
    }
    if len(ours) < 2 or not set(ours) <= set(columns) or len({len(columns[name]) for name in ours}) > 1:
        return []
    rows = len(columns[ours[0]])
    columns = {name: cells for name, cells in columns.items() if len(cells) == rows}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _msrvtt(path: str, videos: Sequence[Any], sentences: Sequence[Any]) -> list[Fields]:
    said = group_by_id(path, sentences, "video_id", "caption", [video.get("video_id") for video in videos])
    return [{**video, "captions": said.get(normalize_id(video.get("video_id")), [])} for video in videos]


def normalize_id(value: Any) -> str:
    """Return an id in the form that is compared: "000042", 42 and 42.0 are one."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text.lstrip("0") or "0" if text.isdecimal() else text


def group_by_id(path: str, items: Iterable[Any], id: str, field: str, listed: Iterable[Any]) -> dict[str, list[Any]]:
    """Return a field of items, grouped by the id that each refers to.

    Items whose id is not listed are left out, as in subsets of a data set; a warning counts them.
    """
    said: dict[str, list[Any]] = {normalize_id(each): [] for each in listed}
    strange = list[str]()
    for item in items:
        its = normalize_id(item.get(id)) if isinstance(item, dict) else "none"
        if its in said:
            said[its].append(item.get(field))
        else:
            strange.append(its)
    if strange:
        warnings.warn(
            f"{path}: {len(strange):,} of its {field} entries are left out: their {id} is not listed, the first is "
            f"{strange[0][:60]!a}",
            stacklevel=2,
        )
    return said


def detect_format(content: Any) -> str:
    """The public format that a JSON file is of, by its shape; empty: none of those that are known."""

    def has(name: str, *fields: str) -> bool:
        rows = content.get(name)
        return _are_objects(rows) and set(fields) <= set(rows[0])

    if not isinstance(content, dict) or not content:
        return ""
    if has("images", "sentences"):
        return "karpathy"
    if has("images", "id") and isinstance(content.get("annotations"), list):
        return "coco_captions"
    asked = has("questions", "question_id") and not (has("questions", "answer") or has("questions", "answers"))
    if asked or (has("annotations", "question_id", "answers") and not has("annotations", "question")):
        return "vqa_v2"
    first = next(iter(content.values()))
    said = first.get("annotations") if isinstance(first, dict) else None
    return "kinetics" if isinstance(said, dict) and "segment" in said else ""
