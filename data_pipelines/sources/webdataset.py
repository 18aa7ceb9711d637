"""WebDataset tars, as img2dataset and video2dataset write them, read in place."""

import bisect
import itertools
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import Media
from data_pipelines.record import Record
from data_pipelines.sources.files import find_files, media_kind
from data_pipelines.sources.tar_index import TarIndex

CAPTIONS = ("captions", "caption", "text")
"""Where a sample's JSON may keep what is said of it, if there is no ``.txt``; the first that is there counts."""


class WebDatasetSource:
    """The samples of one or many tars: a picture or clip with ``.txt``, ``.json`` or ``.cls`` beside it.

    A record's key is the tar's name and the sample's.

    Args:
        path: a tar, a folder of tars, or a pattern ("shards/{00000..00127}.tar", "gs://bucket/*.tar").
        kind: what is taken from samples that hold several things; "text" takes no media.

    Raises:
        DataError: no tar, or one that is cut off, compressed or no tar at all.
    """

    def __init__(self, path: str, kind: Kind) -> None:
        self._kind = kind
        self._tars = [TarIndex(file) for file in find_files(path, ".tar")]
        self._ends = list(itertools.accumulate(map(len, self._tars)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        tar = self._tars[shard]
        name, members = tar[index - (self._ends[shard - 1] if shard else 0)]
        archive = PurePosixPath(tar.path).name
        key = f"{archive.removesuffix('.tar')}/{name}"
        texts = {ext: _decoded(tar.read(members, ext), key, ext) for ext in (".txt", ".json", ".cls") if ext in members}
        fields = _json(texts.get(".json"), key)
        captions = (texts[".txt"],) if ".txt" in texts else _captions(fields, key)
        captions = tuple(filter(None, map(str.strip, captions)))
        if self._kind == "text":
            return Record(key, texts=captions)
        label = texts.get(".cls", fields.get("label"))
        return Record(
            key,
            media=self._media(tar, members, f"{archive}:{name}"),
            captions=captions,
            label=None if label is None else str(label).strip(),
        )

    def _media(self, tar: TarIndex, members: Mapping[str, tuple[int, int]], name: str) -> Media | None:
        kinds = {extension: kind for extension in members if (kind := media_kind(f"x{extension}"))}
        best = next((extension for extension in kinds if kinds[extension] == self._kind), next(iter(kinds), None))
        return None if best is None else Media(kinds[best], tar.read(members, best), f"{name}{best}")


def _decoded(data: bytes, key: str, extension: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{extension} of sample {key} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error


def _json(text: str | None, key: str) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f".json of sample {key} is not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise DataError(f".json of sample {key} holds a {type(fields).__name__}, expected named fields")
    return fields


def _captions(fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    said = next((fields[name] for name in CAPTIONS if fields.get(name)), ())
    captions = tuple(said) if isinstance(said, list | tuple) else (said,)
    if not all(isinstance(caption, str) for caption in captions):
        raise DataError(f".json of sample {key} has a caption that is no text: {said!r:.80}")
    return captions
