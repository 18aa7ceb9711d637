"""ArrayRecord files of our own records: the native form, sharded, with random access.

A record is a MessagePack map: no code can hide in it, bytes stay bytes (JSON would need base64, a third larger), and a
field that is empty is not written. ``VERSION`` is in every record.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgpack
from array_record.python.array_record_module import ArrayRecordReader

from data_pipelines.errors import DataError
from data_pipelines.media import Media
from data_pipelines.record import Entailment, Expression, Question, Record
from data_pipelines.sources.files import find_files, is_url

VERSION = 1
SUFFIX = ".array_record"
Item = TypeVar("Item")


def encode_record(record: Record) -> bytes:
    """A record as bytes; its media must be encoded, and lie in memory.

    Raises:
        DataError: pixels, or media that are elsewhere.
    """
    if record.frames is not None or (record.media is not None and not isinstance(record.media.data, bytes)):
        raise DataError(f"record {record.key} has pixels or a path, expected encoded media in memory")
    fields = {name: value for name, value in dataclasses.asdict(record).items() if value}
    for name in ("media", "questions", "expressions", "entailments"):
        if name in fields:
            value = fields[name]
            fields[name] = list(value.values()) if name == "media" else [list(each.values()) for each in value]
    packed: bytes = msgpack.packb({"version": VERSION, **fields})
    return packed


def decode_record(data: bytes, where: str) -> Record:
    """A record from its bytes.

    Raises:
        DataError: bytes that are no record, or one of a newer version.
    """
    try:
        fields = msgpack.unpackb(data)
        version = fields.pop("version")
        if version != VERSION:
            raise DataError(f"{where} is of version {version!r}, this code reads {VERSION}; use a newer one")
        return Record(**{name: _READERS[name](value) for name, value in fields.items()})
    except DataError:
        raise
    except Exception as error:  # hostile bytes raise whatever the constructors raise
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{where} is no record of ours ({reason}); write the file again") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"found {type(value).__name__}, expected text")
    return value


def _token(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise TypeError(f"found {value!r}, expected a token id")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(map(_text, values))


def _each(read: Callable[..., Item]) -> Callable[[Any], tuple[Item, ...]]:
    return lambda values: tuple(read(*value) for value in values)


def _media(value: Any) -> Media:
    kind, data, name = value
    if kind not in ("image", "video") or not isinstance(data, bytes):
        raise TypeError(f"found media of kind {kind!r} in {type(data).__name__}")
    return Media(kind, data, _text(name))


def _question(question: Any, answer: Any, kind: Any, others: Any) -> Question:
    return Question(_text(question), _text(answer), _text(kind), _texts(others))


def _expression(text: Any, box: Any) -> Expression:
    x0, y0, x1, y1 = map(float, box)
    return Expression(_text(text), (x0, y0, x1, y1))


def _entailment(premise: Any, hypothesis: Any, answer: Any) -> Entailment:
    if answer not in ("yes", "no", "maybe"):
        raise ValueError(f"found the answer {answer!r}")
    return Entailment(_text(premise), _text(hypothesis), answer)


_READERS: dict[str, Callable[[Any], Any]] = {
    "key": _text,
    "picture": _text,
    "media": _media,
    "captions": _texts,
    "questions": _each(_question),
    "expressions": _each(_expression),
    "label": _text,
    "texts": _texts,
    "entailments": _each(_entailment),
    "tokens": lambda values: tuple(map(_token, values)),
    "tokenizer": _text,
}


class ArrayRecordSource:
    """The records of sharded files, in the order of their names.

    Raises:
        DataError: no such file, a URL, or a file that is cut off or no ArrayRecord file.
    """

    def __init__(self, path: str) -> None:
        if is_url(path):
            raise DataError(
                f"{path}: ArrayRecord files are read from mounted folders only; mount the bucket, or use tars"
            )
        self._files = find_files(path, SUFFIX)
        self._readers = [_Reader(file) for file in self._files]
        self._ends: Sequence[int] = list(itertools.accumulate(map(len, self._readers)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        return decode_record(self._readers[shard][row], f"record {row} of {self._files[shard]}")


class _Reader:
    """One file; what the library raises for damaged bytes becomes one sentence."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            # A shuffled order wants no neighbours read ahead, and the loader's threads are parallel enough.
            self._reader = ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0")
            self._length: int = self._reader.num_records()
        except Exception as error:  # a RuntimeError of its own for each kind of damage
            raise DataError(f"{path} is damaged or no ArrayRecord file ({_reason(error)})") from error
        if not self._length:  # the library says so of files that are cut off, too
            raise DataError(f"{path} holds no record: it is empty, cut off or no ArrayRecord file; write it again")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> bytes:
        try:
            data: bytes = self._reader.read([row])[0]
        except Exception as error:  # as above
            raise DataError(f"record {row} of {self._path} is damaged ({_reason(error)})") from error
        return data


def _reason(error: Exception) -> str:
    return str(error).split(";")[0].split("\n")[0] or type(error).__name__
