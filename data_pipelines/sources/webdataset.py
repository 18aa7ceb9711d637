"""WebDataset tars, as img2dataset and video2dataset write them, read in place."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import HEAD_BYTES, Media
from data_pipelines.record import Record, locate
from data_pipelines.sources.annotations import fields
from data_pipelines.sources.annotations.rows import Row, normalize_name, parse_json
from data_pipelines.sources.annotations.source import MediaContext
from data_pipelines.sources.files import decode_text, find_files, media_kind, resolve_kind
from data_pipelines.sources.tar_index import DUPLICATED, TarIndex

_IGNORED = frozenset(normalize_name(name) for name in (*fields.IMAGE_FIELDS, *fields.ID_FIELDS))
_KNOWN = (
    *fields.CAPTION_FIELDS, *fields.TEXT_FIELDS, "question", *fields.SUMMARY_FIELDS, *fields.BOX_FIELDS,
    *fields.LABEL_FIELDS,
)  # fmt: skip


class WebDatasetSource:
    """The samples of one or many tars: an image or video with ``.txt``, ``.json`` or ``.cls``.

    A record's key is the tar's name and the sample's, with folders if tars in several share a name. The JSON's fields
    are read as those of annotation files; a ``.txt`` is the caption, and a ``.cls`` the label.

    Args:
        path: a tar, a folder of tars, or a pattern ("shards/{00000..00127}.tar", "gs://bucket/*.tar").
        kind: what to read from samples with several kinds of members; "text" reads no media.

    Raises:
        DataError: no such file, or one that is truncated, compressed or not a tar.
    """

    def __init__(self, path: str, kind: Kind) -> None:
        self._kind = kind
        files = find_files(path, ".tar")
        self._tars, self._names = [TarIndex(file) for file in files], _names(files)
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
        texts = {
            ext: decode_text(tar.read(members, ext), f"{ext} of sample {key}")
            for ext in (".txt", ".json", ".cls")
            if ext in members
        }
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
            changes["media"] = self._media(tar, members, f"{archive}:{name}")
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

    def _media(self, tar: TarIndex, members: Mapping[str, tuple[int, int]], name: str) -> Media | None:
        kinds = {extension: kind for extension in members if (kind := media_kind(f"x{extension}"))}
        fallback = None
        for extension in sorted(kinds, key=lambda extension: kinds[extension] != self._kind):
            data = tar.read(members, extension)
            kind = resolve_kind(f"x{extension}", self._kind, lambda data=data: data[:HEAD_BYTES]) or kinds[extension]
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
