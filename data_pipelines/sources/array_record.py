"""ArrayRecord files of this project's records: the native format, sharded, with random access.

A record is a MessagePack map: it cannot hold code, bytes stay bytes (JSON would need base64, a third larger), and empty
fields are omitted. Every record holds ``VERSION``.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec

from data_pipelines.errors import DataError
from data_pipelines.media import Media
from data_pipelines.record import Entailment, Expression, Question, Record, locate
from data_pipelines.sources.array_record_files import open_files
from data_pipelines.sources.files import find_files

VERSION = 1
SUFFIX = ".array_record"


class _StoredMedia(NamedTuple):
    kind: Literal["image", "video"]
    data: bytes
    name: str


class _StoredRecord(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A record as it is written. The names and the order of the fields are the file format."""

    version: int
    key: str
    picture: str = ""  # Record.visual_id
    media: _StoredMedia | None = None
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    expressions: tuple[Expression, ...] = ()
    label: str | None = None
    texts: tuple[str, ...] = ()
    entailments: tuple[Entailment, ...] = ()
    tokens: tuple[Annotated[int, msgspec.Meta(ge=0, lt=2**31)], ...] = ()
    tokenizer: str = ""


class _Header(msgspec.Struct):
    version: int


_SHARED = tuple(name for name in _StoredRecord.__struct_fields__ if name not in ("version", "picture", "media"))


def encode_record(record: Record) -> bytes:
    """Return a record as bytes; its media must be encoded and in memory.

    Raises:
        DataError: pixels, or media that are not in memory.
    """
    media = record.media
    if record.frames is not None or (media is not None and not isinstance(media.data, bytes)):
        raise DataError(f"record {record.key} has pixels or a path, expected encoded media in memory")
    stored = None if media is None else _StoredMedia(*dataclasses.astuple(media))
    fields = {name: getattr(record, name) for name in _SHARED}
    return msgspec.msgpack.encode(_StoredRecord(version=VERSION, picture=record.visual_id, media=stored, **fields))


def decode_record(data: bytes, where: str) -> Record:
    """Return the record of bytes that ``encode_record`` wrote.

    Raises:
        DataError: other bytes, or a record of a newer version.
    """
    try:
        version = msgspec.msgpack.decode(data, type=_Header).version
        if version != VERSION:
            raise DataError(f"{where} has version {version}, expected {VERSION}; read it with a newer version")
        stored = msgspec.msgpack.decode(data, type=_StoredRecord)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DataError(f"{where} is not a record of this format ({error}); write the file again") from error
    media = Media(*stored.media) if stored.media else None
    return Record(visual_id=stored.picture, media=media, **{name: getattr(stored, name) for name in _SHARED})


class ArrayRecordSource:
    """The records of sharded files, local or behind URLs, in the order of their names.

    Raises:
        DataError: no such file, or one that is truncated or not an ArrayRecord file.
    """

    def __init__(self, path: str) -> None:
        found = find_files(path, SUFFIX)
        self._files, self._paths = open_files(found), [file.path for file in found]
        self._ends: Sequence[int] = list(itertools.accumulate(map(len, self._files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        shard, row = locate(index, self._ends)
        return decode_record(self._files[shard][row], f"record {row} of {self._paths[shard]}")
