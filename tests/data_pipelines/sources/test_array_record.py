"""Records in ArrayRecord files: round trips, damage, the bytes of the format, access from many threads."""

import contextlib
import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.media import Media
from data_pipelines.record import Entailment, Expression, Question, Record
from data_pipelines.sources.array_record import ArrayRecordSource, decode_record, encode_record

TEXT = st.text(max_size=12)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
RECORDS = st.builds(
    Record,
    key=st.text(min_size=1, max_size=12),
    visual_id=TEXT,
    media=st.none() | st.builds(Media, st.sampled_from(["image", "video"]), st.binary(max_size=40), TEXT),
    captions=TEXTS,
    questions=st.lists(st.builds(Question, TEXT, TEXT, TEXT, TEXTS), max_size=2).map(tuple),
    expressions=st.lists(
        st.builds(Expression, TEXT, st.tuples(*[st.floats(0, 1)] * 4)), max_size=2
    ).map(tuple),
    label=st.none() | st.text(min_size=1, max_size=5),
    texts=TEXTS,
    entailments=st.lists(
        st.builds(Entailment, TEXT, TEXT, st.sampled_from(["yes", "no", "maybe"])), max_size=2
    ).map(tuple),
)  # fmt: skip


def write(path: Path, *records: bytes) -> Path:
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    return path


@settings(max_examples=60)
@given(RECORDS)
def test_a_record_survives_a_round_trip(record: Record) -> None:
    assert decode_record(encode_record(record), "here") == record


def test_the_bytes_of_the_format_are_stable() -> None:
    """Compare with a MessagePack map of the fields by their names in the format, as all versions write and read it."""
    record = Record(
        "k", visual_id="v", media=Media("image", b"\x00\xff", "n"), captions=("é",),
        questions=(Question("q", "a", "count", ("b", "")),), expressions=(Expression("p", (0.0, 0.5, 1.0, 1.0)),),
        label="l", texts=("t",), entailments=(Entailment("p", "h", "yes"),), tokens=(1, 70000), tokenizer="f",
    )  # fmt: skip
    fields = {
        "version": 1, "key": "k", "picture": "v", "media": ["image", b"\x00\xff", "n"], "captions": ["é"],
        "questions": [["q", "a", "count", ["b", ""]]], "expressions": [["p", [0.0, 0.5, 1.0, 1.0]]], "label": "l",
        "texts": ["t"], "entailments": [["p", "h", "yes"]], "tokens": [1, 70000], "tokenizer": "f",
    }  # fmt: skip
    assert encode_record(record) == msgspec.msgpack.encode(fields)
    assert encode_record(Record("k")) == b"\x82\xa7version\x01\xa3key\xa1k"


@settings(max_examples=150)
@given(st.binary(max_size=60) | st.builds(msgspec.msgpack.encode, st.recursive(
    st.none() | st.integers(-5, 5) | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["version", "key", "media", "questions", "expressions", "x"]), inner, max_size=4), max_leaves=8,
)))  # fmt: skip
def test_hostile_bytes_are_a_record_or_a_data_error(data: bytes) -> None:
    with contextlib.suppress(DataError):
        assert isinstance(decode_record(data, "record 3 of a.array_record"), Record)


def test_a_newer_version_is_an_error() -> None:
    with pytest.raises(DataError, match="here has version 2, expected 1; read it with a newer version"):
        decode_record(msgspec.msgpack.encode({"version": 2, "key": "a", "smell": "lavender"}), "here")


def test_pixels_and_paths_are_not_written() -> None:
    with pytest.raises(DataError, match="record a has pixels or a path, expected encoded media in memory"):
        encode_record(Record("a", media=Media("image", "a.png", "a.png")))


def test_shards_are_read_in_name_order_by_many_threads(tmp_path: Path) -> None:
    media = Media("image", bytes(3000), "x")
    records = [Record(str(i), media=dataclasses.replace(media, data=bytes([i]) * 3000)) for i in range(60)]
    write(tmp_path / "b.array_record", *map(encode_record, records[25:]))
    write(tmp_path / "a.array_record", *map(encode_record, records[:25]))
    source = ArrayRecordSource(str(tmp_path))
    assert len(source) == 60
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, list(range(60)) * 5)) == records * 5
    assert len(ArrayRecordSource(str(tmp_path / "a*"))) == 25
    with pytest.raises(IndexError):
        source[60]


def test_a_flipped_byte_fails_one_record(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.array_record", *(encode_record(Record(str(i), captions=("c" * 70_000,))) for i in range(9))
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    source, message = ArrayRecordSource(str(path)), []
    for i in range(9):
        try:
            assert source[i].key == str(i)
        except DataError as error:
            message.append(str(error))
    (sentence,) = message
    assert re.match(r"record \d of .*a\.array_record is damaged \(", sentence)


@pytest.mark.parametrize("data", [b"", b"junk" * 100, None], ids=["empty", "junk", "cut off"])
def test_files_of_other_formats(tmp_path: Path, data: bytes | None) -> None:
    path = write(tmp_path / "a.array_record", *(encode_record(Record(str(i), label="x" * 70_000)) for i in range(9)))
    path.write_bytes(path.read_bytes()[:300_000] if data is None else data)
    with pytest.raises(DataError, match=r"a\.array_record (has no records: it is empty, truncated|is damaged)"):
        ArrayRecordSource(str(path))


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    for path, message in (
        (tmp_path, r"holds no file that ends in \.array_record; found 1 other files"),
        (tmp_path / "x*", "matches no file; check the pattern"),
        (tmp_path / "x.array_record", "x.array_record does not exist; check the path"),
        (tmp_path / "x-{00..02}.array_record", "x-00.array_record does not exist; check the path"),
    ):
        with pytest.raises(DataError, match=message):
            ArrayRecordSource(str(path))
