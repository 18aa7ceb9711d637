"""WebDataset tars, as img2dataset and video2dataset write them, read in place."""

import dataclasses
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from absl import logging

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import HEAD_BYTES, Media
from data_pipelines.record import Record, locate
from data_pipelines.sources.annotations import fields
from data_pipelines.sources.annotations.rows import Row, normalize_name, parse_json
from data_pipelines.sources.annotations.source import MediaContext
from data_pipelines.sources.files import decode_text, find_files, media_kind, resolve_kind
from data_pipelines.sources.indexed_tars import TarSet
from data_pipelines.sources.tar_index import Members
from data_pipelines.sources.tar_scan import DUPLICATED

_IGNORED = frozenset(normalize_name(name) for name in (*fields.IMAGE_FIELDS, *fields.ID_FIELDS))
_KNOWN = (
    *fields.CAPTION_FIELDS, *fields.TEXT_FIELDS, "question", *fields.SUMMARY_FIELDS, *fields.BOX_FIELDS,
    *fields.LABEL_FIELDS,
)  # fmt: skip
_TEXTS = (".txt", ".json", ".cls")


class WebDatasetSource:
    """The samples of one or many tars: an image or video with ``.txt``, ``.json`` or ``.cls``.

    A record's key is the tar's name and the sample's, with folders if tars in several share a name. The JSON's fields
    are read as those of annotation files; a ``.txt`` is the caption, and a ``.cls`` the label.

    Args:
        path: a tar, a folder of tars, or a pattern ("shards/{00000..00127}.tar", "gs://bucket/*.tar").
        kind: what to read from samples with several kinds of members; "text" reads no media.
        index: folder of the tars' indexes; empty: next to the tars.

    Raises:
        DataError: no such file, or one that is truncated, compressed or not a tar.
    """

    def __init__(self, path: str, kind: Kind, index: str = "") -> None:
        self._kind = kind
        files = find_files(path, ".tar")
        tars = TarSet(files, index)
        if tars.missing:
            logging.info(
                "scanning %d of %d tars of %s, which have no index; once for all hosts: mplug2 data index %s%s",
                len(tars.missing), len(files), path, shlex.quote(path), index and f" --index {shlex.quote(index)}",
            )  # fmt: skip
            tars.build()
        self._tars, self._names = tars.tars, _names([file.path for file in files])
        self._ends = list(itertools.accumulate(map(len, self._tars)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        shard, row = locate(index, self._ends, "sample")
        tar, archive = self._tars[shard], self._names[shard]
        name, members = tar[row]
        key = f"{archive.removesuffix('.tar')}/{name}"
        if DUPLICATED in members:
            raise DataError(f"sample {key} has duplicate members in an ambiguous order; write each sample once")
        media = self._media_of(members)
        data = tar.read(members, [ext for ext in (*_TEXTS, *media[:1]) if ext in members])
        texts = {ext: decode_text(data[ext], f"{ext} of sample {key}") for ext in _TEXTS if ext in members}
        values = _parse_json(texts.get(".json"), key)
        record, changes = self._read_json_fields(key, values, f"{archive}:{name}.json"), dict[str, Any]()
        if ".txt" in texts:
            is_text = self._kind == "text"
            changes |= {"texts" if is_text else "captions": (texts[".txt"],), "captions" if is_text else "texts": ()}
        elif self._kind != "text":
            changes["captions"] = record.captions or record.texts
        if ".cls" in texts:
            changes["label"] = texts[".cls"]
        if self._kind != "text":
            read = ((ext, data[ext] if ext in data else tar.read(members, [ext])[ext]) for ext in media)
            changes["media"] = self._choose(read, f"{archive}:{name}")
            if changes["media"] is None:
                reason = ": ".join(str(values[name]) for name in ("status", "error_message") if values.get(name))
                raise DataError(
                    f"sample {key} has no {self._kind}, only {', '.join(members)}{reason and f' ({reason})'}; remove it"
                )
        return dataclasses.replace(record, key=key, visual_id="", **changes)

    def _read_json_fields(self, key: str, values: Mapping[str, Any], where: str) -> Record:
        """Return a record of a sample's JSON fields; those that name its media or itself are ignored."""
        row = Row(where, 1, {name: value for name, value in values.items() if normalize_name(name) not in _IGNORED})
        return Record(key) if row.find(_KNOWN) is None else fields.to_record(row, MediaContext("", self._kind))

    def _media_of(self, members: Members) -> list[str]:
        """Return the extensions of a sample's media, those of the source's kind first."""
        if self._kind == "text":
            return []
        kinds = {extension: kind for extension in members if (kind := media_kind(f"x{extension}"))}
        return sorted(kinds, key=lambda extension: kinds[extension] != self._kind)

    def _choose(self, members: Iterator[tuple[str, bytes]], name: str) -> Media | None:
        """Return the first media of the source's kind, by their content where their name does not decide."""
        fallback = None
        for extension, data in members:
            file = f"x{extension}"
            kind = resolve_kind(file, self._kind, lambda data=data: data[:HEAD_BYTES]) or media_kind(file)
            assert kind is not None
            media = Media(kind, data, f"{name}{extension}")
            if kind == self._kind:
                return media
            fallback = fallback or media
        return fallback


def _names(files: Sequence[str]) -> list[str]:
    """Return the names of files, with folders only if names would collide."""
    parts = [PurePosixPath(file).parts for file in files]
    if len({names[-1] for names in parts}) == len(parts):
        return [names[-1] for names in parts]
    num_common = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), -1)
    return ["/".join(names[num_common:]) for names in parts]


def _parse_json(text: str | None, key: str) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        fields = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f".json of sample {key} is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f".json of sample {key} holds a {type(fields).__name__}, expected named fields")
    return fields
