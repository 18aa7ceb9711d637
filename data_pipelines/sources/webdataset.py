"""WebDataset tars, as img2dataset and video2dataset write them, read in place."""

import bisect
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import HEAD, Media
from data_pipelines.record import Record
from data_pipelines.sources.annotations import fields
from data_pipelines.sources.annotations.rows import Row
from data_pipelines.sources.annotations.source import Place
from data_pipelines.sources.files import decode_text, find_files, kind_for, media_kind
from data_pipelines.sources.tar_index import AGAIN, TarIndex

_OF_FILES = frozenset(name.casefold() for name in (*fields.PICTURE, *fields.IDS))
_KNOWN = (*fields.CAPTIONS, *fields.TEXTS, "question", *fields.SUMMARY, *fields.BOX, *fields.LABEL)


class WebDatasetSource:
    """The samples of one or many tars: a picture or clip with ``.txt``, ``.json`` or ``.cls`` beside it.

    A record's key is the tar's name and the sample's; where tars of several folders have one name, with the folders.
    The JSON's fields are read as those of annotation files, but a ``.txt`` is the caption, and a ``.cls`` the label.

    Args:
        path: a tar, a folder of tars, or a pattern ("shards/{00000..00127}.tar", "gs://bucket/*.tar").
        kind: what is taken from samples that hold several things; "text" takes no media.

    Raises:
        DataError: no tar, or one that is cut off, compressed or no tar at all.
    """

    def __init__(self, path: str, kind: Kind) -> None:
        self._kind = kind
        files = find_files(path, ".tar")
        self._tars, self._names = [TarIndex(file) for file in files], _names(files)
        self._ends = list(itertools.accumulate(map(len, self._tars)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        tar, archive = self._tars[shard], self._names[shard]
        name, members = tar[index - (self._ends[shard - 1] if shard else 0)]
        key = f"{archive.removesuffix('.tar')}/{name}"
        if AGAIN in members:
            raise DataError(f"sample {key} has members twice, and nothing tells which belong together; write it anew")
        texts = {
            ext: decode_text(tar.read(members, ext), f"{ext} of sample {key}")
            for ext in (".txt", ".json", ".cls")
            if ext in members
        }
        values = _json(texts.get(".json"), key)
        record = self._said(key, values, f"{archive}:{name}.json")
        if ".txt" in texts:
            said, of_text = tuple(filter(None, [texts[".txt"].strip()])), self._kind == "text"
            record = dataclasses.replace(record, captions=() if of_text else said, texts=said if of_text else ())
        if ".cls" in texts:
            record = dataclasses.replace(record, label=texts[".cls"].strip())
        if self._kind == "text":
            return record
        media = self._media(tar, members, f"{archive}:{name}")
        if media is None:
            why = ": ".join(str(values[name]) for name in ("status", "error_message") if values.get(name))
            raise DataError(
                f"sample {key} has no {self._kind}, only {', '.join(members)}{why and f' ({why})'}; leave it out"
            )
        return dataclasses.replace(record, media=media)

    def _said(self, key: str, values: Mapping[str, Any], where: str) -> Record:
        """What the fields of a sample's JSON say; what they call its picture is not looked for."""
        row = Row(where, 1, {name: value for name, value in values.items() if name.casefold() not in _OF_FILES})
        if row.find(_KNOWN) is None:
            return Record(key)
        record = dataclasses.replace(fields.make(row, Place("", self._kind)), key=key, picture="")
        return record if self._kind == "text" else dataclasses.replace(record, captions=record.captions or record.texts)

    def _media(self, tar: TarIndex, members: Mapping[str, tuple[int, int]], name: str) -> Media | None:
        named = {extension: kind for extension in members if (kind := media_kind(f"x{extension}"))}
        other = None
        for extension in sorted(named, key=lambda extension: named[extension] != self._kind):
            data = tar.read(members, extension)
            kind = kind_for(f"x{extension}", self._kind, lambda data=data: data[:HEAD]) or named[extension]
            media = Media(kind, data, f"{name}{extension}")
            if kind == self._kind:
                return media
            other = other or media
        return other


def _names(files: Sequence[str]) -> list[str]:
    """The names of files without their folders, as far as those differ."""
    parts = [PurePosixPath(file).parts for file in files]
    if len({names[-1] for names in parts}) == len(parts):
        return [names[-1] for names in parts]
    same = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), -1)
    return ["/".join(names[same:]) for names in parts]


def _json(text: str | None, key: str) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        fields = json.loads(text, parse_constant=lambda constant: None)  # NaN stands for what is missing
    except (ValueError, RecursionError) as error:
        raise DataError(f".json of sample {key} is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f".json of sample {key} holds a {type(fields).__name__}, expected named fields")
    return fields
