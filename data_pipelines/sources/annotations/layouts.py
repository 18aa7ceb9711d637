"""The layouts of rows in files: tables, JSON lines, lists, and objects that wrap them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

from absl import logging

from data_pipelines.errors import DataError
from data_pipelines.sources.annotations.rows import Row, nan_to_none, normalize_name, read_json
from data_pipelines.sources.annotations.tables import read_table
from data_pipelines.sources.files import media_kind, read_text

ROW_KEY_FIELD = "name in the file"
"""The field for the key of a row in an object of rows."""

_METADATA_FIELDS = frozenset({"comment", "desc", "description", "text"})  # which may also describe a file

Fields = Mapping[str, Any]


def read_rows(path: str, known: Set[str]) -> Iterator[Row]:
    """Yield the rows of a file: a table, JSON lines, concatenated JSON objects, a JSON list, or an object of rows.

    Args:
        path: the file.
        known: normalized names of the fields that identify a row.

    Raises:
        DataError: the file is missing, not UTF-8, of another format, or has no rows.
    """
    if path.lower().endswith((".csv", ".tsv")):
        yield from read_table(path, known)
        return
    file = read_text(path)
    stripped = (line.strip().lstrip("\ufeff") for line in file)  # byte order marks of concatenated files
    lines = [(number, line) for number, line in enumerate(stripped, 1) if line]
    first_characters = [line[0] for _, line in lines[:2]]
    if not first_characters:
        return
    if first_characters[0] == "[":
        yield from _items(path, read_json(path))
    elif first_characters[0] != "{":
        yield from read_table(path, known)
    elif len(lines) > 1 and _parse_sequence(lines[0][1], max_values=1) is not None:
        yield from _lines(path, lines)
    elif values := _parse_sequence(file.getvalue()):
        is_object = len(values) == 1 and isinstance(values[0], dict)
        yield from _items(path, _rows_of_object(path, values[0], known) if is_object else values)
    elif first_characters == ["{", "{"] or len(lines) == 1:
        yield from _lines(path, lines)
    else:
        read_json(path)  # reports where it is damaged


def _lines(path: str, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    """Return a row for each line, not parsed yet."""
    return (Row(path, number, line.rstrip(",")) for number, line in lines)


def _items(path: str, items: Iterable[Any]) -> Iterator[Row]:
    for number, item in enumerate(items, 1):
        yield Row(path, number, item if isinstance(item, dict) else json.dumps(item))


def _parse_sequence(text: str, max_values: int | None = None) -> list[Any] | None:
    """Return JSON values separated by white space or commas; None for other content."""
    decoder, values, at = json.JSONDecoder(parse_constant=nan_to_none), list[Any](), 0
    try:
        while at < len(text):
            if text[at].isspace() or text[at] == ",":
                at += 1
            elif len(values) == max_values:
                return None
            else:
                value, at = decoder.raw_decode(text, at)
                values.append(value)
    except (ValueError, RecursionError):
        return None
    return values


def _rows_of_object(path: str, content: Fields, known: Set[str]) -> Sequence[Fields]:
    """Return the rows of an object: MSRVTT's, lists by split, columns, or rows by key; else the object is one row.

    Raises:
        DataError: the object is of another format.
    """
    if isinstance(content.get("videos"), list) and isinstance(content.get("sentences"), list):
        return _msrvtt(path, content["videos"], content["sentences"])
    if format := detect_format(content):
        fields = ", ".join(list(content)[:4])
        raise DataError(f"{path} has format '{format}' by its fields {fields}; set the source's format")
    known_names = [name for name in content if normalize_name(name) in known]
    lists = {name: rows for name, rows in content.items() if name not in known_names and _are_objects(rows)}
    texts = [normalize_name(name) for name in known_names if isinstance(content[name], str)]
    if lists and _METADATA_FIELDS.issuperset(texts):
        return [{"split": name, **row} for name, rows in lists.items() for row in rows]
    columns, cells = content.get("columns"), content.get("data")
    if isinstance(columns, list) and isinstance(cells, list) and all(isinstance(row, list) for row in cells):
        return [dict(zip(map(str, columns), row, strict=False)) for row in cells]
    if table := _transpose(content, known_names):
        return table
    if known_names:
        return [content]
    inner = {name: rows for name, rows in content.items() if isinstance(rows, dict) and rows}
    if inner and len(inner) == len(content) and all(_are_rows_by_key(rows, known) for rows in inner.values()):
        return [{"split": name, **row} for name, rows in inner.items() for row in _rows_by_key(rows)]
    if len(inner) == 1 and not any(normalize_name(name) in known for rows in inner.values() for name in rows):
        return _rows_of_object(path, next(iter(inner.values())), known)  # next to a version, a license and the like
    if len(inner) == len(content) or all(isinstance(row, list) or media_kind(name) for name, row in content.items()):
        return _rows_by_key(content)
    return [content]


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _are_rows_by_key(rows: Fields, known: Set[str]) -> bool:
    return all(isinstance(row, dict) and normalize_name(name) not in known for name, row in rows.items())


def _rows_by_key(rows: Fields) -> list[Fields]:
    """Return the rows of an object by key; a value that is not a row is its captions."""
    return [
        {ROW_KEY_FIELD: name, **(row if isinstance(row, dict) else {"captions": row})} for name, row in rows.items()
    ]


def _transpose(content: Fields, known_names: Sequence[str]) -> list[Fields]:
    """Return the rows of columns, as pandas writes them; empty for other objects."""
    columns = {
        name: list(cells.values()) if isinstance(cells, dict) else cells
        for name, cells in content.items()
        if isinstance(cells, dict | list)
    }
    lengths = {len(columns.get(name, ())) for name in known_names}
    if len(known_names) < 2 or not set(known_names) <= set(columns) or len(lengths) > 1:
        return []
    columns = {name: cells for name, cells in columns.items() if len(cells) in lengths}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _msrvtt(path: str, videos: Sequence[Any], sentences: Sequence[Any]) -> list[Fields]:
    captions = group_by_id(path, sentences, "video_id", "caption", [video.get("video_id") for video in videos])
    return [{**video, "captions": captions.get(normalize_id(video.get("video_id")), [])} for video in videos]


def normalize_id(value: Any) -> str:
    """Return an id in a normal form: "000042", 42 and 42.0 are equal."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text.lstrip("0") or "0" if text.isdecimal() else text


def group_by_id(path: str, items: Iterable[Any], id: str, field: str, listed: Iterable[Any]) -> dict[str, list[Any]]:
    """Return the values of a field, grouped by the id that each item refers to.

    Items whose id is not listed are skipped, as in subsets of a data set; a warning counts them.
    """
    groups: dict[str, list[Any]] = {normalize_id(each): [] for each in listed}
    unlisted = list[str]()
    for item in items:
        item_id = normalize_id(item.get(id)) if isinstance(item, dict) else "none"
        if item_id in groups:
            groups[item_id].append(item.get(field))
        else:
            unlisted.append(item_id)
    if unlisted:
        logging.warning(
            "%s: skipped %d %s entries whose %s is not listed; the first is %a",
            path, len(unlisted), field, id, unlisted[0][:60],
        )  # fmt: skip
    return groups


def detect_format(content: Any) -> str:
    """Return the public format of a JSON file's content; empty if unknown."""

    def has_list(name: str, *fields: str) -> bool:
        rows = content.get(name)
        return _are_objects(rows) and set(fields) <= set(rows[0])

    if not isinstance(content, dict) or not content:
        return ""
    if has_list("images", "sentences"):
        return "karpathy"
    if has_list("images", "id") and isinstance(content.get("annotations"), list):
        return "coco_captions"
    is_questions = has_list("questions", "question_id") and not (
        has_list("questions", "answer") or has_list("questions", "answers")
    )
    if is_questions or (has_list("annotations", "question_id", "answers") and not has_list("annotations", "question")):
        return "vqa_v2"
    first = next(iter(content.values()))
    annotation = first.get("annotations") if isinstance(first, dict) else None
    return "kinetics" if isinstance(annotation, dict) and "segment" in annotation else ""
